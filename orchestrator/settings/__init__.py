"""nanoGPT's grammar of settings: Python files and `--key=value`, for any dataclass. It must not know a key."""

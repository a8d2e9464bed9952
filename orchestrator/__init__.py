"""Train nanoGPT models on Ray, on machines that come and go."""

__version__ = "0.1.0"

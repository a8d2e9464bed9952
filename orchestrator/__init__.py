"""Train nanoGPT models on Ray, on machines that come and go."""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# Large tensors lie in pages of 2 MB, where the kernel has them to give: to touch new memory for the first time, as at
# every restore and in every step on a CPU, takes half as long then. PyTorch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parents[1]


class _ModelFinder(MetaPathFinder):
    """Finds our package `model` beside this one. A nanoGPT folder, in which people work, has a model.py of its own."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return PathFinder.find_spec(name, [str(_HERE)]) if name == "model" else None


if "model" in sys.modules:
    _file = getattr(sys.modules["model"], "__file__", None)
    if not _file or Path(_file).resolve().parent.parent != _HERE:
        raise ImportError(
            f"another module named `model` was imported before, from {_file}: import orchestrator first, or in another "
            "process"
        )
sys.meta_path.insert(0, _ModelFinder())

"""Train nanoGPT models on Ray, on machines that come and go."""

import os

# Large tensors lie in pages of 2 MB, where the kernel has them to give: to touch new memory for the first time, as at
# every restore and in every step on a CPU, takes half as long then. PyTorch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

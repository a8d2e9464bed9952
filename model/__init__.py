"""The GPT: architecture, pretrained weights, optimizer groups, generation and MFU.

Plain PyTorch. It must not know how it is trained: nothing here imports the orchestrator, Ray or a process group.
"""

from model.config import GPTConfig
from model.gpt import GPT, parameter_shapes
from model.huggingface import PretrainedError, from_huggingface, huggingface_config, to_huggingface, transpose_if_linear
from model.lora import LoRAConfig
from model.pretrained import open_pretrained, read_pretrained_args

__all__ = [
    "GPT",
    "GPTConfig",
    "LoRAConfig",
    "PretrainedError",
    "from_huggingface",
    "huggingface_config",
    "open_pretrained",
    "parameter_shapes",
    "read_pretrained_args",
    "to_huggingface",
    "transpose_if_linear",
]

"""The GPT: architecture, pretrained weights, optimizer groups, generation and MFU.

Plain PyTorch. It must not know how it is trained: nothing here imports the orchestrator, Ray or a process group.
"""

from model.config import GPTConfig
from model.gpt import GPT, parameter_shapes
from model.huggingface import PretrainedError, from_huggingface, huggingface_config, to_huggingface, transpose_if_linear
from model.lora import LoRAConfig
from model.peft import peft_config, to_peft
from model.pretrained import open_adapter, open_pretrained, read_pretrained_args
from model.weight_files import hub_commit

__all__ = [
    "GPT",
    "GPTConfig",
    "LoRAConfig",
    "PretrainedError",
    "from_huggingface",
    "hub_commit",
    "huggingface_config",
    "open_adapter",
    "open_pretrained",
    "parameter_shapes",
    "peft_config",
    "read_pretrained_args",
    "to_huggingface",
    "to_peft",
    "transpose_if_linear",
]

"""Adapters of a Snapshot as a folder of peft's: what `PeftModel.from_pretrained` loads.

Names and adapter_config.json are `model/peft.py`'s. Nothing here knows a live model; reading is `model/pretrained.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from model import peft_config, to_peft
from model.huggingface import HUB_OWNER
from model.weight_files import ADAPTER_CONFIG, ADAPTER_FILES
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import GPT2_NAMES
from orchestrator.storage.transfer import atomic_write


def write_peft(snapshot: Snapshot, folder_or_url: str | Path, *, storage_options: dict[str, Any] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; snapshot: of adapters, with their values.

    Raises:
        CheckpointError: a file cannot be written.
    """
    assert snapshot.adapters
    folder = str(folder_or_url).rstrip("/")
    base = snapshot.adapters.base
    source = f"{HUB_OWNER}/{base.source}" if base.source in GPT2_NAMES else base.source
    lora = replace(snapshot.adapters.lora, dropout=float(snapshot.config.get("lora_dropout", 0.0)))
    with atomic_write(f"{folder}/{ADAPTER_FILES[0]}", storage_options) as scratch_file:
        scratch_file.write_bytes(save(to_peft(snapshot.model), metadata={"format": "pt"}))
    with atomic_write(f"{folder}/{ADAPTER_CONFIG}", storage_options) as scratch_file:  # last: by it, a folder is known
        scratch_file.write_text(json.dumps(peft_config(lora, source, base.revision), indent=2) + "\n")

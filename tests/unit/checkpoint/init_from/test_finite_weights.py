"""Weights that are NaN or infinite are named before anything is computed with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.config import TrainConfig
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError
from orchestrator.loop import train
from tests.conftest import final_state
from tests.support import ranks
from tests.support.sources import beside
from tests.support.states import save_run


@pytest.mark.parametrize("kind", ["folder", "ckpt.pt", "run"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    first: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, value: float
) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.h.1.ln_1.weight"][3:5] = value
    saved.model["transformer.ln_f.weight"][0] = value
    source = {"run": str(tmp_path / "bad"), "ckpt.pt": str(tmp_path / "x.pt"), "folder": str(tmp_path / "hf")}[kind]
    if kind == "ckpt.pt":
        write_nanogpt(saved, source)
    elif kind == "folder":
        write_huggingface(saved, source, CharTokenizer(saved.config["tokenizer"]["chars"]))
    else:
        save_run(Path(source), saved)
    told = "transformer.h.1.ln_1.weight has 2 of 32 values that are not finite (NaN or infinity)"
    for words in (
        ["sample", "--device=cpu"],
        ["export", f"--to={tmp_path}/out.pt"],
        ["export", "--format=hf", f"--to={tmp_path}/o"],
    ):
        assert main([*words, f"--init_from={source}"]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "o" / "model.safetensors").exists()
    config = beside(first, "again", init_from=source, max_iters=9)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.weight has 2 of 32 values"):
        train(resolve(config), World())
    if kind != "run":
        with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.weight has 2 of 32 values"):
            plan(config)
    assert main(["inspect", f"--init_from={source}", "--verify"]) == 0
    told = "NOT FINITE: transformer.h.1.ln_1.weight has 2 values" if kind == "run" else told
    assert told in capsys.readouterr().out


def test_all_ranks_are_told_alike(first: TrainConfig, tmp_path: Path) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.ln_f.weight"][0] = float("nan")
    write_nanogpt(saved, tmp_path / "x.pt")
    config = beside(first, "again", init_from=str(tmp_path / "x.pt"), max_iters=9, gradient_accumulation_steps=2)
    ended = ranks.train(config, 2, tmp_path / "log", memory_dirs=[first.memory_dir] * 2)
    assert not ended.is_done
    assert ended.said.count("CheckpointError: ") == 2
    assert ended.said.count("transformer.ln_f.weight has 1 of 32 values that are not finite") == 2


def test_logits_that_overflow_are_one_line(
    first: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.ln_f.weight"].fill_(3e38)  # finite, as after a flipped bit of the exponent
    write_nanogpt(saved, tmp_path / "x.pt")
    for temperature in (0.0, 1.0):
        assert main(["sample", f"--init_from={tmp_path}/x.pt", "--device=cpu", f"--temperature={temperature}"]) == 2
        said = capsys.readouterr().err
        assert "error: nothing can be drawn: the logits after 1 tokens are not finite" in said

"""The tracer counts own functions and classes, once each, and stops at the first checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.entered import Entered
from benchmarks.loss_curves import losses_of
from orchestrator.config import TrainConfig
from orchestrator.errors import nearest
from orchestrator.settings.bounds import bounds_of


def test_own_functions_count_until_a_checkpoint_is_there(tmp_path: Path) -> None:
    entered, bound = Entered(tmp_path), bounds_of(TrainConfig)["out_dir"]
    before = sys.getprofile()  # a coverage tool's
    try:
        sys.setprofile(entered.hook)
        for _ in range(2):
            bound.check("out_dir", "out")
        (tmp_path / "checkpoint_00000001_ab").mkdir()
        (tmp_path / "checkpoint_00000001_ab" / "state.json").touch()
        nearest("a", ["b"])
    finally:
        sys.setprofile(before)
    found = entered.as_json()
    assert found["functions"] == {
        "orchestrator/config.py": ["_names_a_run"],
        "orchestrator/settings/bounds.py": ["Bound.check"],
    }
    assert found["classes"] == ["orchestrator.settings.bounds.Bound"]


def test_losses_are_read_while_they_are_written(tmp_path: Path) -> None:
    assert losses_of(tmp_path) == {}
    lines = ['{"kind": "eval", "iter": 0}', '{"kind": "step", "iter": 0, "loss": 2.5}', '{"kind": "step", "it']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert losses_of(tmp_path) == {0: 2.5}

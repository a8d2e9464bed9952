"""Three ranks, one of them killed at every stage of a save: the run that follows ends with the undisturbed bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support import ranks
from tests.support.faults import Fault
from tests.support.runs import checkpoints_in


def whole(out_dir: str) -> set[str]:
    return {checkpoint.name for checkpoint in checkpoints_in(out_dir).newest_first()}


@pytest.mark.parametrize(
    ("point", "rank", "nth"),
    [
        ("copy", 1, 1),
        pytest.param("seal", 2, 1, marks=pytest.mark.slow),
        ("sealed", 0, 1),
        pytest.param("upload", 1, 1, marks=pytest.mark.slow),
        ("during", 2, 1),
        pytest.param("write", 0, 1, marks=pytest.mark.slow),
        ("write", 1, 2),
        ("commit", 0, 1),
        pytest.param("committed", 0, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_a_stage_of_a_save(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, point: str, rank: int, nth: int
) -> None:
    fault = Fault(point, 11, rank, tmp_path / "fired", nth=nth)
    killed = ranks.train(tiny, 3, tmp_path / "killed.log", [fault])
    assert fault.marker.exists(), killed.said
    assert killed.codes[rank] == -9
    before = whole(tiny.out_dir)
    again = ranks.train(tiny, 3, tmp_path / "again.log", [fault])
    assert again.is_done, again.said
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 3)), again.said
    announced = [name for name in before if int(name.split("_")[1]) >= 11]
    assert bool(announced) == (point == "committed"), "announced last, and only when everything is there"

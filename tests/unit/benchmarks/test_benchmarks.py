"""The parts of the benchmarks that can be wrong without anybody noticing: what is compared with what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from benchmarks.__main__ import list_benchmarks
from benchmarks.checkpoint.checkpoint import AT_LEAST, AT_MOST, show
from benchmarks.checkpoint.checkpoint_xl import _state_bytes
from benchmarks.checkpoint.state import SIZES, digest, new_state, size_bytes, torch_load, torch_save, used_bytes
from benchmarks.recovery.goodput import OUR_CALLS
from orchestrator.checkpoint.state import TrainState

TINY = SIZES["tiny"]


@pytest.fixture
def state() -> TrainState:
    return new_state(TINY)


def test_states_are_alike_in_every_process_and_full(state: TrainState) -> None:
    assert digest(state) == digest(new_state(TINY))
    assert size_bytes(state) == _state_bytes(TINY) + 4  # the step
    assert all(tensor.any() for slots in state.optimizer.state.values() for tensor in slots.values())


def test_digest_notices_one_bit(state: TrainState) -> None:
    before = digest(state)
    moment = next(iter(state.optimizer.state.values()))["exp_avg"]
    moment.view(-1)[0] = torch.nextafter(moment.view(-1)[0], torch.tensor(2.0))
    assert digest(state) != before


def test_torch_file_is_as_large_as_the_state_and_fills_another(state: TrainState, tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    assert torch_save(state, file) > 0
    assert size_bytes(state) <= file.stat().st_size < 1.01 * size_bytes(state)
    assert used_bytes(tmp_path) >= size_bytes(state)
    other = new_state(TINY)
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    torch_load(other, file)
    assert digest(other) == digest(state)


def test_figures_are_printed_beside_their_goals(capsys: pytest.CaptureFixture[str]) -> None:
    show({"pause_ratio": 0.5, "save_bandwidth_ratio": 2.0, "dcp_async_pause_ratio": 0.1})
    bad, good, free = capsys.readouterr().out.splitlines()
    assert bad.endswith("MISSED")
    assert good.endswith("reached")
    assert free.endswith("0.1000")
    assert not AT_MOST.keys() & AT_LEAST.keys()


def test_every_benchmark_is_listed_and_none_is_imported() -> None:
    code = (
        "import sys; from benchmarks.__main__ import list_benchmarks as l; print(*[b.name for b in l()], *sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = {benchmark.name: benchmark for benchmark in list_benchmarks()}
    assert {"checkpoint", "goodput", "gpu", "recovery", "same_bits", "sample", "startup", "step_memory"} <= found.keys()
    assert found.keys() <= set(printed)
    assert all(benchmark.summary for benchmark in found.values())
    assert not {"torch", "ray", *(benchmark.module for benchmark in found.values())} & set(printed)


def test_a_benchmark_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.FOLDER", tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.py").write_text("def add_arguments(parser): ...\ndef run(args): ...\n")
    (tmp_path / "part.py").write_text("def run(args): ...\n")
    with pytest.raises(ValueError, match="have the same name: rename one"):
        list_benchmarks()
    (tmp_path / "b" / "memory.py").unlink()
    assert [(benchmark.name, benchmark.summary) for benchmark in list_benchmarks()] == [("memory", "")]


def test_what_goodput_times_is_there() -> None:
    for owner, names in OUR_CALLS.items():
        assert all(callable(getattr(resolve_name(owner), name)) for name in names)

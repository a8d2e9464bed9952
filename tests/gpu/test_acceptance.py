"""What `python -m benchmarks gpu` claims, claim by claim, on the GPU of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.gpu import Running
from benchmarks.gpu.sections import SECTIONS, Section


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device; where there is none, what PyTorch says of that."""
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            pytest.skip(f"no GPU can be used here: {str(error).splitlines()[0]}")
    return "cuda"


def slow_where_timed(section: Section) -> Any:
    return pytest.param(section, id=section.name, marks=[pytest.mark.slow] if section.is_timed else [])


@pytest.mark.parametrize("section", [slow_where_timed(section) for section in SECTIONS])
def test_what_is_claimed_holds(gpu: str, section: Section) -> None:
    found = Running(section, gpu, is_tiny=False, limit_s=section.limit_s).finish()
    assert not found["failed"], found
    if found["skipped"]:
        pytest.skip(found["skipped"])
    assert not [claim for claim in found["claims"] if not claim["holds"]]

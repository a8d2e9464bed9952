"""The plan's formulas for a CPU, against what PyTorch's allocator gives out for real steps."""

from __future__ import annotations

import pytest

from benchmarks.small_gpus.step import CONFIGURATIONS, measure


def test_twelve_configurations_are_measured() -> None:
    assert len(CONFIGURATIONS) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both, bfloat16", "lanes=4", "LoRA, both, base in bfloat16"])
def test_the_plan_foretells_a_step(name: str) -> None:
    measured = measure(name)
    assert abs(measured.error) < 0.05
    assert measured.all_bytes > measured.step_bytes > 10_000_000

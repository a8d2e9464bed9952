from __future__ import annotations

import numpy as np
import pytest

from orchestrator.report.thinning import percentiles, smooth, thin

X = np.arange(100_000, dtype=np.float64)


def test_few_points_keep_the_ends_and_every_peak() -> None:
    y = np.sin(X / 1000)
    y[[7, 40_123, 99_990]] = 50.0, -50.0, 60.0
    y[20_000:30_000] = np.nan
    x, kept = thin(X, y, 5_000)
    assert 4_000 < len(x) <= 5_002
    assert (np.diff(x) > 0).all()
    assert {0.0, 7.0, 40_123.0, 99_990.0, 99_999.0} <= set(x)
    assert (np.nanmin(kept), np.nanmax(kept)) == (-50.0, 60.0)
    assert np.isnan(kept).any(), "the gap stays a gap"


def test_a_short_curve_stays_as_it_is() -> None:
    y = np.array([3.0, np.nan, 1.0])
    x, kept = thin(X[:3], y)
    assert x.tolist() == [0.0, 1.0, 2.0]
    assert kept is y


def test_smoothing_is_the_mean_of_what_is_there() -> None:
    found = smooth(np.array([1.0, 2.0, np.nan, 6.0, 7.0]), 3)
    assert found.tolist() == pytest.approx([1.5, 1.5, 4.0, 6.5, 6.5])
    assert np.isnan(smooth(np.array([np.nan, np.nan]), 3)).all()


def test_percentiles_of_values_in_a_row() -> None:
    y = np.concatenate([np.full(50, 1.0), np.full(50, 3.0)])
    y[10] = np.nan
    middles, found = percentiles(X[:100], y, (50, 100), n_buckets=2)
    assert found.tolist() == [[1.0, 3.0], [3.0, 3.0]] or found.tolist() == [[1.0, 1.0], [3.0, 3.0]]
    assert len(middles) == 2
    assert percentiles(X[:0], X[:0], (50, 99))[1].shape == (0, 2)

"""Records keep the keys that JSON lines have always had, and those of older and newer versions are read."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from orchestrator.telemetry.format import line_of
from orchestrator.telemetry.records import (
    AttemptWaiting,
    Begin,
    Evaluation,
    Failure,
    LossSeen,
    Note,
    Record,
    Stamped,
    Step,
    from_json,
    to_json,
)

LOSSES: dict[str, Any] = {"iter": 8, "train_loss": 2.0, "val_loss": 2.1, "lr": 1e-3, "mfu": None, "tflops": None}
SIZES: dict[str, Any] = {"max_iters": 9, "num_params": 5, "tokens_per_iter": 64}
PLACE: dict[str, Any] = {"world_size": 1, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(
    ("record", "value"),
    [
        (Evaluation(**LOSSES), {"kind": "eval", **LOSSES}),
        (Evaluation(**LOSSES, perplexity=8.2), {"kind": "eval", **LOSSES, "perplexity": 8.2}),
        (Begin(iter=0, from_=None, **SIZES, **PLACE), {"kind": "begin", "iter": 0, "from": None, **SIZES, **PLACE}),
        (
            Begin(iter=4, from_="c4", restore_s=0.5, size_bytes=9, from_storage_bytes=0, **SIZES, **PLACE),
            {"kind": "begin", "iter": 4, "from": "c4", "restore_s": 0.5, "size_bytes": 9, "from_storage_bytes": 0}
            | SIZES
            | PLACE,
        ),
        (Note(text="a line"), {"kind": "note", "text": "a line"}),
        (Note(level="WARNING", text="a line"), {"kind": "note", "level": "WARNING", "text": "a line"}),
        (LossSeen(), {"kind": "loss_is_seen"}),
        (AttemptWaiting(), {"kind": "attempt_waiting"}),
        (
            Failure(number=2, cause="hang", ranks=[1], text="no progress", reached_iter=0),
            {"kind": "failure", "number": 2, "cause": "hang", "ranks": [1], "text": "no progress", "reached_iter": 0},
        ),
    ],
    ids=str,
)
def test_a_record_and_its_json(record: Record, value: dict[str, Any]) -> None:
    assert to_json(record) == value
    assert from_json(value) == record
    assert from_json({**value, "attempt": "a", "time": 1.5, "of a newer version": 1}) == record
    stamped = Stamped(record, 1.5, "a")
    assert stamped.to_json() == {**value, "attempt": "a", "time": 1.5}
    assert Stamped.from_json(stamped.to_json()) == stamped


def test_every_kind_has_a_name_of_its_own() -> None:
    kinds = [each.kind for each in get_args(Record)]
    assert len(kinds) == len(set(kinds)) == 20


def test_a_kind_of_a_newer_version_is_no_record() -> None:
    assert from_json({"kind": "of a newer version", "iter": 3}) is None
    assert Stamped.from_json({"kind": "of a newer version", "iter": 3, "attempt": "a", "time": 1.5}) is None


def test_a_key_that_an_older_version_did_not_write_is_none() -> None:
    step = from_json({"kind": "step", "iter": 3, "loss": 2.5, "lr": 1e-3, "dt_s": 0.125, "mfu": None})
    assert isinstance(step, Step)
    assert step.tflops is None
    without = from_json({"kind": "step", "iter": 3, "loss": 2.5, "dt_s": 0.125})
    assert without
    assert line_of(without) == "iter 3: loss 2.5000, time 125.00ms"

"""Read from a run's records: its failures, its attempts, and how many steps it repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.runs import events_in, metrics_in

OWN_CLUSTER = {**os.environ, "RAY_ADDRESS": "local"}  # not the one of the tests beside it


def attempts(out_dir: str) -> int:
    return len({record["attempt"] for record in metrics_in(out_dir)})


def steps_repeated(out_dir: str) -> int:
    """Return how many iterations of the first attempt the second one computed again, as far as rank 0 told of them."""
    records = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    first, second = (record for record in records if record["kind"] == "begin")
    last = max((r["iter"] for r in records if r["kind"] == "step" and r["attempt"] == first["attempt"]), default=-1)
    return max(0, last + 1 - int(second["iter"]))


def causes(out_dir: str) -> list[str]:
    return [record["cause"] for record in events_in(out_dir) if record["kind"] == "failure"]

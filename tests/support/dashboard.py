"""Grafana's dashboard of this repository, and the queries in it."""

from __future__ import annotations

import json
from typing import Any

from tests.support.installation import ROOT

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "orchestrator.json").read_text(encoding="utf-8"))


def queries(run: str) -> list[str]:
    """Return the queries of all panels, as Grafana asks them for a run."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "1m").replace("$run", run) for query in found]

"""Grafana's dashboard: it can be imported, and asks for nothing that we do not export."""

from __future__ import annotations

import re

from orchestrator.driver.ray_metrics import COUNTERS, GAUGES, PREFIX, RUN_LABELS
from tests.support.dashboard import DASHBOARD, queries
from tests.support.installation import ROOT

EXPORTED = {f"ray_{PREFIX}{name}" for name in GAUGES} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}


def test_it_asks_for_all_that_we_export_and_nothing_else() -> None:
    asked = {name for query in queries("run") for name in re.findall(r"ray_\w+(?=\{)", query)}
    assert asked == EXPORTED


def test_its_queries_name_labels_that_there_are() -> None:
    labels = {*RUN_LABELS, *(label for _, label in (GAUGES | COUNTERS).values() if label)}
    for query in queries("run"):
        by = re.findall(r"by \(([^)]*)\)", query)
        asked = {*re.findall(r"(\w+)=~?\"", query), *(label.strip() for each in by for label in each.split(","))}
        assert asked <= labels, query


def test_every_panel_asks_the_chosen_data_source_and_fits_the_page() -> None:
    datasource, run = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"]) == ("datasource", "datasource")
    assert "ray_orchestrator_workers" in run["definition"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Training", "Speed", "Goodput", "Checkpoints", "Failures", "Workers"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            asked = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert {each["uid"] for each in asked} == {"${datasource}"}, panel["title"]


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(ray_\w+)", text, re.MULTILINE))
    assert listed == EXPORTED

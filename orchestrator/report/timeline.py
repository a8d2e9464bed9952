"""The timeline of a run: nodes and ranks as rows, their time as coloured stretches, checkpoints and incidents above."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, Range1d
from bokeh.plotting import figure

from orchestrator.report.curves import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, YELLOW
from orchestrator.report.presences import Presence, evaluations_of, presences_of
from orchestrator.report.run import Run
from orchestrator.telemetry.goodput import Incident, Stretch, duration
from orchestrator.telemetry.records import CheckpointFailed, CheckpointSaved, CheckpointSkipped, Failure, StepWindow

COLORS = {
    "productive": GREEN,
    "evaluation": SKY,
    "pause": BLUE,
    "start_up": YELLOW,
    "detection": PURPLE,
    "recovery": VERMILLION,
    "waiting": GREY,
    "lost": ORANGE,
}
WORDS = {
    "productive": "training",
    "evaluation": "evaluation",
    "pause": "pause",
    "start_up": "start-up, end",
    "detection": "detection",
    "recovery": "recovery",
    "waiting": "waiting",
    "lost": "repeated",
}
MARKS = {  # of checkpoints: Bokeh's marker, the same as text, color
    "checkpoint in memory": ("square", "▪", GREEN),
    "checkpoint in storage": ("circle", "●", BLUE),
    "checkpoint rescued into memory": ("diamond", "◆", GREEN),
    "checkpoint skipped": ("triangle", "▲", GREY),
    "checkpoint failed": ("x", "✕", VERMILLION),
}
_MAX_RANKS = 48  # as rows; where there are more, the ranks of a node share one
_MAX_STRETCHES = 20_000
_MAX_IN_MEMORY = 1_000  # marks: a run may keep a state of every iteration
_SIZES = {"square": 5, "diamond": 12, "x": 12}
_ABOVE = ("incidents", "checkpoints", "run")


def timeline_of(run: Run) -> figure | None:
    """Return the figure, None where no time has passed."""
    stretches = run.ledger.stretches
    if not stretches:
        return None
    presences = presences_of(run.records)
    rows = _rows(presences)
    made = _empty([*_ABOVE, *rows])
    evaluations = evaluations_of(run.records.metrics)
    row_of_run = Presence(0, "", stretches[0].begin_s, stretches[-1].end_s)
    placed = [(float(_ABOVE.index("run")), row_of_run)]
    placed += [(float(len(_ABOVE) + rows.index(_row(each, presences))), each) for each in presences]
    for entry, color in COLORS.items():
        of_entry = evaluations if entry == "evaluation" else [each for each in stretches if each.entry == entry]
        _draw(made, entry, color, placed, _longest(of_entry, _MAX_STRETCHES // len(placed)))
    _draw_checkpoints(made, run)
    _draw_incidents(made, run.ledger.incidents)
    return made


def _row(presence: Presence, presences: Sequence[Presence]) -> str:
    rank = f"rank {presence.rank}"
    if len({(each.node, each.rank) for each in presences}) > _MAX_RANKS and presence.node:
        return presence.node
    return f"{presence.node} · {rank}" if presence.node else rank


def _rows(presences: Sequence[Presence]) -> list[str]:
    """Return the names of the rows, node by node in the order in which they came."""
    nodes = list(dict.fromkeys(each.node for each in presences))
    in_order = sorted(presences, key=lambda each: (nodes.index(each.node), each.rank))
    return list(dict.fromkeys(_row(each, presences) for each in in_order))


def _empty(rows: Sequence[str]) -> figure:
    made = figure(
        height=130 + 26 * len(rows),
        sizing_mode="stretch_width",
        x_axis_type="datetime",
        x_range=DataRange1d(range_padding=0.01),
        y_range=Range1d(len(rows) - 0.4, -0.6),
        tools="xpan,box_zoom,xwheel_zoom,reset,save",
        active_drag="box_zoom",
        x_axis_label="time (UTC)",
    )
    made.yaxis.ticker = list(range(len(rows)))
    made.yaxis.major_label_overrides = {n: row.replace("$$", "$ $") for n, row in enumerate(rows)}
    made.ygrid.visible = False
    made.toolbar.autohide, made.toolbar.logo = True, None
    return made


def _draw(
    made: figure, entry: str, color: str, placed: Sequence[tuple[float, Presence]], stretches: Sequence[Stretch]
) -> None:
    """Draw an entry's stretches on every row, as far as its rank was there."""
    begin, end = (np.array([getattr(each, name) for each in stretches]) for name in ("begin_s", "end_s"))
    lefts, rights, tops = [], [], []
    for row, presence in placed:
        left, right = np.maximum(begin, presence.begin_s), np.minimum(end, presence.end_s)
        is_there = right > left
        lefts.append(left[is_there])
        rights.append(right[is_there])
        tops.append(np.full(is_there.sum(), row, dtype=np.float32))
    left, right, y = np.concatenate(lefts), np.concatenate(rights), np.concatenate(tops)
    if not len(left):
        return
    data = {"left": left * 1000, "right": right * 1000, "top": y - 0.36, "bottom": y + 0.36, "s": (right - left)}
    source = ColumnDataSource({**data, "s": data["s"].astype(np.float32)})
    style = {"fill_color": color, "line_color": color, "line_width": 0.5}
    drawn = made.quad("left", "right", "top", "bottom", source=source, name=WORDS[entry], **style)
    tooltips = [("", "$name"), ("from", "@left{%m-%d %H:%M:%S}"), ("seconds", "@s{0,0.0}")]
    made.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, formatters={"@left": "datetime"}))


def _longest(stretches: Sequence[Stretch], at_most: int) -> Sequence[Stretch]:
    return sorted(stretches, key=lambda each: each.begin_s - each.end_s)[: max(1, at_most)]


def _draw_checkpoints(made: figure, run: Run) -> None:
    kept, saved, rescued, skipped, failed = [], [], [], [], []
    for stamped in [*run.records.metrics, *run.records.events]:
        match stamped.record:
            case StepWindow(iter=it, count=count, snapshots=snapshots) if snapshots:
                kept.append((stamped.time_s, it, f"{snapshots} in the last {count} iterations"))
            case CheckpointSaved(iter=it, name=name, seconds=seconds):
                saved.append((stamped.time_s, it, f"{name}, uploaded in {seconds or 0.0:.2f} s"))
            case CheckpointFailed(iter=it, name=name, why=why):
                failed.append((stamped.time_s, it, f"{name}: {why}"))
            case CheckpointSkipped(iter=it, name=name, why=why):
                skipped.append((stamped.time_s, it, f"{name}: {why}"))
            case Failure(reached_iter=int(it), reached_at_s=reached_s):
                rescued.append((reached_s or stamped.time_s, it, "rescued into node memory"))
    some = kept[:: ceil(len(kept) / _MAX_IN_MEMORY) or 1]
    for marks, (word, (marker, _, color)) in zip((some, saved, rescued, skipped, failed), MARKS.items(), strict=True):
        _draw_marks(made, marks, _ABOVE.index("checkpoints"), word, marker=marker, color=color)


def _draw_marks(made: figure, marks: Sequence[tuple[float, int, str]], row: int, word: str, **style: Any) -> None:
    if not marks:
        return
    times_s, iterations, texts = zip(*sorted(marks), strict=True)
    data = {"x": np.array(times_s) * 1000, "y": [row] * len(marks), "iter": list(iterations), "text": list(texts)}
    size = _SIZES.get(style["marker"], 8)
    drawn = made.scatter("x", "y", source=ColumnDataSource(data), size=size, line_width=2, name=word, **style)
    tooltips = [("", "$name"), ("iteration", "@iter{0,0}"), ("", "@text")]
    made.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips))


def _draw_incidents(made: figure, incidents: Sequence[Incident]) -> None:
    """Draw a line through all rows at every incident, and its number at the top."""
    if not incidents:
        return
    x = np.array([each.time for each in incidents]) * 1000
    made.vspan(x=x, color=GREY, line_dash="dashed", line_width=1)
    data = {
        "x": x,
        "y": [0] * len(incidents),
        "number": [str(n) for n, _ in enumerate(incidents, 1)],
        "cause": [each.cause for each in incidents],
        "where": [each.where or "-" for each in incidents],
        "iter": [each.iter_num for each in incidents],
        "total": [duration(each.total_s) for each in incidents],
        "mostly": [_longest_phases(each) for each in incidents],
        "repeated": [each.steps_repeated for each in incidents],
        "text": [each.text for each in incidents],
    }
    source = ColumnDataSource(data)
    drawn = made.scatter("x", "y", source=source, marker="circle", size=19, color=VERMILLION)
    made.text(
        "x",
        "y",
        "number",
        source=source,
        text_color="white",
        text_font_size="11px",
        text_font_style="bold",
        text_align="center",
        text_baseline="middle",
    )
    names = ("cause", "where", "iter", "total", "mostly", "repeated", "text")
    made.add_tools(HoverTool(renderers=[drawn], tooltips=[("incident", "@number"), *((n, f"@{n}") for n in names)]))


def _longest_phases(incident: Incident) -> str:
    """Return where most of an incident's time went; a tooltip has no room for all phases."""
    longest = sorted(incident.phases.items(), key=lambda phase: -phase[1])[:3]
    return ", ".join(f"{name.replace('_', '-')} {seconds:.2f} s" for name, seconds in longest)

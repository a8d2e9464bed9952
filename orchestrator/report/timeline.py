"""The timeline of a run: nodes and ranks as rows, their time as coloured stretches, checkpoints and incidents above."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, Range1d
from bokeh.plotting import figure

from orchestrator.report.curves import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, YELLOW
from orchestrator.report.presences import Presence, evaluations_of, presences_of
from orchestrator.report.run import Run
from orchestrator.report.thinning import Array
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
_MAX_BARS = 30_000  # of about 40 bytes on the page
_MAX_IN_MEMORY = 150  # marks that lie apart on a screen; a run may keep a state of every iteration
_MAX_NUMBERED = 50  # incidents whose numbers have room beside each other
_SIZES = {"square": 4, "diamond": 12, "x": 12}
_ABOVE = ("incidents", "checkpoints", "run")


def timeline_of(run: Run) -> figure | None:
    """Return the figure, None where no time has passed."""
    stretches = run.ledger.stretches
    if not stretches:
        return None
    presences = presences_of(run.records)
    names = _row_names(presences)
    rows = [*_ABOVE, *dict.fromkeys(names.values())]
    made = _empty(rows)
    of_run = (rows.index("run"), stretches[0].begin_s, stretches[-1].end_s)
    numbers = {name: n for n, name in enumerate(rows)}
    # of the ranks that share a row and were there at the same time, one is drawn
    placed = {of_run, *((numbers[names[each.node, each.rank]], each.begin_s, each.end_s) for each in presences)}
    evaluations = evaluations_of(run.records.metrics)
    bars = {
        entry: _bars(
            evaluations if entry == "evaluation" else [each for each in stretches if each.entry == entry], placed
        )
        for entry in COLORS
    }
    for entry, drawn in _longest(bars).items():
        _draw(made, entry, drawn)
    _draw_checkpoints(made, run)
    _draw_incidents(made, run.ledger.incidents)
    return made


def _row_names(presences: Sequence[Presence]) -> dict[tuple[str, int], str]:
    """Return the name of the row for each rank on each node, node by node in the order in which they came."""
    nodes = {node: n for n, node in enumerate(dict.fromkeys(each.node for each in presences))}
    seats = sorted({(each.node, each.rank) for each in presences}, key=lambda seat: (nodes[seat[0]], seat[1]))
    short = _without_domain(list(nodes))

    def name_of(node: str, rank: int) -> str:
        if not node:
            return f"rank {rank}"
        return short[node] if len(seats) > _MAX_RANKS else f"{short[node]} · rank {rank}"

    return {seat: name_of(*seat) for seat in seats}


def _without_domain(nodes: Sequence[str]) -> dict[str, str]:
    """Return node -> its host name without the domain, unless two would be one or they are addresses."""
    short = {node: node.partition(".")[0] for node in nodes}
    is_enough = len(set(short.values())) == len(short) and not any(each.isdigit() for each in short.values())
    return short if is_enough else {node: node for node in nodes}


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


def _bars(stretches: Sequence[Stretch], placed: Collection[tuple[int, float, float]]) -> Array:
    """Return the parts of stretches, given by time, in which somebody was in a row: (N, 3), row, begin and end.

    placed: row, begin and end of each presence.
    """
    begin = np.array([each.begin_s for each in stretches])
    end = np.array([each.end_s for each in stretches])
    found = [np.empty((0, 3))]
    for row, begin_s, end_s in placed:
        its = slice(np.searchsorted(end, begin_s, side="right"), np.searchsorted(begin, end_s))
        left, right = np.maximum(begin[its], begin_s), np.minimum(end[its], end_s)
        found.append(np.column_stack([np.full(len(left), row), left, right]))
    bars = np.concatenate(found)
    return bars[bars[:, 2] > bars[:, 1]]


def _longest(bars: dict[str, Array]) -> dict[str, Array]:
    """Return the bars of each entry, without the shortest of all where there are too many for a browser."""
    lengths = np.concatenate([each[:, 2] - each[:, 1] for each in bars.values()])
    if len(lengths) <= _MAX_BARS:
        return bars
    at_least_s = np.partition(lengths, -_MAX_BARS)[-_MAX_BARS]
    return {entry: each[each[:, 2] - each[:, 1] >= at_least_s] for entry, each in bars.items()}


def _draw(made: figure, entry: str, bars: Array) -> None:
    if not len(bars):
        return
    y, left, right = bars.T
    tops, bottoms, seconds = (each.astype(np.float32) for each in (y - 0.36, y + 0.36, right - left))
    source = ColumnDataSource(
        {"left": left * 1000, "right": right * 1000, "top": tops, "bottom": bottoms, "s": seconds}
    )
    style = {"fill_color": COLORS[entry], "line_color": COLORS[entry], "line_width": 0.5}
    drawn = made.quad("left", "right", "top", "bottom", source=source, name=WORDS[entry], **style)
    tooltips = [("", "$name"), ("from", "@left{%m-%d %H:%M:%S}"), ("seconds", "@s{0,0.0}")]
    made.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, formatters={"@left": "datetime"}, limit=1))


def _draw_checkpoints(made: figure, run: Run) -> None:
    saved, rescued, skipped, failed = [], [], [], []
    for stamped in [*run.records.metrics, *run.records.events]:
        match stamped.record:
            case CheckpointSaved(iter=it, name=name, seconds=seconds):
                saved.append((stamped.time_s, it, f"{name}, uploaded in {seconds or 0.0:.2f} s"))
            case CheckpointFailed(iter=it, name=name, why=why):
                failed.append((stamped.time_s, it, f"{name}: {why}"))
            case CheckpointSkipped(iter=it, name=name, why=why):
                skipped.append((stamped.time_s, it, f"{name}: {why}"))
            case Failure(reached_iter=int(it), reached_at_s=reached_s):
                rescued.append((reached_s or stamped.time_s, it, "rescued into node memory"))
    kept = _kept_in_memory(run)
    for marks, (word, (marker, _, color)) in zip((kept, saved, rescued, skipped, failed), MARKS.items(), strict=True):
        _draw_marks(made, marks, _ABOVE.index("checkpoints"), word, marker=marker, color=color)


def _kept_in_memory(run: Run) -> list[tuple[float, int, str]]:
    """Return a mark for each part of the run's time in which states were copied into node memory."""
    begin_s, end_s = run.ledger.stretches[0].begin_s, run.ledger.stretches[-1].end_s
    windows = sorted(
        ((x.time_s, x.record) for x in run.records.metrics if isinstance(x.record, StepWindow)),
        key=lambda each: each[0],
    )
    found: list[tuple[float, int, str]] = []
    for _, part in groupby(windows, lambda each: int((each[0] - begin_s) / (end_s - begin_s) * _MAX_IN_MEMORY)):
        of_part = list(part)
        if kept := sum(each.snapshots or 0 for _, each in of_part):
            time_s, last = of_part[-1]
            found.append(
                (time_s, last.iter, f"{kept:,} in the last {sum(each.count or 0 for _, each in of_part):,} iterations")
            )
    return found


def _draw_marks(made: figure, marks: Sequence[tuple[float, int, str]], row: int, word: str, **style: Any) -> None:
    if not marks:
        return
    times_s, iterations, texts = zip(*sorted(marks), strict=True)
    data = {"x": np.array(times_s) * 1000, "y": [row] * len(marks), "iter": list(iterations), "text": list(texts)}
    size = _SIZES.get(style["marker"], 8)
    drawn = made.scatter("x", "y", source=ColumnDataSource(data), size=size, line_width=2, name=word, **style)
    tooltips = [("", "$name"), ("iteration", "@iter{0,0}"), ("", "@text")]
    made.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, limit=1))


def _draw_incidents(made: figure, incidents: Sequence[Incident]) -> None:
    """Draw a line through all rows at every incident, and its number at the top; many are dots and faint lines."""
    if not incidents:
        return
    x = np.array([each.time for each in incidents]) * 1000
    is_numbered = len(incidents) <= _MAX_NUMBERED
    made.vspan(x=x, color=GREY, line_dash="dashed", line_width=1, line_alpha=1.0 if is_numbered else 0.25)
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
    drawn = made.scatter("x", "y", source=source, marker="circle", size=19 if is_numbered else 6, color=VERMILLION)
    if is_numbered:
        font = {"text_color": "white", "text_font_size": "11px", "text_font_style": "bold"}
        made.text("x", "y", "number", source=source, text_align="center", text_baseline="middle", **font)
    names = ("cause", "where", "iter", "total", "mostly", "repeated", "text")
    tooltips = [("incident", "@number"), *((n, f"@{n}") for n in names)]
    made.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, limit=1))


def _longest_phases(incident: Incident) -> str:
    """Return where most of an incident's time went; a tooltip has no room for all phases."""
    longest = sorted(incident.phases.items(), key=lambda phase: -phase[1])[:3]
    return ", ".join(f"{name.replace('_', '-')} {seconds:.2f} s" for name, seconds in longest)

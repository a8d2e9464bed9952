"""Curves over iterations: losses, learning rate, gradient norm, speed. Several runs lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import DataRange1d, HoverTool, NumeralTickFormatter, PrintfTickFormatter
from bokeh.plotting import figure

from orchestrator.report.run import Run
from orchestrator.report.thinning import Array, percentiles, smooth, thin

# Okabe and Ito's colours, which colour-blind people can tell apart; the blue is a little lighter, for dark pages.
# Source: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, YELLOW = (
    *("#1A7FC4", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"),
)
GREY = "#808894"  # readable on a light and on a dark page
OF_RUNS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_MAX_LABEL = 36  # characters
_TOOLS = "xpan,box_zoom,xwheel_zoom,reset,save"
_PERCENTILES = (50, 95, 99)


def curves_of(runs: Sequence[Run]) -> dict[str, figure]:
    """Return the figures that there are numbers for, by name; they zoom together."""
    x_range = DataRange1d(range_padding=0.01)
    figures = {
        "loss": _losses(runs, x_range),
        "lr": _over_iterations("learning rate", x_range, PrintfTickFormatter(format="%.1e")),
        "grad_norm": _over_iterations("gradient norm, before clipping", x_range),
        "tokens_per_s": _over_iterations("tokens per second", x_range, NumeralTickFormatter(format="0,0")),
        "mfu": _over_iterations("MFU, percent", x_range),
        "tflops": _over_iterations("TFLOP/s per GPU", x_range),
        "dt_s": _step_times(runs, x_range),
    }
    for name in ("lr", "grad_norm", "tokens_per_s", "mfu", "tflops"):
        for n, run in enumerate(runs):
            factor = 100 if name == "mfu" else 1
            _curve(figures[name], run, run.steps["iter"], run.steps[name] * factor, OF_RUNS[n % len(OF_RUNS)])
    if figures["mfu"].renderers:
        del figures["tflops"]  # the same curve
    return {name: each for name, each in figures.items() if each.renderers}


def label_of(run: Run) -> str:
    """Return the end of a run's name, as a picture has room for it. Bokeh takes a text between two $$ for a formula."""
    name = run.name if len(run.name) <= _MAX_LABEL else f"…{run.name[-_MAX_LABEL:]}"
    return name.replace("$$", "$ $")


def _over_iterations(title: str, x_range: DataRange1d, ticks: Any = None, height: int = 230) -> figure:
    made = figure(
        title=title,
        x_range=x_range,
        window_axis="x",  # the other axis fits what is in sight
        height=height,
        sizing_mode="stretch_width",
        tools=_TOOLS,
        active_drag="box_zoom",
        x_axis_label="iteration",
    )
    made.xaxis.formatter = NumeralTickFormatter(format="0,0")
    if ticks:
        made.yaxis.formatter = ticks
    made.toolbar.autohide, made.toolbar.logo = True, None
    return made


def _losses(runs: Sequence[Run], x_range: DataRange1d) -> figure:
    made = _over_iterations("loss", x_range, height=380)
    is_alone = len(runs) == 1
    labels = [label_of(run) for run in runs]
    for n, run in enumerate(runs):
        color, label = OF_RUNS[n % len(OF_RUNS)], labels[n]
        # of several runs the legend has one word each, for all that is drawn of it
        of_run = "" if is_alone else label if labels.count(label) == 1 else f"{label} ({n + 1})"
        if len(run.undone_steps["iter"]):
            x, y = _with_gaps(run.undone_steps["iter"], run.undone_steps["loss"])
            style = {"color": GREY, "alpha": 0.7, "legend_label": of_run or "computed again"}
            _line(made, x, y, f"{of_run or 'train'}, computed again", **style)
        width = 2 + 3 * (len(runs) - 1 - n)
        _curve(made, run, run.steps["iter"], run.steps["loss"], color, of_run or "train", width=width)
        _evaluations(made, run, VERMILLION if is_alone else color, of_run)
        _marks(made, run, of_run)
    if made.renderers:
        _hover(made, "loss", "0.0000")
        made.legend.click_policy = "hide"
        made.legend.background_fill_alpha = made.legend.border_line_alpha = 0.0
    return made


def _curve(made: figure, run: Run, x: Array, y: Array, color: str, name: str = "", width: float = 2) -> None:
    """Draw values as they are, faintly, and their running mean; a wide line is seen below the next run's."""
    if np.isnan(y).all():
        return
    label = name or label_of(run)
    legend = {"legend_label": label} if name else {}
    is_long = len(y) >= 50
    alpha = 1.0 if not is_long else 0.35 if len(y) < 2000 else 0.15  # where lines lie on each other, less
    raw = _line(made, x, y, label, color=color, alpha=alpha, line_width=width / 2, **legend)
    if is_long:
        _line(made, x, smooth(y, max(5, len(y) // 100)), label, color=color, line_width=width, **legend)
    if not name:
        made.add_tools(
            HoverTool(renderers=[raw], mode="vline", tooltips=[("run", "$name"), ("iteration", "@x{0,0}"), ("", "@y")])
        )


def _line(made: figure, x: Array, y: Array, name: str, **style: Any) -> Any:
    x, y = thin(x, y)
    return made.line(x.astype(np.int32) if not np.isnan(x).any() else x, y.astype(np.float32), name=name, **style)


def _hover(made: figure, what: str, digits: str) -> None:
    tooltips = [("", "$name"), ("iteration", "@x{0,0}"), (what, f"@y{{{digits}}}")]
    renderers = [each for each in made.renderers if "y" in each.data_source.data]
    made.add_tools(HoverTool(renderers=renderers, tooltips=tooltips))


def _evaluations(made: figure, run: Run, color: str, of_run: str) -> None:
    if not run.evaluations:
        return
    x = np.array([each.iter for each in run.evaluations], dtype=np.float64)
    y = np.array([each.val_loss for each in run.evaluations])
    name, legend = f"{of_run}, validation".removeprefix(", "), of_run or "validation"
    _line(made, x, y, name, color=color, line_width=2, line_dash=[6, 3], legend_label=legend)
    if len(x) <= 200:
        made.scatter(x, y, size=5, color=color, legend_label=legend, name=name)
    if run.best:
        label = of_run or f"best: {run.best.val_loss:.4f}"
        style = {"marker": "star", "size": 17, "line_color": GREY, "fill_color": YELLOW}
        made.scatter([run.best.iter], [run.best.val_loss], name=f"{name}, best", legend_label=label, **style)


def _marks(made: figure, run: Run, of_run: str) -> None:
    """Mark what was undone, the steps that were skipped, and where the run was when something failed."""
    if run.rollbacks:
        left, right = [each.to_iter for each in run.rollbacks], [each.iter for each in run.rollbacks]
        style = {"fill_color": VERMILLION, "fill_alpha": 0.12, "line_alpha": 0}
        made.vstrip(x0=left, x1=right, legend_label=of_run or "rolled back", **style)
    if run.skipped_steps:
        style = {"color": ORANGE, "alpha": 0.8, "line_dash": "dotted"}
        made.vspan(x=[each.iter for each in run.skipped_steps], legend_label=of_run or "step skipped", **style)
    if failures := [each.iter_num for each in run.ledger.incidents if each.cause != "bad_numbers"]:
        made.vspan(x=failures, color=GREY, line_dash="dashed", legend_label=of_run or "failure")


def _with_gaps(x: Array, y: Array) -> tuple[Array, Array]:
    """Break the line where an iteration does not follow the one before: there, another attempt begins."""
    breaks = np.flatnonzero(np.diff(x) <= 0) + 1
    return np.insert(x, breaks, np.nan), np.insert(y, breaks, np.nan)


def _step_times(runs: Sequence[Run], x_range: DataRange1d) -> figure:
    made = _over_iterations("milliseconds per step: median, 95th and 99th percentile", x_range)
    for n, run in enumerate(runs):
        color = OF_RUNS[n % len(OF_RUNS)]
        x, found = percentiles(run.steps["iter"], run.steps["dt_s"] * 1000, _PERCENTILES)
        for column, (rank, dash) in enumerate(zip(_PERCENTILES, ("solid", "dashed", "dotted"), strict=True)):
            if len(x):
                _line(made, x, found[:, column], f"{label_of(run)}, {rank}th percentile", color=color, line_dash=dash)
    if made.renderers:
        _hover(made, "ms", "0,0.0")
    return made

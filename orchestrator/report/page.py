"""The page: HTML and CSS of ours around Bokeh's pictures. Whatever users have named or written is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

import numpy as np
from bokeh.embed import components
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.themes import Theme
from jinja2 import Environment

from orchestrator.report.curves import GREY, OF_RUNS, curves_of
from orchestrator.report.run import Run
from orchestrator.report.timeline import COLORS, MARKS, WORDS, timeline_of
from orchestrator.telemetry.goodput import PHASES, Incident, Ledger, duration

GENERATOR = "nanogpt-orchestrator report"  # by it we know our own page again
_MAX_SKIPPED = 50  # stretches of skipped steps in the table
_WITHOUT_PLACE = ("pause", "lost")  # a ledger knows how long they took, not when they were
_FONT = "system-ui, sans-serif"
_THEME = Theme(
    json={
        "attrs": {
            "Plot": {
                "background_fill_alpha": 0.0,
                "border_fill_alpha": 0.0,
                "outline_line_alpha": 0.0,
                "min_border_right": 12,
            },
            "Title": {"text_color": GREY, "text_font": _FONT, "text_font_size": "13px", "text_font_style": "normal"},
            "Grid": {"grid_line_color": GREY, "grid_line_alpha": 0.18},
            "Axis": {
                "axis_line_color": GREY,
                "axis_line_alpha": 0.5,
                "major_tick_line_color": GREY,
                "minor_tick_line_color": None,
                "major_label_text_color": GREY,
                "major_label_text_font": _FONT,
                "axis_label_text_color": GREY,
                "axis_label_text_font": _FONT,
                "axis_label_text_font_style": "normal",
                "axis_label_text_font_size": "12px",
            },
            "Legend": {"label_text_color": GREY, "label_text_font": _FONT, "label_text_font_size": "12px"},
        }
    }
)


def page_of(runs: Sequence[Run]) -> str:
    """Return the page of a run or, with their curves on each other, of several; it loads nothing."""
    curves = curves_of(runs)
    timelines = {f"timeline{n}": made for n, run in enumerate(runs) if (made := timeline_of(run))}
    script, divs = _drawn({**curves, **timelines})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    resources = Resources(mode="inline", components=["bokeh"])
    return template.render(
        generator=GENERATOR,
        title=" and ".join(run.name for run in runs),
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        bokeh_script="\n".join(resources.js_raw),
        draw_script=script,
        curves={name: divs[name] for name in curves},
        legend=[*(("■", COLORS[entry], word) for entry, word in WORDS.items() if entry not in _WITHOUT_PLACE)]
        + [(sign, color, word) for word, (_, sign, color) in MARKS.items()],
        different_settings=_different_settings(runs),
        runs=[
            {
                "run": run,
                "color": OF_RUNS[n % len(OF_RUNS)],
                "timeline": divs.get(f"timeline{n}", ""),
                "tiles": _tiles(run),
                "parts": _parts(run.ledger),
                "incidents": [_incident(each, run.ledger) for each in run.ledger.incidents],
                "step_times": _step_times(run),
                "skipped": _skipped(run)[:_MAX_SKIPPED],
                "n_skipped": len(_skipped(run)),
            }
            for n, run in enumerate(runs)
        ],
    )


def _drawn(figures: dict[str, figure]) -> tuple[str, dict[str, str]]:
    """Return the script that draws the figures, and by name the elements in which it does so."""
    if not figures:
        return "", {}
    script, divs = components(figures, theme=_THEME)
    return str(script), dict(divs)


def _tiles(run: Run) -> dict[str, str]:
    """Return the numbers that one looks for first: name -> text."""
    ledger, begin = run.ledger, run.begins[-1] if run.begins else None
    of = f" of {begin.max_iters:,}" if begin and begin.max_iters else ""
    last = next((float(x) for x in run.steps["loss"][::-1] if not np.isnan(x)), None)
    tiles = {"iterations": f"{ledger.iter_num:,}{of}"}
    if run.best:
        tiles["best validation loss"] = f"{run.best.val_loss:.4f} at {run.best.iter:,}"
    if last is not None:
        tiles["last training loss"] = f"{last:.4f}"
    tiles |= {
        "goodput": f"{ledger.goodput:.1%}",
        "time": duration(ledger.wall_s),
        "failures": str(len(ledger.incidents)),
    }
    if begin and begin.world_size:
        tiles["workers"] = f"{begin.world_size}, {(begin.device or '').partition(':')[0]}"
    return tiles


def _parts(ledger: Ledger) -> list[dict[str, str]]:
    """Return the parts of the bar in which goodput is the first."""
    wall_s = ledger.wall_s or 1.0
    return [
        {
            "name": "training and evaluation" if entry == "productive" else WORDS[entry],
            "color": COLORS[entry],
            "time": duration(seconds),
            "percent": f"{seconds / wall_s:.4%}",
            "rounded": f"{seconds / wall_s:.2%}",
        }
        for entry, seconds in ledger.seconds.items()
        if seconds > 0
    ]


def _incident(incident: Incident, ledger: Ledger) -> dict[str, object]:
    longest_s = max((each.total_s for each in ledger.incidents), default=0.0) or 1.0
    return {
        "of": incident,
        "when": f"{datetime.fromtimestamp(incident.time, UTC):%Y-%m-%d %H:%M:%S}",
        "total": f"{incident.total_s:.2f} s",
        "lost": duration(incident.steps_repeated * (ledger.median_s or 0.0)) if incident.steps_repeated else "",
        "phases": [
            {"name": name.replace("_", "-"), "time": f"{s:.2f} s", "percent": f"{s / longest_s:.4%}", "n": n}
            for n, name in enumerate(PHASES)
            if (s := incident.phases.get(name, 0.0)) > 0
        ],
    }


def _step_times(run: Run) -> dict[str, str]:
    seconds = run.steps["dt_s"][~np.isnan(run.steps["dt_s"])]
    if not len(seconds):
        return {}
    found = np.percentile(seconds, (50, 90, 95, 99, 100)) * 1000
    return {
        name: f"{ms:,.1f} ms" for name, ms in zip(("median", "90th", "95th", "99th", "longest"), found, strict=True)
    }


def _skipped(run: Run) -> list[tuple[int, int, str]]:
    """Return skipped steps in a row as one: first iteration, last iteration, why."""
    found: list[tuple[int, int, str]] = []
    for step in run.skipped_steps:
        if found and step.iter == found[-1][1] + 1:
            found[-1] = (found[-1][0], step.iter, found[-1][2])
        else:
            found.append((step.iter, step.iter, step.why or ""))
    return found


def _different_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs: key -> text per run, "" for the default."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = {key: [run.settings.get(key, "") for run in runs] for key in keys}
    return {key: texts for key, texts in rows.items() if len(set(texts)) > 1}

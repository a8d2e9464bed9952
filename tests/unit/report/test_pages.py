"""Pages in a real browser: they draw, complain of nothing, ask no network, and run nothing that users have named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.browser import Browser, Page
from benchmarks.look import write_run
from orchestrator.commands.report import ReportConfig, report
from orchestrator.config import TrainConfig
from tests.support.pages import train_and_kill, train_and_roll_back, train_calmly

CURVES = ["loss", "lr", "grad_norm", "tokens_per_s", "dt_s"]
_PIXELS = """(() => {
    const inside = root => [...root.querySelectorAll("*")].flatMap(
        each => [each, ...(each.shadowRoot ? inside(each.shadowRoot) : [])]);
    return inside(document.querySelector("SELECTOR")).filter(each => each.tagName == "CANVAS" && each.width).map(
        canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.filter(
            (x, n) => n % 4 == 3 && x > 0).length).reduce((a, b) => a + b, 0);
})()"""
# What the page's tooltips say, and where on the page the first mark is whose data have a column
_FUNCTIONS = """
    window.text = root => [...root.childNodes].map(each => each.nodeType == 3 ? each.textContent
        : each.tagName == "STYLE" ? "" : (each.shadowRoot ? text(each.shadowRoot) : "") + text(each)).join(" ");
    window.tooltips = () => [...Bokeh.index].flatMap(view => [...view.el.parentNode.querySelectorAll(".bk-Tooltip"),
        ...view.shadow_el.querySelectorAll(".bk-Tooltip")]).map(each => text(each.shadowRoot ?? each));
    window.place_of = column => {
        for (const view of Bokeh.index) for (const each of view.model.renderers ?? []) {
            const data = each.data_source.data;
            if (!(data.has ? data.has(column) : column in data)) continue;
            const [x, y] = ["x", "y"].map(name => data.get ? data.get(name) : data[name]);
            const at = view.el.getBoundingClientRect(), n = (x.length - 1) >> 1;
            return [at.left + view.frame.x_scale.compute(x[n]), at.top + view.frame.y_scale.compute(y[n])];
        }
    };
"""


def hover(page: Page, column: str) -> None:
    """Move the mouse over the first picture's mark whose data have this column."""
    page.value(_FUNCTIONS)
    page.move_mouse(*page.value(f"place_of('{column}')"))


def pixels(page: Page, selector: str) -> int:
    """Return how many are not transparent, on all canvases of a figure together."""
    return int(page.value(_PIXELS.replace("SELECTOR", selector)))


def assert_drawn(page: Page, curves: list[str]) -> None:
    """Check that every figure has curves, and that the browser has complained of nothing and asked nobody."""
    assert page.value("[...document.querySelectorAll('.card.plot[id]')].map(each => each.id)") == curves
    for selector in [*(f"#{name}" for name in curves), ".timeline"]:
        assert pixels(page, selector) > 2000, selector
    assert page.complaints() == []
    assert page.requests() == []


@pytest.mark.parametrize(
    ("train", "told"),
    [
        pytest.param(train_calmly, ["24 of 24", "best validation loss"], marks=pytest.mark.slow),
        (train_and_kill, ["worker_lost", "its process was killed or has crashed", "Incidents"]),
        pytest.param(
            train_and_roll_back,
            ["rolled back to iteration", "3 step(s) skipped", "bad_numbers"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["calm", "killed", "rolled back"],
)
def test_the_page_of_a_run(
    train: Callable[[TrainConfig, Path], None],
    told: list[str],
    tiny: TrainConfig,
    tmp_path: Path,
    page_file: Path,
    browser: Browser,
) -> None:
    train(tiny, tmp_path / "log")
    assert report(ReportConfig(tiny.out_dir, html=str(page_file))).startswith(f"wrote {page_file} (1.")
    page = browser.open(page_file)
    assert_drawn(page, CURVES)
    text = page.value("document.body.innerText")
    for words in [*told, "orchestrator sample --out_dir=", "n_embd", "checkpoint_00000024_"]:
        assert words in text
    assert ("Not everything could be read" in text) == (train is not train_and_kill)  # the others have no events
    page.close()


def test_what_users_have_named_is_shown_and_does_not_run(tmp_path: Path, browser: Browser) -> None:
    attack = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>$$x^2$$"
    run = tmp_path / attack
    write_run(run, 400)
    events = (run / "events.jsonl").read_text()
    for word in ("gpu-b", "its process was killed or has crashed"):
        events = events.replace(word, attack)
    (run / "events.jsonl").write_text(events)
    file = tmp_path / "report.html"
    report(ReportConfig(str(run), html=str(file), compare=str(run)))
    page = browser.open(file, height=6000)
    assert pixels(page, "#loss") > 2000
    # an incident, and a curve, which bears the run's name
    for column, beside in (("number", "cause"), ("y", "iteration")):
        hover(page, column)
        page.wait_until(f"tooltips().some(each => each.includes('window.hit') && each.includes('{beside}'))")
    assert page.value("window.hit") is None
    assert page.complaints() == []
    assert page.requests() == []
    page.close()


def test_hovering_tells_of_an_incident(tmp_path: Path, page_file: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", 2000)
    report(ReportConfig(str(tmp_path / "run"), html=str(page_file)))
    page = browser.open(page_file, height=4000)
    assert_drawn(page, ["loss", "lr", "grad_norm", "tokens_per_s", "mfu", "dt_s"])
    hover(page, "number")
    page.wait_until("tooltips().some(each => ['worker_lost', 'gpu-b', 'set-up 3.00 s'].every(x => each.includes(x)))")
    page.close()

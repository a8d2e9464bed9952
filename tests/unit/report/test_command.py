"""`report --html`: what it shows of records that are damaged or old, where it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser import Browser
from benchmarks.look import write_run
from orchestrator.__main__ import main
from orchestrator.commands import report_page
from orchestrator.commands.report import ReportConfig, report
from orchestrator.commands.report_page import write_at_end
from orchestrator.config import TrainConfig
from orchestrator.driver import launch
from orchestrator.driver.resubmit import LOST
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.orphans import delete_orphans
from orchestrator.storage.run_folder import RunFolder
from orchestrator.worker import plain
from tests.support.commands import flags


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", 200)
    return tmp_path / "run"


def page_of(run: Path, file: Path, **more: Any) -> str:
    report(ReportConfig(str(run), html=str(file), **more))
    return file.read_text()


def without_tags(page: str) -> str:
    return re.sub(r"<[^>]*>", "", page.partition("<main>")[2])


def test_damaged_records_are_left_out_and_counted(run: Path, page_file: Path, browser: Browser) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    damaged = [
        lines[3][:20],
        '{"kind": "step", "iter": "five", "attempt": "a", "time": 1.7e9}',
        '{"kind": "step", "iter": 6, "attempt": "a", "time": 1.7e9, "loss": ["no number"]}',
        '{"kind": "step", "iter": 7, "attempt": "a", "time": 1e300}',
        '{"kind": "of a newer version", "iter": 8, "attempt": "a", "time": 1.7e9}',
        "[" * 100_000,
    ]
    metrics.write_text("\n".join([*lines[:3], *damaged, *lines[3:], '{"kind": "step", "it']))
    (run / "events.jsonl").write_bytes(b"\xff\xfe\x00nothing")
    (run / "run.json").write_text('{"config": [')
    text = without_tags(page_of(run, page_file))
    assert "metrics.jsonl: 7 line(s) are cut off, damaged, or of a newer version, and left out." in text
    assert "events.jsonl: 1 line(s)" in text
    assert "There are no events" in text
    assert "run.json is missing or damaged." in text
    page = browser.open(page_file)
    assert page.value("[...document.querySelectorAll('.card.plot[id]')].length") == 6
    assert page.complaints() == []
    page.close()


@pytest.mark.parametrize(
    ("kind", "key", "damaged", "is_left_out"),
    [
        ("step", "loss", 10**400, True),
        ("eval", "val_loss", 10**400, True),
        ("begin", "restore_s", 10**400, True),
        ("failure", "reached_iter", 10**400, True),
        ("failure", "ranks", [[1]], True),
        ("failure", "reached_at_s", -(2**40), True),
        ("failure", "reached_at_s", math.nan, False),
        ("failure", "cause", None, False),
        ("step", "loss", math.inf, False),
        ("steps", "count", None, False),
    ],
    ids=lambda each: str(each)[:12],
)
def test_damaged_values_give_a_report_of_the_rest(
    run: Path, page_file: Path, kind: str, key: str, damaged: Any, *, is_left_out: bool
) -> None:
    count = 0
    for file in (run / "metrics.jsonl", run / "events.jsonl"):
        values = [json.loads(line) for line in file.read_text().splitlines()]
        for value in values:
            if value["kind"] == kind:
                value[key], count = damaged, count + 1
        file.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert " iterations in " in report(ReportConfig(str(run)))
    text = without_tags(page_of(run, page_file))
    assert (f"{count} line(s) are cut off, damaged" in text) == is_left_out


def test_half_written_numbers_are_gaps(run: Path, page_file: Path) -> None:
    metrics = run / "metrics.jsonl"
    values = [json.loads(line) for line in metrics.read_text().splitlines()]
    for value in values:
        for key in ("loss", "mfu", "step_s", "val_loss", "reached_at_s"):
            if key in value:
                value[key] = None
    metrics.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert "Curves" in without_tags(page_of(run, page_file))


def test_records_of_the_first_version(tmp_path: Path, page_file: Path) -> None:
    run = tmp_path / "old"
    run.mkdir()
    lines = [{"kind": "begin", "iter": 0}, *({"kind": "step", "iter": it, "loss": 3.0 - it / 10} for it in range(9))]
    lines += [{"kind": "eval", "iter": 9, "val_loss": 2.5}, {"kind": "rollback", "iter": 9, "to_iter": 4}]
    lines += [{"kind": "checkpoint", "iter": 9}, {"kind": "step_skipped", "iter": 8}, {"kind": "steps", "iter": 9}]
    stamped = [{"attempt": "a", "time": 1.7e9 + n, **line} for n, line in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stamped))
    events = [{"kind": "failure", "iter": 0, "attempt": "d", "time": 1.7e9 + 20}, {"kind": "attempt_running"}]
    events += [{"kind": "driver_started"}, {"kind": "driver_ended"}, {"kind": "attempt_ended"}]
    stamped = [{"iter": 0, "attempt": "d", "time": 1.7e9 + 20 + n, **event} for n, event in enumerate(events)]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stamped))
    assert "2.5000 at 9" in without_tags(page_of(run, page_file))


def test_a_folder_without_records_has_no_page(tmp_path: Path, page_file: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no records of a run"):
        page_of(tmp_path, page_file)
    assert not page_file.exists()


def test_only_a_report_of_ours_is_replaced(run: Path, page_file: Path) -> None:
    page_file.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no report of ours: give another --html, or --overwrite=True"):
        page_of(run, page_file)
    assert page_file.read_text() == "mine"
    first = page_of(run, page_file, overwrite=True)
    assert page_of(run, page_file)[:500] == first[:500]
    with pytest.raises(ConfigError, match="is a folder: give the file to write"):
        page_of(run, run)


def test_a_page_can_go_to_any_storage(run: Path) -> None:
    report(ReportConfig(str(run), html="memory://pages/report.html"))
    page = RunFolder("memory://pages").read("report.html")
    assert page
    assert b"nanogpt-orchestrator report" in page[:1000]


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"compare": "other"}, "give --html=FILE too"), ({"html": "x.html", "json": True}, "give one of them")],
)
def test_words_that_do_not_go_together(run: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        report(ReportConfig(str(run), **settings))


def test_without_the_extra_the_command_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "orchestrator.report.page", raising=False)
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(ConfigError, match=r"pip install 'nanogpt-orchestrator\[report\]'"):
        report(ReportConfig(str(run), html="x.html"))


def test_settings_that_differ(run: Path, tmp_path: Path, page_file: Path) -> None:
    write_run(tmp_path / "other", 200)
    known = json.loads((run / "run.json").read_text())
    known["config"] |= {"learning_rate": 6e-4, "storage_options": "(given inline)", "dropout": 0.1}
    (run / "run.json").write_text(json.dumps(known))
    text = without_tags(page_of(run, page_file, compare=str(tmp_path / "other")))
    differ = text.partition("Settings that differ")[2].partition("Timeline")[0]
    assert "dropout" in differ
    assert "learning_rate" not in text, "it is the default"
    assert "max_iters" not in differ, "it is the same in both"


def test_a_run_writes_its_page_at_its_end(run: Path) -> None:
    assert write_at_end(TrainConfig(out_dir=str(run))) == f"{run}/report.html"
    assert "200 of 200" in without_tags((run / "report.html").read_text())
    assert write_at_end(TrainConfig(out_dir=str(run), eval_only=True)) is None
    assert write_at_end(TrainConfig(out_dir=str(run / "not begun"))) is None


def interrupt(_config: TrainConfig) -> str:
    raise KeyboardInterrupt


@pytest.mark.parametrize("write", [lambda _config: "run/report.html", interrupt], ids=["written", "Ctrl-C"])
@pytest.mark.parametrize(
    ("error", "code"), [(launch.RunFailedError, 1), (launch.RunLostError, LOST), (launch.InterruptedRunError, 130)]
)
def test_the_page_never_hides_how_a_run_ended(
    error: type[Exception], code: int, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_plan: object) -> None:
        raise error("it has failed")

    monkeypatch.setattr("orchestrator.driver.preflight.plan", lambda config: config)
    monkeypatch.setattr(launch, "run", fails)
    monkeypatch.setattr(report_page, "write_at_end", write)
    read, written = os.pipe()
    os.close(read)  # as of `| head`, which has ended
    with os.fdopen(written, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["train"]) == code
    assert ("error: it has failed" in capsys.readouterr().err) == (code != 130)


def test_what_a_killed_driver_leaves_of_a_page_is_deleted(run: Path) -> None:
    half = run / ".report.html.0a1b2c3d.tmp"
    half.write_text("<!doct")
    delete_orphans(RunFolder(str(run)))
    assert not half.exists()


def test_a_page_that_cannot_be_written_fails_no_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_args: Any, **_options: Any) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(report_page, "write_page", breaks)
    assert write_at_end(TrainConfig(out_dir=str(run))) is None
    (told,) = caplog.messages
    assert told.startswith("report.html was not written (")
    assert "a bug" in told


def test_adapters_and_their_base_model_are_told(adapters: TrainConfig, tmp_path: Path) -> None:
    assert plain.main(flags(adapters, max_iters=2, eval_interval=2, num_workers=1)) == 0
    told = without_tags(page_of(Path(adapters.out_dir), tmp_path / "page.html"))
    assert "LoRA of rank 2, alpha 16, on attn.c_attn" in told
    assert f"{adapters.init_from} at checkpoint_00000002_" in told
    assert re.search(r"[\d,]+, [\d,]+ of them trained", told)

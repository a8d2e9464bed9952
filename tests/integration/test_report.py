"""The page of a real run on Ray, of which a worker is killed: `train` writes it, and a browser draws it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.browser import Browser
from benchmarks.loss_curves import train
from benchmarks.same_bits import ROOT
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import read_events
from orchestrator.telemetry.records import AttemptRunning
from tests.support.ray_runs import causes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_ray_writes_a_page_that_tells_of_a_kill(tmp_path: Path, browser: Browser) -> None:
    prepare = [sys.executable, "-m", "orchestrator", "prepare", "quickstart", f"--data_dir={tmp_path}/data"]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    out_dir, log = tmp_path / "run", tmp_path / "log"
    assert len(train(out_dir, 40, [20], log)) == 1
    assert log.read_text().splitlines()[-1] == f"report: {out_dir}/report.html"
    assert causes(str(out_dir)) == ["worker_lost"]
    running = [x.record for x in read_events(RunFolder(str(out_dir))) if isinstance(x.record, AttemptRunning)]
    assert [len(each.nodes or ()) for each in running] == [2, 2]
    page = browser.open(out_dir / "report.html")
    text = page.value("document.body.innerText")
    for words in ("40 of 40", "worker_lost", "its process was killed or has crashed", "rescue", "2, cpu"):
        assert words in text
    assert "Not everything could be read" not in text
    assert page.complaints() == []
    assert page.requests() == []
    page.close()

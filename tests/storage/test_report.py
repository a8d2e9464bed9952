"""The page of a run in a bucket, and in a bucket."""

from __future__ import annotations

import math

from benchmarks.look import records_of
from orchestrator.commands.report import ReportConfig, report
from orchestrator.commands.report_page import write_at_end
from orchestrator.config import TrainConfig
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.records import LoopRecord
from tests.conftest import Storage


def test_a_run_in_a_bucket_has_its_page_there(s3: Storage) -> None:
    folder = RunFolder(s3.url)
    logs = [MetricsLog(folder, "a", stem=stem, flush_interval_s=math.inf) for stem in ("events", "metrics")]
    for stamped in records_of(200):
        logs[isinstance(stamped.record, LoopRecord)].write(stamped)
    for log in logs:
        log.close()
    target = f"{s3.url}/report.html"
    assert report(ReportConfig(s3.url, html=target)).startswith(f"wrote {target} (1.")
    page = folder.read("report.html")
    assert page
    assert b"200 of 200" in page
    assert write_at_end(TrainConfig(out_dir=s3.url)) == target, "it replaces a page of ours"

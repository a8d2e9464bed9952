"""`python -m benchmarks gpu` itself: what fails in it is told, and takes nothing else with it. Needs no GPU."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.__main__ import main
from benchmarks.gpu import gpu, speed
from benchmarks.gpu.child import ROOT, Found, Report, Setting
from benchmarks.gpu.rescue import _told_rescue
from benchmarks.gpu.sections import ENVIRONMENT, SECTIONS, Section
from benchmarks.gpu.state import _tell_pauses
from benchmarks.gpu.watch import watching
from tests.support.acceptance_parts import part

ABSENT = ("ray", "rich", "tyro", "transformers", "tokenizers", "pyarrow", "huggingface_hub")
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def checked(tmp_path: Path, *sections: Section, budget_s: float = 300.0) -> dict[str, Any]:
    """Run sections and return what the file says."""
    file = tmp_path / "found.json"
    acceptance = gpu.Acceptance("cpu", True, budget_s, file)
    acceptance.run(sections)
    found: dict[str, Any] = json.loads(file.read_text())
    assert found == json.loads(json.dumps(acceptance.result))
    return found


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_section_that_hangs_is_ended_at_its_limit_with_all_that_it_has_started(tmp_path: Path) -> None:
    found = checked(tmp_path, part("hang", limit_s=2), part("hold"))
    hung = found["sections"]["hang"]
    assert hung["failed"] == "more than 2 s"
    assert [claim["holds"] for claim in hung["claims"]] == [True], "what it had found before is kept"
    assert is_gone(hung["figures"]["other"])
    assert not any(Path(folder).exists() for folder in hung["figures"]["folders"])
    assert found["sections"]["hold"]["claims"][0]["holds"], "the next one has run"
    assert gpu.exit_code(found) == 1


def test_a_section_that_crashes_takes_nothing_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(tmp_path, part("crash"), part("hold"))
    crashed = found["sections"]["crash"]
    assert crashed["failed"] == "exit code 1"
    assert crashed["figures"] == {"found": 1}
    assert "the driver went away" in crashed["tail"]
    assert found["sections"]["hold"]["claims"] == [{"claim": "two and two are four", "holds": True, "saw": "4"}]
    assert gpu.exit_code(found) == 1
    printed = capsys.readouterr().out
    assert "FAIL  crash" in printed
    assert "the driver went away" in printed
    assert "pass  hold" in printed


def test_all_claims_that_were_tested_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.exit_code(checked(tmp_path, part("hold"), part("unfit"))) == 0
    assert "skip  unfit                     needs two GPUs" in capsys.readouterr().out
    assert gpu.exit_code(checked(tmp_path, part("hold"), part("fail"))) == 1
    assert "FAIL  fail                      two and two are five  [4]" in capsys.readouterr().out


def test_what_the_budget_has_no_time_for_is_no_success(tmp_path: Path) -> None:
    found = checked(tmp_path, replace(part("hold"), expected_s=1000), budget_s=60)
    assert "not begun" in found["sections"]["hold"]["failed"]
    assert gpu.exit_code(found) == 1


def test_time_for_what_is_timed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    class Noted(gpu.Running):
        def __init__(self, section: Section, device: str, is_tiny: bool, limit_s: float) -> None:
            super().__init__(section, device, is_tiny, limit_s)
            limits[section.name] = limit_s

    monkeypatch.setattr(gpu, "Running", Noted)
    timed = replace(part("hold", limit_s=1000), name="timed", is_timed=True, expected_s=570)
    assert gpu.exit_code(checked(tmp_path, part("hold", limit_s=1000), timed, budget_s=600)) == 0
    assert limits["hold"] <= 30, "the budget less what the other one is expected to take"
    assert 500 < limits["timed"] < 600, "all that is left"


def test_sections_that_mean_nothing_on_a_cpu_are_passed_over(tmp_path: Path) -> None:
    found = checked(tmp_path, replace(part("crash"), on_cpu=False))
    assert found["sections"] == {"crash": {"skipped": "needs a GPU"}}


def test_parts_of_a_section_fail_and_hang_by_themselves(tmp_path: Path) -> None:
    found = checked(tmp_path, part("nest"))
    assert found["sections"]["nest"]["figures"] == {"crashed": 1, "hung": "more than 1 s"}
    assert found["holds"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_check_leaves_no_section_behind(tmp_path: Path, number: signal.Signals) -> None:
    file, said = tmp_path / "found.json", tmp_path / "said"
    code = (
        "from benchmarks.gpu import gpu; from tests.support.acceptance_parts import part\n"
        f"from pathlib import Path\nwith gpu.ended_in_order(): gpu.Acceptance('cpu', True, 300, Path({str(file)!r}))"
        ".run([part('hang')])"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with said.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=out, stderr=out)
    while not (reports := [path for path in tmp_path.glob("gpu-hang-*/section.json") if '"other"' in path.read_text()]):
        assert process.poll() is None, said.read_text()
        time.sleep(0.02)
    pid = json.loads(reports[0].read_text())["figures"]["other"]
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert is_gone(pid)
    assert not list(tmp_path.glob("gpu-hang-*"))


def test_the_check_goes_on_where_nobody_reads(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code = (
        "from benchmarks.gpu import gpu; from tests.support.acceptance_parts import part; from pathlib import Path\n"
        f"check = gpu.Acceptance('cpu', True, 300, Path({str(file)!r})); check.run([part('crash'), part('hold')])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert json.loads(file.read_text())["sections"]["hold"]["claims"][0]["holds"]


@pytest.mark.parametrize(
    "words", [["--only=attention,speed"], ["--budget=0"], ["--budget=soon"], ["--out=/nowhere/gpu.json"]]
)
def test_wrong_options_are_told_before_anything_starts(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", *words])
    assert ended.value.code == 2
    assert words[0].split("=")[1].split(",")[-1] in capsys.readouterr().err


@NEEDS_NO_GPU
def test_a_machine_without_a_gpu_is_told_in_torchs_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", f"--out={tmp_path / 'found.json'}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no GPU can be used here: ")
    with pytest.raises((AssertionError, RuntimeError)) as reason:
        torch.cuda.init()
    assert str(reason.value).splitlines()[0] in error
    assert not (tmp_path / "found.json").exists()


def test_every_section_is_a_function_and_the_timed_ones_come_last() -> None:
    for section in (ENVIRONMENT, *SECTIONS):
        module, _, function = section.where.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert 0 < section.expected_s <= section.limit_s
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    order = [section.is_timed for section in SECTIONS]
    assert order == sorted(order)
    timed_s = sum(section.expected_s for section in SECTIONS if section.is_timed)
    longest_s = max(section.expected_s for section in SECTIONS if not section.is_timed)
    assert ENVIRONMENT.expected_s + longest_s + timed_s < 345, "they fit side by side, with processors enough"


def blocked(folder: Path, absent: tuple[str, ...] = ABSENT) -> dict[str, str]:
    """Return an environment whose Python processes do not find some packages; default: what a GPU machine may lack."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Absent(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {absent}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_it_runs_without_ray(tmp_path: Path) -> None:
    modules = {section.where.partition(":")[0] for section in (ENVIRONMENT, *SECTIONS)}
    code = f"import importlib\nfor name in {sorted(modules)}: importlib.import_module(name)\nimport ray"
    done = subprocess.run(
        [sys.executable, "-c", code], env=blocked(tmp_path / "absent"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'ray'", "and nothing before that"


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", blocked(tmp_path / "absent", ("torch",))["PYTHONPATH"])
    with pytest.raises(SystemExit) as ended:
        main(["gpu", f"--out={tmp_path}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a package is missing (No module named 'torch'): pip install torch\n"


@pytest.mark.slow
@pytest.mark.timeout(3300)
def test_all_of_it_works_on_a_cpu_without_ray(tmp_path: Path) -> None:
    """Runs are killed and go on for real; shapes are tiny, and what only a GPU can tell is passed over."""
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device=cpu", "--budget=3000", f"--out={file}"]
    done = subprocess.run(
        command, env=blocked(tmp_path / "absent"), cwd=ROOT, capture_output=True, text=True, timeout=3200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["sections"]
    assert found.keys() == {section.name for section in SECTIONS}
    for section in SECTIONS:
        if not section.on_cpu:
            assert found[section.name] == {"skipped": "needs a GPU"}
    claims = {name: len(each["claims"]) for name, each in found.items() if each.get("claims")}
    assert claims == {
        **{"attention": 2, "rescue_after_step": 2, "rescue_before_first_step": 2, "rescue_float16": 3},
        **{"resume_eager": 2, "resume_compiled": 3, "resume_adapters": 3, "two_ranks": 4, "rollback": 2},
    }
    assert found["resume_compiled"]["figures"]["resumed"]["is_compiled"]
    assert found["pauses"]["figures"]["states_taken"] > 3


class Rescuer:
    """Stands for a saver whose rescue leaves tensors in node memory and returns an iteration."""

    def __init__(self, setting: Setting, tensors: dict[str, torch.Tensor], iter_num: int) -> None:
        self.setting, self.tensors, self.iter_num = setting, tensors, iter_num

    def rescue(self) -> int:
        folder = Path(self.setting.memory_dir, f"checkpoint_{self.iter_num:08d}_abc.0-of-1")
        folder.mkdir()
        save_file(self.tensors, folder / "model.safetensors")
        return self.iter_num


@pytest.mark.parametrize(
    ("iter_num", "nudge", "expected"), [(5, 0.0, [True, True]), (4, 0.0, [False, False]), (5, 1e-7, [True, False])]
)
def test_a_rescue_of_other_bits_or_another_iteration_is_noticed(
    tmp_path: Path, iter_num: int, nudge: float, expected: list[bool]
) -> None:
    setting, report = Setting("cpu", True, tmp_path, str(tmp_path)), Report(tmp_path / "report.json")
    state = {"weight": torch.ones(3)}
    saver: Any = Rescuer(setting, {"weight": torch.ones(3) + nudge}, iter_num)
    _told_rescue(setting, report, saver, state, {})
    claims = json.loads((tmp_path / "report.json").read_text())["claims"]
    assert [claim["holds"] for claim in claims] == expected


ON_GPU = Setting("cuda", False, Path(), "")  # as what judges figures is told; nothing is run there


def test_the_loop_builds_its_states_where_sections_look() -> None:
    with watching() as watched:
        assert watched.states == []


def claims_of(report: Path) -> list[bool]:
    return [claim["holds"] for claim in json.loads(report.read_text())["claims"]]


@pytest.mark.parametrize(("told_s", "holds"), [(0.040, True), (0.0, False)])
def test_a_pause_that_is_not_told_is_noticed(tmp_path: Path, told_s: float, holds: bool) -> None:
    """Steps of 20 ms, of which every 20th waits 40 ms for a copy."""
    copied = set(range(19, 150, 20))
    marks, now_s, paused_s = [], 0.0, 0.0
    for iter_num in range(150):
        now_s += 0.020 + 0.040 * (iter_num in copied)
        paused_s += told_s * (iter_num in copied)
        marks.append((iter_num, now_s, paused_s))
    report = tmp_path / "report.json"
    _tell_pauses(ON_GPU, Report(report), marks, copied)
    assert claims_of(report) == [holds]
    assert json.loads(report.read_text())["figures"]["step_waits_ms"] == pytest.approx(40)


@pytest.mark.parametrize(
    ("ms", "synchronisations", "expected"), [(102, 1, [True] * 3), (109, 1, [False, True, True]), (120, 2, [False] * 3)]
)
def test_steps_that_are_slower_than_nanogpts_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ms: float, synchronisations: int, expected: list[bool]
) -> None:
    def call(_setting: Setting, _where: str, name: str, *_: Any, **__: Any) -> Found:
        figures = {"ms": 100 if name == "nanogpt" else ms, "synchronisations_per_iteration": synchronisations}
        return Found([], figures, "", "", 0, 1.0, "")

    monkeypatch.setattr(Setting, "call", call)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    report = tmp_path / "report.json"
    speed.step_time(ON_GPU, Report(report))
    assert claims_of(report) == expected


def test_iterations_are_timed_without_the_first_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 60.0, 70.0, *(70.0 + block for block in range(1, 9)), 1000.0])  # compiles, settles, measured
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = speed._Clock(Report(tmp_path / "report.json"))
    for _ in range(11):
        clock.block()
    assert clock.ms() == pytest.approx(1000 / speed._BLOCK)
    assert json.loads((tmp_path / "report.json").read_text())["figures"]["first_step_s"] == 60

"""The README's commands: we understand all of them, and those without a cloud run, in their order, on one machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from orchestrator.__main__ import COMMANDS
from orchestrator.commands.export import ExportConfig
from orchestrator.commands.inspect_run import InspectConfig
from orchestrator.commands.plan import own_flags
from orchestrator.commands.report import ReportConfig
from orchestrator.commands.sample import SampleConfig
from orchestrator.config import TrainConfig, parse

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
}
_LOOP = ["-m", "orchestrator.loop"]


def commands_of_readme() -> list[str]:
    """Return the commands in the README's code blocks; those within `sh -c '...'` stand for themselves."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.partition("  #")[0].strip() for line in lines]
    inner = [part for command in commands if " sh -c " in command for part in shlex.split(command)[-1].split(" && ")]
    return [command for command in commands if _words(command)] + inner


def _words(command: str) -> list[str]:
    """Return the words of a command of ours, beginning with its verb (`loop` for a run without Ray); else none."""
    words = shlex.split(command)
    if words[:1] == ["orchestrator"]:
        return words[1:]
    for n in range(len(words) - 1):
        if words[n : n + 2] == _LOOP:
            return ["loop", *words[n + 2 :]]
    return words[3:] if words[:3] == ["python", "-m", "orchestrator"] else []


OURS = commands_of_readme()
LOCAL = [command for command in OURS if "/tmp/shared" not in command]


def test_readme_has_commands_of_every_kind() -> None:
    assert {_words(command)[0] for command in OURS} == {*COMMANDS, "loop"}


@pytest.mark.parametrize("command", OURS)
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *words = _words(command)
    if verb == "plan":
        words = own_flags(words)[2]
    if verb == "prepare":
        assert re.fullmatch(r"\w+( --(text|data_dir)=\S+)?", " ".join(words))
    else:
        parse(SETTINGS.get(verb, TrainConfig), words, verb)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_run_in_their_order(tmp_path: Path, memory_dir: str) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "input.txt").write_text("\n".join(topics.values())[:100_000], encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    iterations = Counter[str]()
    for command in LOCAL:
        shorter = ""
        if _words(command)[0] in ("train", "loop"):
            out_dir = re.findall(r"--out_dir=\S+", command)[0]
            iterations[out_dir] += 2  # the second command of a run continues it
            shorter = f" --max_iters={iterations[out_dir]} --eval_iters=1 --batch_size=2 --memory_dir={memory_dir}"
            shorter += " --block_size=64 --compile=False"
        done = subprocess.run(
            command + shorter, shell=True, cwd=tmp_path, env=environment, timeout=900, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}{shorter}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "ckpt.pt").is_file()
    assert (tmp_path / "out" / "hf" / "config.json").is_file()

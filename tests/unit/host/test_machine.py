"""How many processors this process may use: by affinity, and by the limits of control groups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.host.machine import seen_as, usable_cpus

HERE = len(os.sched_getaffinity(0))


def machine(root: Path, groups: str, files: dict[str, str]) -> str:
    """Write what /proc/self/cgroup and files below /sys/fs/cgroup say; return the root."""
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return str(root)


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, HERE),
        ("0::/", {"cpu.max": "nonsense"}, HERE),
        ("0::/", {}, HERE),
        (
            "3:cpu,cpuacct:/docker/x",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("1:cpu:/j", {"cpu/j/cpu.cfs_quota_us": "10000", "cpu/j/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, HERE),
        ("2:memory:/", {"memory/cpu.cfs_quota_us": "1000", "memory/cpu.cfs_period_us": "100000"}, HERE),
        ("0::/", {"cpu.max": "6400000 100000"}, HERE),
    ],
)
def test_a_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(machine(tmp_path, groups, files)) == cpus


def test_part_of_a_processor_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cpus(machine(tmp_path, "0::/", {"cpu.max": "150000 100000"})) == 2
    assert usable_cpus(str(tmp_path / "nowhere")) == 64


def test_affinity_counts() -> None:
    one = sorted(os.sched_getaffinity(0))[0]
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); "
        "from orchestrator.host.machine import usable_cpus as u; print(u())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_file_of_this_machine_is_told_by_its_inode(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert seen_as(str(tmp_path / "file")) == seen_as(str(tmp_path / "link"))
    assert seen_as(str(tmp_path / "file")) != seen_as(str(tmp_path))
    assert seen_as(str(tmp_path / "missing")) is None

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as compiler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from orchestrator.host.compile_cache import VARIABLE, keep_compiled


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine's folder for temporary files, and no cache that the user has set."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    with compiler.patch(cpp_cache_precompile_headers=True):
        yield tmp_path


def own(temp: Path) -> Path:
    return temp / f"nanogpt-orchestrator-cache-{os.geteuid()}"


def test_the_cache_is_the_users_alone(temp: Path) -> None:
    before = os.umask(0)
    try:
        folder = keep_compiled()
    finally:
        os.umask(before)
    assert folder == own(temp) / "compiled"
    assert os.environ[VARIABLE] == str(folder)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    os.environ.pop(VARIABLE)
    assert keep_compiled() == folder, "the next process finds it"


def is_private(folder: Path, temp: Path) -> bool:
    return own(temp) not in folder.parents and folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("part", [".", "compiled"])
def test_a_folder_that_others_can_write_to_is_not_used(temp: Path, caplog: pytest.LogCaptureFixture, part: str) -> None:
    keep_compiled()
    os.environ.pop(VARIABLE)
    (own(temp) / part).chmod(0o770)
    assert is_private(keep_compiled(), temp)
    assert f"{own(temp)} can be written to by others: what is compiled is kept in" in caplog.text


@pytest.mark.parametrize("part", [".", "compiled"])
def test_a_link_is_not_followed(temp: Path, part: str) -> None:
    (temp / "planted").mkdir()
    if part == "compiled":
        own(temp).mkdir(mode=0o700)
    Path(own(temp), part).symlink_to(temp / "planted")
    assert is_private(keep_compiled(), temp)


@pytest.mark.parametrize("mode", [0o755, 0o775])
def test_pytorchs_own_folder_is_not_taken_and_its_headers_only_where_it_is_safe(temp: Path, mode: int) -> None:
    theirs = Path(default_cache_dir())
    theirs.mkdir()
    theirs.chmod(mode)
    os.environ[VARIABLE] = str(theirs)  # as an import of the compiler does
    assert keep_compiled() == own(temp) / "compiled"
    assert compiler.cpp_cache_precompile_headers == (mode == 0o755)


def test_a_folder_of_another_user_is_not_used(
    temp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    me = os.geteuid()
    own(temp).mkdir(mode=0o700)
    own(temp).rename(temp / f"nanogpt-orchestrator-cache-{me + 1}")
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)  # to whom the folder with that name does not belong
    assert is_private(keep_compiled(), temp)
    assert f"nanogpt-orchestrator-cache-{me + 1} belongs to another user" in caplog.text


def test_what_the_user_has_set_is_respected(
    temp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(temp / "mine"))
    assert keep_compiled() == temp / "mine"
    assert not caplog.records
    (temp / "mine").mkdir()
    (temp / "mine").chmod(0o777)
    assert keep_compiled() == temp / "mine"
    assert f"{VARIABLE}={temp / 'mine'} can be written to by others" in caplog.text


COMPILE = """
import torch
from torch._dynamo.utils import counters
from orchestrator.distributed.numerics import compiler_fault
assert compiler_fault(torch.device("cpu")) is None
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_process_that_starts_again_does_not_compile_again(temp: Path) -> None:
    quick = {**os.environ, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}  # which take a minute in a new folder
    command = [sys.executable, "-c", COMPILE]
    said = [subprocess.run(command, check=True, capture_output=True, text=True, env=quick).stdout for _ in range(2)]
    assert [each.split() for each in said] == [["0", "1"], ["1", "0"]]
    assert any((own(temp) / "compiled").iterdir())

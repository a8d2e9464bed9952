"""Ray's list of checkpoints: written through pyarrow as Ray does it, where it can be written and where not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from pyarrow.fs import FileType
from ray.train.v2._internal.constants import VALIDATE_STORAGE_MARKER_FILENAME
from ray.train.v2._internal.execution.storage import StorageContext

from orchestrator.driver import registry
from orchestrator.driver.registry import REGISTRY_FILE, storage_for_ray
from orchestrator.storage.run_folder import RunFolder


def write(path: Path, content: bytes) -> None:
    storage = pickle.loads(pickle.dumps(storage_for_ray(RunFolder(str(path.parent)))))  # it travels to Ray's controller
    with storage.open_output_stream(str(path)) as stream:
        stream.write(content[:3])
        stream.write(content[3:])


def test_it_is_written(tmp_path: Path) -> None:
    for content in (b"the first list", b"a list"):
        write(tmp_path / REGISTRY_FILE, content)
        assert (tmp_path / REGISTRY_FILE).read_bytes() == content


def test_where_it_cannot_be_written_nothing_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / REGISTRY_FILE).mkdir()
    write(tmp_path / REGISTRY_FILE, b"a list")
    assert "Ray's list of checkpoints could not be written: IsADirectoryError" in caplog.text


def test_a_write_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_WRITE_S", 0.2)
    pipe = tmp_path / REGISTRY_FILE
    os.mkfifo(pipe)  # opening it waits for a reader
    write(pipe, b"the first list")
    write(pipe, b"a second list")  # of which there is no second thread
    with pipe.open("rb") as reader:
        assert reader.read() == b"the first list"
    registry._writing[0].join(10)
    pipe.unlink()
    write(pipe, b"a third list")
    assert pipe.read_bytes() == b"a third list"


def test_all_else_fails_as_it_does(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "file", b"content")
    write(tmp_path / "file", b"content")
    assert storage_for_ray(RunFolder(str(tmp_path))).get_file_info(str(tmp_path / "file")).type == FileType.File


def test_nothing_is_written_to_find_out_whether_it_can_be(tmp_path: Path) -> None:
    storage = storage_for_ray(RunFolder(str(tmp_path)))
    context = StorageContext(str(tmp_path), "run", storage)  # which writes a file and looks for it
    context._check_validation_file()
    assert list(tmp_path.iterdir()) == []
    assert VALIDATE_STORAGE_MARKER_FILENAME == registry._TRIAL_FILE

"""SnapshotBuffer: a place in node memory for one state of a rank, used again for the next but one."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from typing import Any

import xxhash

from orchestrator.checkpoint.save.mapping import mapped
from orchestrator.checkpoint.save.node_memory import NodeMemory, share_path
from orchestrator.checkpoint.store import state_text
from orchestrator.checkpoint.tensor_file import FileRecord, Layout


class SnapshotBuffer:
    """Files for one state of this rank's share, which are mapped, written over again and again, and renamed.

    layouts: of its files, by name; contents: their bytes. iter_num: of the state that it holds whole, -1 for none.
    is_uploading: its state is on the way to storage, and must not be written over.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, memory: NodeMemory, layouts: dict[str, Layout]) -> None:
        self._memory = memory
        self._path = self._begun = memory.path / f".slot-{os.urandom(4).hex()}"
        self.iter_num, self.is_uploading = -1, False
        self.records: dict[str, FileRecord] = {}
        self.layouts = layouts
        self._path.mkdir(mode=0o700)
        try:
            self.contents = {
                file: memoryview(mapped(self._path / file, layout.size_bytes)) for file, layout in layouts.items()
            }
        except OSError:
            self.delete()
            raise
        for file, content in self.contents.items():
            content[: len(layouts[file].header)] = layouts[file].header

    def open(self) -> dict[str, memoryview]:
        """Withdraw the state that was here, and return the memory for the bytes of each tensor, by key."""
        self.iter_num = -1
        if self._path != self._begun:
            self._path.rename(self._begun)
            self._path = self._begun
        return {
            name: self.contents[file][start:end]
            for file, layout in self.layouts.items()
            for name, (start, end) in layout.spans.items()
        }

    def publish(self, name: str, share: int, shares: int, state: dict[str, Any]) -> None:
        """Checksum the files, describe them, and rename the folder: from now on the state is whole.

        state: the content of state.json, but for the records of the files.
        """
        for file, content in self.contents.items():
            self.records[file] = FileRecord(len(content), xxhash.xxh3_128(content).hexdigest())
        records = {file: asdict(record) for file, record in self.records.items()}
        (self._path / "state.json").write_text(state_text({**state, "files": records}))
        target = share_path(self._memory.path, name, share, shares)
        shutil.rmtree(target, ignore_errors=True)  # of this attempt: the same state, before it was taken again
        self._path.rename(target)
        self._path, self.iter_num = target, int(state["iter_num"])

    def delete(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._path, ignore_errors=True)

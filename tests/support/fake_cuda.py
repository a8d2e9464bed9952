"""CUDA as the host sees it, where no GPU is: devices, streams, events, host registration, and a log of every call.

Tensors stay on the CPU, and what is put into a stream is done at once. What is faked is the order: `get_stuck` lets a
stream wait for a peer that is gone, and who waits for what is behind that, on the host, would wait for ever: here that
raises `StuckError`. Every call is logged with the device that is current and the thread that called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

_POOL = 32  # streams of a priority on a device, handed out in turns: of the 33rd, the 1st is another name


class StuckError(AssertionError):
    """The host waits for what never comes."""


@dataclass(frozen=True)
class Call:
    """name: as in torch, such as `Event.synchronize`; device: the thread's current one; what: stream, size, index."""

    name: str
    device: int
    thread: str
    what: Any = None


class FakeCuda:
    """calls: all so far; registered: address -> bytes of host memory that is pinned; current: by thread."""

    def __init__(self, device_count: int) -> None:
        self.device_count = device_count
        self.calls: list[Call] = []
        self.registered: dict[int, int] = {}
        self.refused: dict[int, int] = {}  # which registration (0 is the first) fails -> with which error
        self.registering: Callable[[], object] = lambda: None  # called in each of them
        self._here = threading.local()
        self._registrations = 0
        self._defaults = [FakeStream(self, index, 0, 0) for index in range(device_count)]
        self._pools: dict[tuple[int, int], list[FakeStream]] = {}
        self._made: dict[tuple[int, int], int] = {}

    def names(self, thread: str | None = None) -> list[str]:
        """Return the names of the calls, of a thread or of all."""
        return [call.name for call in self.calls if thread in (None, call.thread)]

    def of(self, name: str) -> list[Call]:
        """Return the calls of a name."""
        return [call for call in self.calls if call.name == name]

    def syncs(self, thread: str | None = None) -> list[str]:
        """Return the calls that make the host wait for a device."""
        return [name for name in self.names(thread) if name.endswith("synchronize")]

    def log(self, name: str, what: Any = None) -> None:
        self.calls.append(Call(name, self.current_device(), threading.current_thread().name, what))

    def current_device(self) -> int:
        return int(getattr(self._here, "device", 0))

    def set_device(self, device: Any) -> None:
        self._here.device = self.index(device)
        self.log("set_device", self.index(device))

    def index(self, device: Any) -> int:
        if device is None:
            return self.current_device()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current_device() if index is None else index

    def current_stream(self, device: Any = None) -> FakeStream:
        index = self.index(device)
        return getattr(self._here, "streams", {}).get(index, self._defaults[index])

    def stream_of_pool(self, device: Any = None, priority: int = 0) -> FakeStream:
        index = self.index(device)
        pool = self._pools.setdefault((index, priority), [])
        made = self._made[index, priority] = self._made.get((index, priority), 0) + 1
        if len(pool) < _POOL:
            pool.append(FakeStream(self, index, priority, made))
        self.log("Stream", pool[(made - 1) % _POOL])
        return pool[(made - 1) % _POOL]

    @contextmanager
    def in_stream(self, stream: FakeStream) -> Iterator[None]:
        streams = getattr(self._here, "streams", {})
        self._here.streams = {**streams, stream.index: stream}
        with self.on_device(stream.index):
            self.log("stream", stream)
            yield
        self._here.streams = streams

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self._here.device = self.index(device)
        try:
            yield
        finally:
            self._here.device = before

    def synchronize(self, device: Any = None) -> None:
        self.log("synchronize", self.index(device))
        streams = [self._defaults[self.index(device)]]
        streams += [each for key, pool in self._pools.items() if key[0] == self.index(device) for each in pool]
        if any(stream.is_stuck for stream in streams):
            raise StuckError(f"device {self.index(device)} never comes to an end")

    def register(self, address: int, size_bytes: int, _flags: int) -> int:
        self.log("cudaHostRegister", size_bytes)
        self.registering()
        code = self.refused.get(self._registrations, 0)
        self._registrations += 1
        if any(address < at + size and at < address + size_bytes for at, size in self.registered.items()):
            code = 712  # cudaErrorHostMemoryAlreadyRegistered
        if code == 0:
            self.registered[address] = size_bytes
        return code

    def unregister(self, address: int) -> int:
        self.log("cudaHostUnregister", self.registered.get(address))
        return 0 if self.registered.pop(address, None) else 713  # cudaErrorHostMemoryNotRegistered


class FakeStream:
    """A queue of a device, whose work is done as it is put in; is_busy: the host would have to wait for some of it."""

    def __init__(self, cuda: FakeCuda, index: int, priority: int, number: int) -> None:
        self.cuda, self.index, self.priority, self.number = cuda, index, priority, number
        self.is_stuck = self.is_busy = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def get_stuck(self) -> None:
        """Let all that is put in from here on wait for a peer that is gone."""
        self.is_stuck = True

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.wait(self)

    def query(self) -> bool:
        self.cuda.log("Stream.query", self)
        return not (self.is_stuck or self.is_busy)

    def synchronize(self) -> None:
        self.cuda.log("Stream.synchronize", self)
        if self.is_stuck:
            raise StuckError(f"{self} never comes to an end")
        self.is_busy = False

    def __repr__(self) -> str:
        return f"stream(cuda:{self.index}, priority {self.priority}, {self.number})"


class FakeEvent:
    """A place in a stream; is_done: what was put in before it is done."""

    def __init__(self, cuda: FakeCuda, blocking: bool = False) -> None:
        self.cuda, self.blocking = cuda, blocking
        self.stream: FakeStream | None = None
        self.is_done = True
        self.takes: Callable[[], None] = lambda: None  # called by who waits for it

    def record(self, stream: FakeStream | None = None) -> None:
        self.stream = stream or self.cuda.current_stream()
        self.is_done = not self.stream.is_stuck
        self.cuda.log("Event.record", self.stream)

    def wait(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        self.cuda.log("Event.wait", stream)
        stream.is_stuck |= not self.is_done

    def query(self) -> bool:
        self.cuda.log("Event.query", self.stream)
        return self.is_done

    def synchronize(self) -> None:
        self.cuda.log("Event.synchronize", self.stream)
        if not self.is_done:
            raise StuckError(f"an event of {self.stream} never comes")
        self.takes()


class _Runtime:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cudaHostRegister, self.cudaHostUnregister = cuda.register, cuda.unregister


def fake_cuda(monkeypatch: pytest.MonkeyPatch, device_count: int = 2) -> FakeCuda:
    """Put the fakes in the place of torch.cuda's; a device of this machine is not asked for anything."""
    cuda = FakeCuda(device_count)
    fakes = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: device_count,
        "current_device": cuda.current_device,
        "set_device": cuda.set_device,
        "current_stream": cuda.current_stream,
        "default_stream": lambda device=None: cuda._defaults[cuda.index(device)],
        "synchronize": cuda.synchronize,
        "Stream": cuda.stream_of_pool,
        "Event": lambda enable_timing=False, blocking=False, interprocess=False: FakeEvent(cuda, blocking),  # noqa: ARG005
        "stream": cuda.in_stream,
        "device": cuda.on_device,
        "cudart": lambda: _Runtime(cuda),
        "empty_cache": lambda: cuda.log("empty_cache"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def pin_memory(tensor: torch.Tensor, *_device: Any) -> torch.Tensor:
        cuda.log("pin_memory", tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return cuda

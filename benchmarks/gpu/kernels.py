"""What the acceptance asks of the card, its driver and PyTorch, without training anything."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.gpu.child import LONG_S, Report, Setting

NEEDED = ("torch", "numpy", "orchestrator.loop")
_CYCLES_PER_S = 2e9  # more than a card makes: what is to be held is held a little longer
_REPEATS = 12
_STREAMS = 40  # more than the 32 that PyTorch has of each priority


def environment(setting: Setting, report: Report) -> None:
    """Note what this machine is; `unfit` is why it cannot be checked."""
    try:
        for module in NEEDED:
            importlib.import_module(module)
    except ImportError as error:
        report.figure("unfit", f"a package is missing ({error}): pip install {error.name or 'it'}")
        return
    import torch

    from orchestrator.host.machine import usable_cpus

    report.figure("host", {"kernel": platform.release(), "python": platform.python_version()})
    report.figure("torch", torch.__version__)
    room = os.statvfs(setting.memory_dir)
    report.figure("memory_dir_gb", room.f_bavail * room.f_frsize / 1e9)
    report.figure("cores", usable_cpus())
    if not setting.is_on_gpu:
        return
    cuda: Any = torch.cuda
    try:
        cuda.init()
        card = cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:
        build = "; this PyTorch is built for CPUs" if torch.version.cuda is None else ""
        report.figure("unfit", f"no GPU can be used here: {str(error).splitlines()[0]}{build}")
        return
    report.figure("gpu", card.name)
    report.figure("gpus", torch.cuda.device_count())
    report.figure("gpu_memory_gb", card.total_memory / 1e9)
    free_bytes, total_bytes = cuda.mem_get_info()
    report.figure("gpu_memory_free", free_bytes / total_bytes)
    report.figure("compute_capability", f"{card.major}.{card.minor}")
    report.figure("cuda", torch.version.cuda)
    report.figure("cudnn", _cudnn_version())
    report.figure("nccl", _nccl_version())
    report.figure("driver", _driver())


def _cudnn_version() -> int | None:
    from torch.backends import cudnn

    version: Any = cudnn.version
    return version()  # type: ignore[no-any-return]


def _nccl_version() -> str | None:
    from torch.cuda import nccl

    version: Any = nccl.version
    return ".".join(map(str, version())) if has_nccl() else None


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else None


def has_nccl() -> bool:
    """Return whether this PyTorch can use NCCL."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_nccl_available()


def preload(_setting: Setting, report: Report) -> None:
    """A warm process must not touch CUDA before it is given its GPUs: they are hidden after its imports."""
    modules = ["orchestrator.loop", "torch._dynamo", "torch.distributed"]
    try:
        from orchestrator.controller import spares

        modules = list(spares._MODULES)
    except ImportError:  # no Ray here
        report.figure("without_ray", True)
    code = (
        f"import importlib, os; [importlib.import_module(name) for name in {modules}]; import torch;"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''; print(torch.cuda.device_count(), torch.cuda.is_initialized())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    report.claim("what a warm process imports leaves CUDA alone", said[-2:] == ["0", "False"], " ".join(said[-2:]))


def attention(setting: Setting, report: Report) -> None:
    """Bits and time of attention's backward pass: where PyTorch only warns, and strictly, as training has it."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    low = (
        torch.bfloat16
        if not setting.is_on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float16
    )
    for dtype in (low, torch.float32):
        times = {}
        for mode in ("warn_only", "strict"):
            torch.use_deterministic_algorithms(True, warn_only=mode == "warn_only")
            name = f"{str(dtype).removeprefix('torch.')}_{mode}"
            same, times[mode], backend = _backward(setting, dtype)
            report.figure(name, {"same_bits": same, "backward_ms": times[mode], "backend": backend})
            if mode == "strict":
                over = times[mode] / times["warn_only"]
                saw = f"{times[mode]:.2f} ms, {over:.2f} times that of warn_only; backend {backend}"
                report.claim(f"attention's backward pass gives the same bits {_REPEATS} times, {dtype}", same, saw)


def _backward(setting: Setting, dtype: Any) -> tuple[bool, float, str]:
    """Return whether the gradients were the same each time, the median in ms, and whose kernels they are."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    shape = (2, 2, 64, 16) if setting.is_tiny else (12, 12, 1024, 64)  # (B, nh, T, hs)
    q, k, v = (torch.randn(shape, device=setting.device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    first, is_same, times = None, True, []
    backend = ""
    for _ in range(_REPEATS):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        backend = y.grad_fn.name() if y.grad_fn else ""
        _wait(setting)
        began_s = time.perf_counter()
        grads = torch.autograd.grad(y, (q, k, v), grad)
        _wait(setting)
        times.append(1e3 * (time.perf_counter() - began_s))
        first = first or grads
        is_same &= all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
    return is_same, median(times[2:]), backend


def _wait(setting: Setting) -> None:
    import torch

    if setting.is_on_gpu:
        torch.cuda.synchronize()


def hold(seconds: float) -> Any:
    """Let the current stream wait for something that does not come for so long, as for a lost peer's gradients.

    Return the stream that holds it, which comes from where NCCL takes its own.
    """
    import torch

    cuda: Any = torch.cuda
    side = cuda.Stream()
    with cuda.stream(side):
        cuda._sleep(int(seconds * _CYCLES_PER_S))
        event = side.record_event()
    cuda.current_stream().wait_event(event)
    return side


def streams(setting: Setting, report: Report) -> None:
    """Which streams get through while one is stuck: PyTorch hands out 32 per priority, again and again."""
    few = setting.start("benchmarks.gpu.kernels:passing", "few", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}).finish(LONG_S)
    report.figure("stuck_with_8_connections", few.figures)
    passing(setting, report)
    stuck = report.figures["high"]["stuck"]
    report.claim("streams of high priority pass a stuck one", stuck == 0, f"{stuck} of {_STREAMS} are stuck")


def passing(_setting: Setting, report: Report) -> None:
    """Count the streams that are stuck behind one, for both priorities."""
    import torch

    cuda: Any = torch.cuda
    source = torch.ones(2**20, device="cuda")
    target = torch.empty(2**20, pin_memory=True)  # before: to allocate may wait for the device
    cuda.synchronize()
    stuck = hold(8.0)
    for name, priority in (("low", 0), ("high", -1)):
        tried = []
        for _ in range(_STREAMS):
            stream = cuda.Stream(priority=priority)
            with cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                tried.append((stream.cuda_stream == stuck.cuda_stream, stream.record_event()))
        time.sleep(1.0)
        is_same, events = zip(*tried, strict=True)
        report.figure(name, {"same_stream": sum(is_same), "stuck": sum(not event.query() for event in events)})


def nccl_teardown(setting: Setting, report: Report) -> None:
    """How long NCCL's groups take to be destroyed, and aborted, behind a stream that is stuck for ten seconds."""
    if not has_nccl():
        report.skip("this PyTorch has no NCCL")
        return
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    ends: dict[str, Callable[[], Any]] = {
        "destroy": dist.destroy_process_group,
        "abort": dist.distributed_c10d._abort_process_group,
    }
    for how, end in ends.items():
        store = f"file://{setting.folder}/store-{how}"
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1)
        x = torch.ones(2**20, device="cuda")
        dist.all_reduce(x)
        torch.cuda.synchronize()
        hold(10.0)
        dist.all_reduce(x)
        threading.Thread(target=x.sum().item, daemon=True).start()
        began_s = time.monotonic()
        end()
        report.figure(f"{how}_s", round(time.monotonic() - began_s, 2))
        torch.cuda.synchronize()

"""The sections of the acceptance: what each asks, where it is, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of the acceptance that is a process of its own.

    where: module:function. expected_s: on an H100, by estimate; limit_s: after which it is ended.
    is_timed: it has the machine to itself, after those that have not. on_cpu: it means something there.
    """

    name: str
    where: str
    expected_s: float
    limit_s: float
    is_timed: bool = False
    on_cpu: bool = False


ENVIRONMENT = Section("environment", "benchmarks.gpu.kernels:environment", 10, 60, on_cpu=True)
# Those that run side by side start in this order: the longest first.
SECTIONS = (
    Section("resume_compiled", "benchmarks.gpu.runs:resume_compiled", 90, 160, on_cpu=True),
    Section("two_ranks", "benchmarks.gpu.runs:two_ranks", 60, 110, on_cpu=True),
    Section("resume_eager", "benchmarks.gpu.runs:resume_eager", 50, 110, on_cpu=True),
    Section("resume_adapters", "benchmarks.gpu.runs:resume_adapters", 50, 110, on_cpu=True),
    Section("rescue_after_step", "benchmarks.gpu.rescue:rescue_after_step", 20, 70, on_cpu=True),
    Section("rescue_before_first_step", "benchmarks.gpu.rescue:rescue_before_first_step", 25, 70, on_cpu=True),
    Section("rescue_float16", "benchmarks.gpu.rescue:rescue_float16", 20, 70, on_cpu=True),
    Section("rollback", "benchmarks.gpu.rescue:rollback", 50, 110, on_cpu=True),
    Section("streams", "benchmarks.gpu.kernels:streams", 25, 60),
    Section("nccl_teardown", "benchmarks.gpu.kernels:nccl_teardown", 30, 60),
    Section("ddp_memory", "benchmarks.gpu.memory:ddp_memory", 15, 60),
    Section("preload", "benchmarks.gpu.kernels:preload", 8, 60),
    Section("attention", "benchmarks.gpu.kernels:attention", 12, 50, is_timed=True, on_cpu=True),
    Section("step_time", "benchmarks.gpu.speed:step_time", 95, 150, is_timed=True, on_cpu=True),
    Section("pauses", "benchmarks.gpu.state:pauses", 20, 60, is_timed=True, on_cpu=True),
    Section("sampling", "benchmarks.gpu.speed:sampling", 20, 45, is_timed=True, on_cpu=True),
    Section("kill_memory", "benchmarks.gpu.state:kill_memory", 12, 45, is_timed=True),
    Section("xl", "benchmarks.gpu.memory:xl", 20, 50, is_timed=True, on_cpu=True),
    Section("xl_adapters", "benchmarks.gpu.memory:xl_adapters", 15, 50, is_timed=True, on_cpu=True),
    Section("contexts", "benchmarks.gpu.runs:contexts", 6, 60, is_timed=True),
)

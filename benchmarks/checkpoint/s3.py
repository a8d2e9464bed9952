"""Restoring from node memory and from an S3 server on this machine, and the bytes that the server is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint.ranks import open_saver, prepare, ranks, restore, save
from benchmarks.checkpoint.state import Figures, Plan


def s3(plan: Plan) -> tuple[Figures, dict[str, Any]]:
    """Compare restoring from node memory and from S3, and count what is asked of S3."""
    with _s3_server(plan.out_dir / "s3") as found:
        if not found:
            return {}, {}
        server, faulty_proxy = found
        speed, seconds = _memory_against_s3(plan, server)
        amplification = _amplification(plan, faulty_proxy(server), f"{server.url}/small")
    worst = max(amplification[f"read_amplification_{count}_ranks"] for count in (1, 2, 4))
    return {**speed, "read_amplification": worst, **amplification}, seconds


@contextmanager
def _s3_server(folder: Path) -> Iterator[tuple[Any, Any] | None]:
    """Lend an S3 server of the tests, and their proxy's class; None, and a line that says why, if there is none."""
    try:
        servers, proxy = (importlib.import_module(f"tests.support.{name}") for name in ("servers", "proxy"))
    except ImportError as error:
        print(f"memory_vs_s3_restore and read_amplification are left out: {error}; run it in the repository's root")
        yield None
        return
    folder.mkdir()
    (folder / "weed").mkdir()
    try:
        server = servers.S3Server(folder / "weed")
    except servers.ServerMissingError as missing:
        print(f"memory_vs_s3_restore and read_amplification are left out: {missing}")
        yield None
        return
    try:
        yield server, proxy.FaultyProxy
    finally:
        server.kill()


def _memory_against_s3(plan: Plan, server: Any) -> tuple[Figures, dict[str, Any]]:
    url = f"{server.url}/full"
    seconds: dict[str, list[float]] = {"memory": [], "s3": []}
    with ranks(2, plan.size, plan.out_dir, server.environment) as pair:
        bits = pair.do(prepare)[0]
        pair.do(open_saver, url, str(plan.memory_dir))
        saved_s = max(pair.do(save, url))
    for _ in range(2 * plan.rounds - 1):  # what new memory costs scatters most here
        for place, taken in seconds.items():
            memory_dir = str(plan.memory_dir) if place == "memory" else ""
            with ranks(2, plan.size, plan.out_dir, server.environment) as pair:
                found = pair.do(restore, url, bits, memory_dir)
            taken.append(max(each["seconds"] for each in found))
            if (found[0]["from_storage_bytes"] == 0) != (place == "memory"):
                raise RuntimeError(f"{found[0]['from_storage_bytes']} bytes were read of S3, asked was {place}")
    medians_s = {place: median(taken) for place, taken in seconds.items()}
    print(f"medians in s: restore from memory {medians_s['memory']:.2f}, from S3 {medians_s['s3']:.2f}", end="; ")
    print(f"save to S3 {saved_s:.2f}")
    figures = {"memory_vs_s3_restore": medians_s["s3"] / medians_s["memory"]}
    return figures, {"restore_s": seconds, "save_to_s3_s": saved_s}


def _amplification(plan: Plan, proxy: Any, url: str) -> Figures:
    """Return the bytes that S3 sent for restores, over the state's, for several world sizes and from node memory."""
    figures = {}
    try:
        with ranks(2, plan.small, plan.out_dir, proxy.environment) as pair:
            bits = pair.do(prepare)[0]
            pair.do(open_saver, url, str(plan.memory_dir))
            pair.do(save, url)
        for name, count, memory_dir in (
            ("1_ranks", 1, ""),
            ("2_ranks", 2, ""),
            ("4_ranks", 4, ""),
            ("in_memory", 2, str(plan.memory_dir)),
        ):
            with ranks(count, plan.small, plan.out_dir, proxy.environment) as members:
                before_bytes = proxy.traffic.bytes_down
                found = members.do(restore, url, bits, memory_dir)
                sent_bytes = proxy.traffic.bytes_down - before_bytes
            figures[f"read_amplification_{name}"] = sent_bytes / found[0]["size_bytes"]
    finally:
        proxy.close()
    return figures

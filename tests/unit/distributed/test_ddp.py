"""Gradients exist once, in DDP's buckets, and are averaged with the bits of DDP's own reduction. Real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config import TrainConfig
from orchestrator.distributed.ddp import average, wrap
from orchestrator.distributed.world import World
from orchestrator.worker.failure import Cause
from tests.support import lost_peer, ranks


@dataclass(frozen=True)
class Watch:
    """Note, at every micro-step of this process, how many bytes its gradients take and whether they are in buckets."""

    folder: Path

    def __call__(self, rank: int) -> None:
        from orchestrator import loop
        from orchestrator.distributed import ddp

        seen: dict[str, Any] = {"model": None, "buckets": set()}
        original_wrap, original_average, original_seed = ddp.wrap, ddp.average, loop.seed_dropout

        def wrapped(net: nn.Module, world: World) -> DistributedDataParallel:
            seen["model"] = net
            return original_wrap(net, world)

        def average(world: World, bucket):  # type: ignore[no-untyped-def]  # DDP wants its own types here, or none
            seen["buckets"] |= {bucket.buffer().untyped_storage().data_ptr()}
            return original_average(world, bucket)

        def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
            storages = [p.grad.untyped_storage() for p in seen["model"].parameters() if p.grad is not None]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            is_first = (iter_num, micro_step) == (0, rank)  # the buckets are made anew when it begins
            is_in_buckets = is_first or sizes.keys() <= seen["buckets"]
            weights_bytes = sum(p.nbytes for p in seen["model"].parameters())
            with (self.folder / f"seen-{rank}").open("a") as file:
                file.write(f"{iter_num} {micro_step} {sum(sizes.values()) / weights_bytes} {is_in_buckets}\n")
            if is_first:
                seen["buckets"].clear()
            original_seed(dropout, seed, iter_num, micro_step)

        ddp.wrap, ddp.average, loop.seed_dropout = wrapped, average, seed_dropout


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_exist_once_and_lie_in_the_buckets(tiny: TrainConfig, tmp_path: Path, dtype: Any) -> None:
    config = replace(tiny, gradient_accumulation_steps=6, max_iters=3, dtype=dtype, deterministic=False)
    ended = ranks.train(config, 2, tmp_path / "log", prepare=Watch(tmp_path))
    assert ended.is_done, ended.said
    for rank in range(2):
        seen = [line.split() for line in (tmp_path / f"seen-{rank}").read_text().splitlines()]
        assert len(seen) == 3 * 3
        # buckets are known once they were reduced: those that all later iterations use, when the first one ends
        assert all(float(share) == 1.0 for *_, share, _ in seen), seen
        assert all(is_in_buckets == "True" for it, *_, is_in_buckets in seen if it != "0"), seen


def gradients_of(ddp: DistributedDataParallel, rank: int, *, keeps: bool) -> list[torch.Tensor]:
    """Return the gradients of the second of two iterations of two micro-steps each."""
    for iteration in range(3):
        ddp.zero_grad(set_to_none=not keeps)
        for micro_step in range(2):
            ddp.require_backward_grad_sync = micro_step == 1
            torch.manual_seed(100 * iteration + 10 * micro_step + rank)
            ddp(torch.randn(5, 40)).square().sum().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters() if parameter.grad is not None]


def averages(world: World, folder: Path) -> None:
    torch.manual_seed(1)
    plain, ours = (nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    theirs = gradients_of(DistributedDataParallel(plain, gradient_as_bucket_view=True), world.rank, keeps=False)
    mine = gradients_of(wrap(ours, world), world.rank, keeps=True)
    torch.save([theirs, mine], folder / f"gradients-{world.rank}.pt")


def test_the_average_of_three_ranks_has_the_bits_of_ddps_own(tmp_path: Path) -> None:
    ended = ranks.call(averages, 3, tmp_path / "log", tmp_path)
    assert ended.is_done, ended.said
    for rank in range(3):
        theirs, mine = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert len(theirs) == len(mine) == 4
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(theirs, mine, strict=True))


def step_with_ddp(world: World) -> Callable[[], object]:
    net = wrap(nn.Linear(500, 500), world)
    return lambda: net(torch.ones(1, 500)).sum().backward()


def test_a_reduction_that_a_peer_has_left_is_never_taken_for_done(tmp_path: Path) -> None:
    assert lost_peer.causes_of(step_with_ddp, tmp_path) == {Cause.PEER_LOST}


def test_a_reduction_that_fails_while_it_runs_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    future: Any = torch.futures.Future()
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: SimpleNamespace(get_future=lambda: future))
    bucket: Any = SimpleNamespace(buffer=lambda: torch.full((3,), 2.0))
    averaged = average(World(size=2), bucket)
    future.set_exception(RuntimeError("gloo: a peer is gone"))
    with pytest.raises(RuntimeError, match="a peer is gone"):
        averaged.wait()

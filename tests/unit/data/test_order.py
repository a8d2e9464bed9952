"""Which block starts where: frozen numbers, independence of the world size, coverage and uniformity."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.data.order import BatchOrder, going_on, offsets, permute

N_TOKENS = 1_003_854  # Tiny Shakespeare's training split
SMALL = BatchOrder(seed=1337, batch_size=4, block_size=64, gradient_accumulation_steps=5)
EPOCH = replace(SMALL, mode="epoch")


# A run that is resumed with other numbers than these would see other data: never adapt them to a change of code.
@pytest.mark.parametrize(
    ("sampling", "split", "iter_num", "micro_step", "stream", "expected"),
    [
        (SMALL, "train", 0, 0, "train", [247095, 544727, 703278, 766883]),
        (SMALL, "train", 7, 3, "train", [611268, 151000, 724884, 837851]),
        (SMALL, "val", 7, 3, "train", [133809, 510717, 879068, 747430]),
        (SMALL, "train", 0, 0, "eval", [256319, 486554, 51437, 235730]),
        (SMALL, "val", 7, 3, "eval", [109016, 477959, 509440, 868587]),
        (EPOCH, "train", 0, 0, "train", [304256, 360960, 536640, 502208]),
        (EPOCH, "train", 7, 3, "train", [225792, 352384, 216960, 908224]),
        (EPOCH, "val", 7, 3, "train", [694848, 152448, 78656, 643008]),
        (EPOCH, "val", 7, 3, "eval", [109016, 477959, 509440, 868587]),
    ],
)
def test_offsets_are_frozen(sampling, split, iter_num, micro_step, stream, expected):
    starts = offsets(sampling, N_TOKENS, split, iter_num, micro_step, stream)
    assert starts.dtype == np.int64
    assert starts.tolist() == expected


def test_offsets_of_a_file_beyond_32_bits_are_frozen():
    expected = [4524692063, 7554943416, 3515897696, 7477294308]
    assert offsets(SMALL, 9_000_000_000, "train", 600_000, 39).tolist() == expected


@pytest.mark.parametrize("sampling", [SMALL, EPOCH])
def test_iteration_sees_the_same_sequences_with_any_number_of_workers(sampling):
    def drawn(world_size: int) -> Counter[int]:
        steps = sampling.gradient_accumulation_steps  # 5: neither 2 nor 3 divides it
        return Counter(
            start
            for rank in range(world_size)
            for micro_step in range(rank, steps, world_size)
            for start in offsets(sampling, N_TOKENS, "train", 11, micro_step).tolist()
        )

    assert drawn(1).total() == 20
    assert drawn(1) == drawn(2) == drawn(3)


@pytest.mark.parametrize("sampling", [SMALL, EPOCH])
def test_batches_differ_by_seed_split_stream_and_step(sampling):
    drawn = [
        tuple(offsets(replace(sampling, seed=seed), N_TOKENS, split, iter_num, micro_step, stream))
        for seed in (0, 1, -1)
        for split in ("train", "val")
        for stream in ("train", "eval")
        for iter_num in range(8)
        for micro_step in range(5)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("sampling", [SMALL, EPOCH])
@pytest.mark.parametrize("n_tokens", [65, 66, 128, 129, 130])
def test_every_offset_leaves_room_for_inputs_and_targets(sampling, n_tokens):
    starts = np.concatenate([offsets(sampling, n_tokens, "train", i, j) for i in range(40) for j in range(5)])
    assert starts.min() >= 0
    assert starts.max() + sampling.block_size + 1 <= n_tokens


def test_random_mode_reaches_the_first_and_the_last_start():
    starts = np.concatenate([offsets(SMALL, 64 + 3, "train", i, 0) for i in range(40)])
    assert set(starts.tolist()) == {0, 1, 2}


def test_random_mode_is_uniform():
    sampling = replace(SMALL, batch_size=64)
    n_starts = 1000
    starts = np.concatenate([offsets(sampling, 64 + n_starts, "train", i, 0) for i in range(1000)])
    counts = np.bincount(starts * 50 // n_starts, minlength=50)
    chi_square = float(((counts - len(starts) / 50) ** 2 / (len(starts) / 50)).sum())
    assert 20 < chi_square < 90  # 49 degrees of freedom: mean 49, standard deviation 10


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 5, 10, 16, 17, 99, 1000])
def test_every_epoch_visits_every_block_once(n_blocks):
    sampling = BatchOrder(batch_size=4, block_size=8, gradient_accumulation_steps=3, mode="epoch")
    n_epochs = (
        4  # 4 * n_blocks sequences: whole micro-steps, which straddle the epochs where 4 does not divide n_blocks
    )
    micro_steps = range(n_blocks)
    starts = [offsets(sampling, n_blocks * 8 + 1, "train", j // 3, j % 3) for j in micro_steps]
    epochs = np.concatenate(starts).reshape(n_epochs, n_blocks)
    assert (np.sort(epochs, axis=1) == np.arange(n_blocks) * 8).all()


def settings(sampling: BatchOrder) -> dict[str, object]:
    """Return what a state made with this sampling says of it."""
    began = {"epoch_began": list(sampling.began)} if sampling.began != (0, 0) else {}
    numbers = ("seed", "batch_size", "block_size", "gradient_accumulation_steps")
    return {key: getattr(sampling, key) for key in numbers} | {"sampling": sampling.mode} | began


def test_epochs_go_on_where_they_were_when_the_batch_changes():
    n_blocks, now, seen = 97, BatchOrder(batch_size=4, block_size=8, gradient_accumulation_steps=3, mode="epoch"), []
    changes = {0: {}, 5: {"batch_size": 7}, 6: {"gradient_accumulation_steps": 1}, 9: {}, 11: {"batch_size": 4,
               "gradient_accumulation_steps": 3}, 14: {"batch_size": 3, "gradient_accumulation_steps": 4}}  # fmt: skip
    for i in range(40):
        if i in changes:
            now, warning = going_on(replace(now, began=(0, 0), **changes[i]), settings(now), i)
            assert not warning
        for j in range(now.gradient_accumulation_steps):
            seen += offsets(now, n_blocks * 8 + 1, "train", i, j).tolist()
    assert now.began == (11, 5 * 12 + 21 + 5 * 7)
    unchanged = replace(now, began=(0, 0), batch_size=1, gradient_accumulation_steps=1)
    assert seen == [int(offsets(unchanged, n_blocks * 8 + 1, "train", i, 0)[0]) for i in range(len(seen))]
    assert sorted(seen[:n_blocks]) == [8 * i for i in range(n_blocks)]


def test_unchanged_settings_and_random_draws_begin_nowhere_else():
    for sampling in (SMALL, EPOCH):
        assert going_on(sampling, settings(sampling), 30) == (sampling, "")
        assert going_on(sampling, {}, 30) == (sampling, "")  # nanoGPT's own state
    other = replace(EPOCH, batch_size=9)
    assert going_on(other, settings(SMALL), 30) == (other, "")
    assert going_on(replace(SMALL, batch_size=9), settings(EPOCH), 30) == (replace(SMALL, batch_size=9), "")
    assert going_on(other, settings(EPOCH), 0) == (other, "")
    assert going_on(EPOCH, settings(EPOCH) | {"epoch_began": "x", "batch_size": "4"}, 30) == (EPOCH, "")


def test_another_seed_or_block_size_in_an_epoch_is_a_warning():
    now, warning = going_on(replace(EPOCH, seed=1), settings(EPOCH), 30)
    assert now.began == (0, 0)
    assert warning.startswith("sampling=epoch with seed=1 instead of 1337: this epoch goes on in another order")
    now, warning = going_on(replace(EPOCH, block_size=32), settings(EPOCH), 30)
    assert now.began == (30, 30 * 20 * 2)  # as many tokens
    assert "block_size=32 instead of 64" in warning


def test_iterations_before_the_change_are_drawn_as_they_were():
    assert offsets(replace(EPOCH, began=(9, 5)), N_TOKENS, "train", 7, 3).tolist() == [225792, 352384, 216960, 908224]


def test_epochs_have_different_orders():
    orders = {tuple(permute(np.arange(50), 50, 1, "train", np.full(50, epoch)).tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_epoch_order_looks_random():
    order = permute(np.arange(10_000), 10_000, 1, "train", np.zeros(10_000)).astype(np.int64)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03


def test_first_block_of_small_epochs_is_spread_over_all_blocks():
    firsts = [int(permute(np.array([0]), 7, 1, "train", np.array([epoch]))[0]) for epoch in range(1400)]
    assert all(140 < count < 260 for count in Counter(firsts).values())
    assert len(set(firsts)) == 7


@pytest.mark.parametrize(
    ("n_tokens", "iter_num", "micro_step"), [(64, 0, 0), (1000, -1, 0), (1000, 0, -1)], ids=["short", "iter", "micro"]
)
def test_impossible_offsets_are_refused(n_tokens, iter_num, micro_step):
    with pytest.raises(ValueError, match=r"block_size|negative"):
        offsets(SMALL, n_tokens, "train", iter_num, micro_step)

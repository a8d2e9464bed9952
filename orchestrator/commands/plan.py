"""Tell what a run needs of its GPUs, nodes, storage and network before it begins. Reads no weights, starts nothing."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.capacity.advice import Change, advise, flags_of
from orchestrator.capacity.cards import OFFERED, Card, card_of
from orchestrator.capacity.gpu import MARGIN, GpuMemory, gpu_memory, lanes_of
from orchestrator.capacity.node import NodeNeeds, node_needs
from orchestrator.capacity.shape import ModelShape, shape_of
from orchestrator.capacity.traffic import ASSUMED_MFU, RATES_GBIT, bytes_per_iteration, compute_s, network_s
from orchestrator.config import TrainConfig
from orchestrator.errors import ConfigError

_GB = 1e9
_SWITCHES = {"--json": True, "--json=True": True, "--json=False": False}


def own_flags(argv: Sequence[str]) -> tuple[str, bool, list[str]]:
    """Return --gpu, whether --json is set, and the other words, which are `train`'s.

    Raises:
        ConfigError: --gpu has no value.
    """
    gpu, is_json, others = "", False, []
    words = iter(argv)
    for word in words:
        if word == "--gpu":
            word = f"--gpu={next(words, '')}"
        if word.startswith("--gpu="):
            gpu = word.removeprefix("--gpu=")
            if not gpu:
                raise ConfigError(f"--gpu needs a card, {', '.join(OFFERED)}, or a size such as --gpu=24GB")
        elif word in _SWITCHES:
            is_json = _SWITCHES[word]
        else:
            others.append(word)
    return gpu, is_json, others


@dataclass(frozen=True)
class OnCard:
    """change: of settings, with which it fits; {} if it fits as it is, None if nothing that we know of helps."""

    card: Card
    memory: GpuMemory
    change: Change | None


@dataclass(frozen=True)
class Forecast:
    """What a run needs, on each of some cards. sizes: numbers of workers of its range that are worth a line."""

    config: TrainConfig
    shape: ModelShape
    cards: list[OnCard]
    node: NodeNeeds
    sizes: list[int]


def forecast(config: TrainConfig, model_args: dict[str, Any], gpu: str = "") -> Forecast:
    """Return a run's needs; gpu: the card, "" for all that we know.

    Raises:
        ConfigError: there is no such card.
    """
    shape = shape_of(config, model_args)
    cards = [card_of(name) for name in ([gpu] if gpu else OFFERED)]
    on_cards = [OnCard(card, gpu_memory(config, shape, card), advise(config, shape, card)) for card in cards]
    sizes = range(config.min_workers, config.max_workers + 1)
    busiest = max(sizes, key=lambda size: bytes_per_iteration(config, shape, size))
    node = node_needs(config, shape, max(each.memory.host_bytes for each in on_cards))
    return Forecast(config, shape, on_cards, node, sorted({config.min_workers, busiest, config.max_workers}))


def to_json(found: Forecast) -> str:
    """Return the forecast as one JSON object, sizes in bytes and times in seconds."""
    config, shape = found.config, found.shape
    cards = [
        {
            "name": each.card.name,
            "memory_bytes": each.card.memory_bytes,
            "items": each.memory.items,
            "total_bytes": each.memory.total,
            "when": each.memory.moment.when,
            "lane_buffers_in_host_memory_bytes": each.memory.host_bytes,
            "fits": each.change == {},
            "change": each.change,
        }
        for each in found.cards
    ]
    network = [
        {
            "workers": size,
            "bytes": bytes_per_iteration(config, shape, size),
            "seconds": {str(rate): network_s(config, shape, size, rate) for rate in RATES_GBIT},
            "compute_s": {
                each.card.name: compute_s(config, shape, size, each.card.flops)
                for each in found.cards
                if each.card.flops
            },
        }
        for size in ([] if config.eval_only else found.sizes)
    ]
    value = {
        "parameters": shape.base_params,
        "trained_parameters": shape.trained_params,
        "vocabulary": shape.vocab_size,
        "lanes": lanes_of(config),
        "margin": MARGIN,
        "assumed_mfu": ASSUMED_MFU,
        "cards": cards,
        "node": {f"{key}_bytes": size for key, size in asdict(found.node).items()},
        "network": network,
    }
    return json.dumps(value, indent=2)


def to_text(found: Forecast, words: Sequence[str] = ()) -> str:
    """Return the forecast for people, 80 columns wide; words: those of the command, for the line that fits."""
    parts = [_head(found), _gpu_lines(found), _card_lines(found), _node_lines(found)]
    if not found.config.eval_only:
        parts += [_network_lines(found), _compute_lines(found)]
    return "\n\n".join("\n".join(lines) for part in [*parts, _end(found, words)] if (lines := list(part)))


def _head(found: Forecast) -> Iterator[str]:
    config, shape = found.config, found.shape
    trained = f", of which {shape.trained_params / 1e6:.2f}M are trained" if shape.rank else ""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    workers = f"{config.min_workers} to {config.max_workers}" if config.is_elastic else f"{config.max_workers}"
    of_tokens = f"{config.batch_size} x {config.block_size} tokens"
    steps = f"micro-steps of {of_tokens}, {config.gradient_accumulation_steps} in an iteration"
    if config.eval_only:
        steps = f"evaluation alone, of {of_tokens} at a time"
    yield from _wrapped(
        f"{shape.base_params / 1e6:.0f}M parameters{trained}, vocabulary of {shape.vocab_size}; {workers} "
        f"{_count('worker', config.max_workers)}, {dtype}; {steps}"
    )


def _gpu_lines(found: Forecast) -> Iterator[str]:
    memory = found.cards[0].memory
    yield f"one GPU, in GB, when it holds most ({memory.moment.when})"
    for name, size in memory.items.items():
        if size:
            yield f"  {name:<30} {size / _GB:8.2f}"
    yield f"  {'together':<30} {memory.total / _GB:8.2f}"
    if memory.host_bytes:
        where = f"pinned, on {memory.workers} {_count('worker', memory.workers)}"
        yield f"  {'lane buffers in host memory':<30} {memory.host_bytes / _GB:8.2f}   {where}"


def _card_lines(found: Forecast) -> Iterator[str]:
    yield f"cards: none was measured, so we leave {MARGIN:.0%} of each free"
    for each in found.cards:
        assert each.card.memory_bytes
        sizes = f"{each.memory.total / _GB:7.2f} of {(1 - MARGIN) * each.card.memory_bytes / _GB:6.1f} GB"
        yield from _wrapped(f"  {each.card.name:<10} {sizes}   {_verdict(each.change)}", indent=36)


def _verdict(change: Change | None) -> str:
    if change is None:
        return "does not fit, whatever we change"
    return f"does not fit; with {flags_of(change)} it does" if change else "fits"


def _node_lines(found: Forecast) -> Iterator[str]:
    node, memory_dir = found.node, found.config.memory_dir
    yield "one node with one worker, and storage, in GB"
    if node.state:
        yield f"  {'a state':<30} {node.state / _GB:8.2f}"
    if node.memory_dir:
        yield f"  {memory_dir + ', two states':<30} {node.memory_dir / _GB:8.2f}"
    yield f"  {'host memory':<30} {node.host / _GB:8.2f}   in all, of it 4 an estimate"
    if node.storage:
        yield f"  {'out_dir, while one is saved':<30} {node.storage / _GB:8.2f}"


def _network_lines(found: Forecast) -> Iterator[str]:
    config, shape, lanes = found.config, found.shape, lanes_of(found.config)
    if config.max_workers == 1:
        return
    order = f"in {lanes} {_count('lane', lanes)}" if lanes else "in DDP's order"
    yield f"one iteration sends, each worker on a node of its own ({order}); seconds"
    yield f"  {'workers':>7} {'GB sent':>9}" + "".join(f"{f'{rate} Gbit/s':>12}" for rate in RATES_GBIT)
    for size in found.sizes:
        waits = "".join(f"{network_s(config, shape, size, rate):12.2f}" for rate in RATES_GBIT)
        yield f"  {size:>7} {bytes_per_iteration(config, shape, size) / _GB:9.3f}{waits}"


def _compute_lines(found: Forecast) -> Iterator[str]:
    config, shape = found.config, found.shape
    if not (cards := [each.card for each in found.cards if each.card.flops]):
        return
    peak = "TF32" if config.dtype == "float32" else "bfloat16"
    yield f"one iteration computes, in seconds, at {ASSUMED_MFU:.0%} of a card's {peak} peak (assumed)"
    yield f"  {'workers':>7}" + "".join(f"{card.name:>11}" for card in cards)
    for size in found.sizes:
        times = "".join(f"{compute_s(config, shape, size, card.flops or 1):11.2f}" for card in cards)
        yield f"  {size:>7}{times}"


def _end(found: Forecast, words: Sequence[str]) -> Iterator[str]:
    fitting = [each for each in found.cards if each.change is not None]
    as_it_is = [each for each in fitting if not each.change]
    if as_it_is:
        smallest = min(as_it_is, key=lambda each: each.card.memory_bytes or 0)
        yield f"it fits {smallest.card.name}" + ("" if len(found.cards) == 1 else ", the smallest of these that does")
    if fitting and fitting[0].change:
        change = flags_of(fitting[0].change)
        yield f"for {fitting[0].card.name}:"
        yield f"  orchestrator train {shlex.join(words)} {change}"  # one line, to copy
    if not fitting:
        yield from _wrapped("no change of settings that we know makes it fit: take a larger GPU or a smaller model")


def _count(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)

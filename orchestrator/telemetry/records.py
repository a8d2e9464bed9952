"""The records of a run: one frozen dataclass for each kind, and their JSON form.

    loop                 -> LoopRecord   on the screen, in metrics.jsonl, TensorBoard and W&B
    driver, controller   -> Event        in events.jsonl
    anybody              -> Note         on the screen alone
    controller           -> LossSeen     to the driver alone

Whoever makes a record makes its type, and whoever reads one asks for its type. Only the two files and the mailbox hold
JSON: `to_json` and `from_json` are theirs. A field without a default is always written. A field with one is left out
while it has that value. Must not know who writes or shows a record.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Any, ClassVar, get_args

# ---- the loop's; iter: the iteration that the record belongs to


@dataclass(frozen=True, kw_only=True)
class Begin:
    """An attempt begins, with the state `from_` (None: a new one); the fields behind it tell how that was read.

    lanes: in which gradients are summed, 0 for DDP's order. num_trained: of num_params, None for all.
    """

    kind: ClassVar = "begin"
    iter: int
    max_iters: int
    from_: str | None
    restore_s: float | None = None
    size_bytes: int | None = None
    from_storage_bytes: int | None = None
    num_params: int
    num_trained: int | None = None
    tokens_per_iter: int
    world_size: int
    device: str
    dtype: str
    lanes: int = 0


@dataclass(frozen=True, kw_only=True)
class LanesChanged:
    """From this iteration on gradients are summed in another order; lanes, before: their numbers, 0 for DDP's order."""

    kind: ClassVar = "lanes_changed"
    iter: int
    lanes: int
    before: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A logged iteration. mfu: 1.0 is the card's peak; tflops: TFLOP/s; None each while it is not known.

    grad_norm: of the global batch's gradient, before it is clipped; None in records of older versions.
    """

    kind: ClassVar = "step"
    iter: int
    loss: float
    lr: float
    dt_s: float
    mfu: float | None
    tflops: float | None
    tokens_per_s: float
    grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """`count` iterations in a row, up to `iter`: their seconds, and those of evaluations and pauses among them.

    snapshots: copies into node memory that were published meanwhile; snapshot_s, snapshot_bytes: of rank 0's shares.
    """

    kind: ClassVar = "steps"
    iter: int
    count: int
    step_s: float
    median_s: float | None
    longest_s: float | None
    eval_s: float
    pause_s: float
    snapshots: int = 0
    snapshot_s: float = 0.0
    snapshot_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StepSkipped:
    """A bad step, which no rank has taken. skipped: in all; in_a_row: up to this one."""

    kind: ClassVar = "step_skipped"
    iter: int
    why: str
    skipped: int
    in_a_row: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The losses of both splits; with eval_only also perplexity and, where the tokens are known, bits per byte."""

    kind: ClassVar = "eval"
    iter: int
    train_loss: float
    val_loss: float
    lr: float
    mfu: float | None
    tflops: float | None
    perplexity: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is committed in storage. seconds: the upload took; pause_s: training waited.

    size_bytes: of its tensors; None in records of older versions.
    """

    kind: ClassVar = "checkpoint"
    iter: int
    name: str
    seconds: float
    best_val_loss: float
    val_loss: float | None
    pause_s: float
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSkipped:
    """A checkpoint was due and a newer one has taken its place."""

    kind: ClassVar = "checkpoint_skipped"
    iter: int
    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be saved, and training goes on."""

    kind: ClassVar = "checkpoint_failed"
    iter: int
    name: str
    seconds: float
    why: str
    pause_s: float


@dataclass(frozen=True, kw_only=True)
class RollingBack:
    """The attempt ends here; the next one begins at to_iter and skips the data of skipped_iters iterations."""

    kind: ClassVar = "rollback"
    iter: int
    to_iter: int
    skipped_iters: int
    why: str


LoopRecord = (
    Begin
    | LanesChanged
    | Step
    | StepWindow
    | StepSkipped
    | Evaluation
    | CheckpointSaved
    | CheckpointSkipped
    | CheckpointFailed
    | RollingBack
)

# ---- the driver's and the controller's; number: of the attempt


@dataclass(frozen=True, kw_only=True)
class DriverStarted:
    """A driver holds the run's lease."""

    kind: ClassVar = "driver_started"
    start_id: str


@dataclass(frozen=True, kw_only=True)
class DriverEnded:
    """A driver ends. outcome: `finished`, or the name of the exception that ended it."""

    kind: ClassVar = "driver_ended"
    outcome: str


@dataclass(frozen=True, kw_only=True)
class AttemptStarting:
    """Ray Train asks for the resources of a group of workers."""

    kind: ClassVar = "attempt_starting"
    number: int
    num_workers: int


@dataclass(frozen=True, kw_only=True)
class AttemptWaiting:
    """The cluster has no room for a group. room: for so many workers; least: so many are needed."""

    kind: ClassVar = "attempt_waiting"
    room: int | None = None
    least: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptPlaced:
    """The workers of a group are on their nodes."""

    kind: ClassVar = "attempt_placed"
    number: int
    num_workers: int


@dataclass(frozen=True, kw_only=True)
class AttemptRunning:
    """The workers of a group run our code. nodes: host names by rank; None in records of older versions."""

    kind: ClassVar = "attempt_running"
    number: int
    num_workers: int
    nodes: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptEnded:
    """A group of workers is gone."""

    kind: ClassVar = "attempt_ended"
    number: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt fails. cause: one of worker/failure.py's, `resized` or `controller_lost`; node: where.

    reached_iter: the iteration whose state is safe; reached_at_s: when it was completed (seconds since 1970).
    """

    kind: ClassVar = "failure"
    number: int | None = None
    cause: str
    ranks: list[int] | None = None
    text: str
    node: str | None = None
    traceback: str | None = None
    rescue_s: float | None = None
    ranks_rescued: int | None = None
    reached_iter: int | None = None
    reached_at_s: float | None = None


Event = (
    DriverStarted
    | DriverEnded
    | AttemptStarting
    | AttemptWaiting
    | AttemptPlaced
    | AttemptRunning
    | AttemptEnded
    | Failure
)

# ---- what no file keeps


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line for people; level: logging's name, "" for a plain one."""

    kind: ClassVar = "note"
    level: str = ""
    text: str


@dataclass(frozen=True, kw_only=True)
class LossSeen:
    """The controller has seen an expected loss: Ray's own words about it are on their way to the driver."""

    kind: ClassVar = "loss_is_seen"


Record = LoopRecord | Event | Note | LossSeen


@dataclass(frozen=True)
class Stamped:
    """A record with its time (seconds since 1970) and its attempt, as it travels and as the files keep it.

    attempt: of an event, the driver's start_id, which the journal fills in. "" for a record that no file keeps.
    """

    record: Record
    time_s: float
    attempt: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the stamp's first."""
        return {"attempt": self.attempt, "time": self.time_s, **to_json(self.record)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Stamped | None:
        """Return the record of JSON values, None for a kind that this version does not know."""
        record = from_json(value)
        return cls(record, float(value["time"]), value["attempt"]) if record else None


@dataclass(frozen=True)
class Records:
    """What a run has told: events by time, metrics by iteration.

    superseded: steps and evaluations whose iteration was computed again later.
    left_out: file -> lines that are cut off, damaged, or of a kind that this version does not know.
    """

    events: list[Stamped]
    metrics: list[Stamped]
    superseded: list[Stamped]
    left_out: dict[str, int]


def _key(name: str) -> str:
    return name.removesuffix("_")  # `from` is a word of Python's


_TYPES: dict[str, type[Record]] = {each.kind: each for each in get_args(Record)}
# by annotation; null stands for NaN and for what an older version did not write
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int, NoneType),
    "float": (int, float, NoneType),
    "str": (str, NoneType),
    "list[int]": (list, NoneType),
    "list[str]": (list, NoneType),
}
# kind -> (name, key in JSON, value where that is missing, types); looked up here once, for runs have many records
_FIELDS: dict[str, list[tuple[str, str, Any, tuple[type, ...]]]] = {
    kind: [
        (
            each.name,
            _key(each.name),
            None if each.default is MISSING else each.default,
            _JSON_TYPES[str(each.type).removesuffix(" | None")],
        )
        for each in fields(its_type)
    ]
    for kind, its_type in _TYPES.items()
}


def to_json(record: Record) -> dict[str, Any]:
    """Return a record as JSON values, its kind first."""
    values = {each: getattr(record, each.name) for each in fields(record)}
    written = {_key(each.name): x for each, x in values.items() if each.default is MISSING or x != each.default}
    return {"kind": record.kind, **written}


def from_json(value: dict[str, Any]) -> Record | None:
    """Return the record of JSON values, None for a kind that this version does not know.

    We leave out keys of newer versions. A key that an older version did not write is None, or the field's default.
    """
    kind = value["kind"]
    if kind not in _TYPES:
        return None
    return _TYPES[kind](**{name: value.get(key, default) for name, key, default, _ in _FIELDS[kind]})


def is_known(value: dict[str, Any]) -> bool:
    """Return whether this version knows the kind of record that JSON values are of."""
    return value["kind"] in _TYPES


def has_right_types(value: dict[str, Any]) -> bool:
    """Return whether JSON values are of the types of their record's fields, and their numbers finite.

    None and unknown kinds pass.
    """
    return all(_fits(value.get(key), types) for _, key, _, types in _FIELDS.get(value["kind"], ()))


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, list) and list in types:
        return all(isinstance(each, int | str) for each in value)
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # JSON has integers of any size
        return False
    return isinstance(value, types)

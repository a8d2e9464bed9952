"""A plain process, or one of those that `torchrun` started, as its own driver: signals, errors, lines. Knows no Ray.

python -m orchestrator.loop configs/quickstart.py
torchrun --nproc_per_node=2 -m orchestrator.loop configs/quickstart.py
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
import torch.distributed as dist

from orchestrator.capacity.cards import Card
from orchestrator.capacity.gpu import lanes_of
from orchestrator.capacity.warning import memory_warning
from orchestrator.checkpoint.restore.beginning import beginning_of
from orchestrator.checkpoint.restore.init_from import told_finished
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check, parse
from orchestrator.distributed.device import resolve
from orchestrator.distributed.join import plain_world
from orchestrator.errors import FinishedRunError, StorageError, UserError
from orchestrator.host.signals import STOP_SIGNALS, on_stop_signals
from orchestrator.loop import train
from orchestrator.storage.run_folder import RunFolder, open_run_folder
from orchestrator.telemetry.display import quiet, until_nobody_reads
from orchestrator.telemetry.emit import open_telemetry
from orchestrator.telemetry.format import print_record, stopped_line
from orchestrator.telemetry.records import Note, Record
from orchestrator.training.attempt import Callbacks, Outcome, StopRequest
from orchestrator.training.lr_schedule import tell_doubts
from orchestrator.worker import environment as worker_environment
from orchestrator.worker.torchrun import PeerLossGuard
from orchestrator.worker.watchdog import be_outlasted

logger = logging.getLogger(__name__)

PROGRAM = "python -m orchestrator.loop"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code: 0 when it is finished, 130 when it was stopped, 2 for a user's mistake, 1 where
    storage fails."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if "RANK" in os.environ:
        for name, value in worker_environment.DEFAULTS.items():  # before CUDA and NCCL start
            os.environ.setdefault(name, value)
    for name in ("orchestrator", "model"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.WARNING)
    try:
        config = check(parse(TrainConfig, sys.argv[1:] if argv is None else argv, PROGRAM))
        if is_main:
            tell_doubts(config)
        outcome = _train(resolve(config))
    except FinishedRunError as finished:
        if is_main:
            print(finished)
        return 0
    except UserError as error:  # the same on all ranks, so that one line is enough
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if outcome.stopped and is_main:
        text = stopped_line(outcome.iter_num, config.max_iters, config.out_dir, eval_only=config.eval_only)
        _show(Note(text=text))
    return 130 if outcome.stopped else 0


def _show(record: Record) -> None:
    """Print a record's line; where nobody reads any more, as when Ctrl-C has ended a `| tee`, training goes on."""
    with until_nobody_reads():
        print_record(record)


def _train(config: TrainConfig) -> Outcome:
    world = plain_world(config)
    folder = world.collectively(open_run_folder, config)
    if finished := world.on_main(told_finished, config, CheckpointStore(folder)):
        raise FinishedRunError(finished)
    if world.is_main and (card := _card_of(world.device)):
        warn_of_memory(config, world.size, folder, card)
    be_outlasted()
    with (
        _stop_asked() as asked,
        open_telemetry(config, world, folder, lambda stamped: _show(stamped.record)) as emit,
        PeerLossGuard(config, world, folder) as guard,
    ):

        def stop_request() -> int:
            guard.beat()
            return StopRequest.STOP if asked else StopRequest.NONE

        return train(config, world, Callbacks(emit, stop_request=stop_request, ready=guard.guard), folder)


def _card_of(device: torch.device) -> Card | None:
    """Return a GPU by the name and memory that CUDA tells, None for a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Card(found.name, found.total_memory, flops=None)


def warn_of_memory(config: TrainConfig, size: int, folder: RunFolder, card: Card) -> None:
    """Warn of a run that probably does not fit a card, on so many ranks, as `orchestrator train` does.

    Faults of init_from and storage are the loop's to tell.
    """
    if "://" in config.init_from and config.init_from.endswith(".pt"):  # all of it would be fetched twice
        return
    lanes = config.lanes or (lanes_of(config) if config.is_elastic else 0)
    with suppress(UserError, StorageError):
        began, model_args = beginning_of(replace(config, num_workers=size, lanes=lanes), folder)
        if warning := memory_warning(began, model_args, [card]):
            logger.warning("%s", warning)


@contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """Lend the list of the signals that asked to stop: the loop finishes its iteration, saves and leaves.

    A second Ctrl-C interrupts at once; not under torchrun, which passes on the one that we have had from the terminal.
    """
    asked: list[int] = []
    is_under_torchrun = "RANK" in os.environ

    def on_signal(number: int) -> None:
        if asked and number == signal.SIGINT and not is_under_torchrun:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # the terminal may be gone
            quiet()
        if not asked and os.environ.get("RANK", "0") == "0":
            _show(Note(text="stopping: the iteration is finished and saved"))
        asked.append(number)

    with on_stop_signals(on_signal, stay_ignored=STOP_SIGNALS):
        yield asked


if __name__ == "__main__":
    sys.exit(main())

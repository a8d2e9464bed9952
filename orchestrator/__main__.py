"""The command line: `python -m orchestrator COMMAND`, the same as `orchestrator COMMAND`.

Each command imports what it needs when it runs, so that `--help` and mistyped words answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from orchestrator import __version__
from orchestrator.config import TrainConfig, check, nearest, parse
from orchestrator.errors import ConfigError, UserError

USAGE = """\
orchestrator: train nanoGPT models on Ray, on machines that come and go.

  orchestrator prepare NAME [--text=FILE ...]        make a dataset from text
  orchestrator train [configs/x.py] [--key=value]    train, or go on with what out_dir holds
  orchestrator sample --out_dir=RUN                  print text from a run, a ckpt.pt or GPT-2
  orchestrator export --out_dir=RUN --format=nanogpt --to=ckpt.pt
                                                     write a run for nanoGPT or Hugging Face
  orchestrator inspect --out_dir=RUN                 list what a run holds

`orchestrator COMMAND --help` lists a command's settings. Settings files and --key=value may come in any order and
number; the later one wins."""


def prepare(argv: Sequence[str]) -> int:
    """Make a dataset."""
    import tyro

    from orchestrator.data import prepare as preparing

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)
    config = tyro.cli(
        preparing.PrepareConfig, args=list(argv), prog="orchestrator prepare", use_underscores=True, config=options
    )
    print(preparing.prepare(config))
    return 0


def train(argv: Sequence[str]) -> int:
    """Train on Ray."""
    config = check(parse(TrainConfig, argv, "orchestrator train"))
    from orchestrator.launch import InterruptedRunError, RunFailedError, launch

    try:
        outcome = launch(config)
    except InterruptedRunError as stopped:
        print(stopped)
        return 130
    except RunFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print(f"done: {outcome.iter_num} iterations, best validation loss {outcome.best_val_loss:.4f}, in {config.out_dir}")
    print(_next_steps(config.out_dir))
    return 0


def _next_steps(out_dir: str) -> str:
    return f"""next:
  orchestrator sample --out_dir={out_dir}
  orchestrator inspect --out_dir={out_dir}
  orchestrator export --out_dir={out_dir} --format=nanogpt --to=ckpt.pt"""


def sample(argv: Sequence[str]) -> int:
    """Print text from a model."""
    from orchestrator import sample as sampling

    sampling.sample(parse(sampling.SampleConfig, argv, "orchestrator sample"))
    return 0


def export(argv: Sequence[str]) -> int:
    """Write a run for other programs."""
    from orchestrator import export as exporting

    print(exporting.export(parse(exporting.ExportConfig, argv, "orchestrator export")))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """List what a run holds."""
    from orchestrator import inspect as inspecting

    config = parse(inspecting.InspectConfig, argv, "orchestrator inspect")
    print(inspecting.inspect(config))
    print(_next_steps(config.out_dir))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "export": export,
    "inspect": inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(f"{words[0]}: no such command{nearest(words[0], COMMANDS)}\n\n{USAGE}")
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

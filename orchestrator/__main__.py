"""The command line: `python -m orchestrator COMMAND`, the same as `orchestrator COMMAND`.

Each command imports what it needs when it runs, so that `--help` and mistyped words answer at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from orchestrator import __version__
from orchestrator.config import TrainConfig, check, parse
from orchestrator.driver.resubmit import LOST
from orchestrator.errors import ConfigError, FinishedRunError, UserError, nearest
from orchestrator.host.streams import has_lost_its_reader
from orchestrator.storage.options import StorageSettings, redacted
from orchestrator.storage.paths import with_paths

C = TypeVar("C")

USAGE = """\
orchestrator: train nanoGPT models on Ray, on machines that come and go.

  orchestrator prepare NAME [--text=FILE ...]        make a dataset from text
  orchestrator train [configs/x.py] [--key=value]    train, or go on with what out_dir holds
  orchestrator plan [configs/x.py] [--key=value] [--gpu=A10G]
                                                     tell what a run needs, and whether it fits, before you pay
  orchestrator sample --out_dir=RUN                  print text from a run, a ckpt.pt or GPT-2
  orchestrator export --out_dir=RUN --format=nanogpt --to=ckpt.pt
                                                     write a run, a ckpt.pt or GPT-2 for nanoGPT, Hugging Face or peft
  orchestrator inspect --out_dir=RUN                 list what a run holds, or what a ckpt.pt is
  orchestrator report --out_dir=RUN                  where its time went: goodput, and every failure by phase

`orchestrator COMMAND --help` lists a command's settings. Settings files and --key=value may come in any order and
number; the later one wins."""

HELP = {
    "prepare": """\
Turn text into the token files of a dataset, nine tenths for training and one for validation, as nanoGPT splits it.

  orchestrator prepare quickstart                            it brings its own text, and needs no network
  orchestrator prepare mine --text book.txt 'more/*.txt'     your text, with GPT-2's tokens
  orchestrator prepare mine --text book.txt --tokenizer=char
  orchestrator prepare mine --text book.txt --tokenizer=llama-folder     a Hugging Face folder's own tokens
  orchestrator prepare mine --text 'books/*.txt' --end_of_text           the end-of-text token between files
  orchestrator prepare openwebtext                           as nanoGPT does (pip install '.[openwebtext]')
  orchestrator prepare openwebtext --text 'openwebtext/*.parquet'""",
    "train": """\
Train a GPT on Ray, on the cluster that this machine is in or on this machine alone; go on with what out_dir holds.

  orchestrator train configs/quickstart.py
  orchestrator train configs/quickstart.py --num_workers=1 --max_iters=2000
  orchestrator train my_model.py my_cluster.py --out_dir=s3://bucket/run

A settings file is Python that assigns the keys below (`batch_size = 12`), nanoGPT's own files included. Files and
--key=value come in any order and number; the later one wins. The same command, given again, goes on where it was.""",
    "plan": """\
Tell what a run needs before you pay for it: memory of a GPU and a node, storage, network, and whether it fits. Where it
does not, we look for the cheapest change of settings. We read no weights, start nothing and write nothing.

  orchestrator plan configs/finetune_gpt2_xl.py                   on every card that we know
  orchestrator plan configs/finetune_gpt2_xl.py --num_workers=2-8 --gpu=A10G
  orchestrator plan configs/finetune_gpt2_xl.py --gpu=24GB --json

--gpu is A10G, L4, A100-40, L40S, A100-80, H100 or a size such as 24GB; --json prints one JSON object. All other keys
are those of `train`, listed here. The figures come from formulas; we have measured them on a CPU, on no GPU.""",
    "sample": """\
Print text from a model as it is drawn.

  orchestrator sample --out_dir=out/quickstart
  orchestrator sample --out_dir=out/quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=100
  orchestrator sample --init_from=gpt2-xl --start=FILE:prompt.txt
  orchestrator sample --init_from=ckpt.pt
  orchestrator sample --init_from=out/quickstart --checkpoint=best
  orchestrator sample --out_dir=out/adapters --lora_base=gpt2-folder""",
    "export": """\
Write a model's state in a format that other programs read: a run's, a ckpt.pt's, or GPT-2 weights'.

  orchestrator export --out_dir=out/quickstart --format=nanogpt --to=ckpt.pt
  orchestrator export --out_dir=out/quickstart --format=hf --to=exported --checkpoint=best
  orchestrator export --out_dir=out/adapters --format=peft --to=exported     adapters alone; others merge them
  orchestrator export --init_from=ckpt.pt --format=hf --to=exported
  orchestrator export --init_from=gpt2 --to=gpt2.pt""",
    "inspect": """\
List the checkpoints that a run holds: iteration, validation loss, size, and which are the latest and the best.
Of a ckpt.pt, a Hugging Face folder or an adapter it tells the model, its tokenizer and how it is stored.

  orchestrator inspect --out_dir=out/quickstart
  orchestrator inspect --out_dir=s3://bucket/run --verify
  orchestrator inspect --init_from=ckpt.pt --verify""",
    "report": """\
Tell where the time of a run went: goodput, what the rest was lost to, and every failure by phase.

  orchestrator report --out_dir=out/quickstart
  orchestrator report --out_dir=s3://bucket/run --json
  orchestrator report --out_dir=out/quickstart --html=report.html        curves, timeline, goodput: for a browser
  orchestrator report --out_dir=out/quickstart --html=report.html --compare=out/other""",
}


def prepare(argv: Sequence[str]) -> int:
    """Make a dataset."""
    import tyro

    from orchestrator.data import prepare as preparing

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)
    config = tyro.cli(
        preparing.PrepareConfig,
        args=[word.removesuffix("=True") for word in argv if word not in ("--overwrite=False", "--end_of_text=False")],
        prog="orchestrator prepare",
        description=HELP["prepare"],
        use_underscores=True,
        config=options,
    )
    print(preparing.prepare(with_paths(config)))
    return 0


def train(argv: Sequence[str]) -> int:
    """Train on Ray."""
    config = check(_parse(TrainConfig, argv, "train"))
    if config.resubmit:
        from orchestrator.driver.resubmit import resubmit

        return resubmit([sys.executable, "-m", "orchestrator", "train", *argv, "--resubmit=False"])
    from orchestrator.driver import preflight

    try:
        planned = preflight.plan(config)  # before Ray is imported, so that a mistake is answered in two seconds
    except FinishedRunError as finished:  # a repeated job does not fail
        print(finished)
        print(_next_steps(config))
        return 0
    from orchestrator.driver.launch import InterruptedRunError, RunFailedError, RunLostError, run

    try:
        outcome = run(planned)
    except InterruptedRunError as stopped:
        _print(str(stopped))
        _write_page(config)
        return 130
    except RunFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        _write_page(config)
        return LOST if isinstance(failure, RunLostError) else 1
    print(f"done: {outcome.iter_num} iterations, best validation loss {outcome.best_val_loss:.4f}, in {config.out_dir}")
    print(_next_steps(config))
    _write_page(config)
    return 0


def _write_page(config: TrainConfig) -> None:
    """Write the page with pictures into out_dir, and say where it is; the run's exit code stays, whatever comes."""
    from orchestrator.commands.report_page import write_at_end

    with suppress(KeyboardInterrupt):  # Ctrl-C ends the waiting for storage
        if place := write_at_end(config):
            _print(f"report: {place}")


def _print(text: str) -> None:
    """Print a line at the end of a run, to nowhere if nobody reads any more."""
    from orchestrator.telemetry.display import until_nobody_reads

    with until_nobody_reads():
        print(text, flush=True)


def _next_steps(config: StorageSettings, source: str = "", lora: str = "") -> str:
    """Return commands to go on with: for out_dir, or for another source of a model; lora: the flags of its adapters."""
    program = _program()
    if source:
        model = shlex.join([f"--init_from={source}"])
        return f"""next:
  {program} sample {model}
  {program} train {model}{f" {lora}" if lora else ""} --out_dir=out/tuned
  {program} export {model} --format=hf --to=exported"""
    out_dir = shlex.join([f"--out_dir={config.out_dir}"])
    if config.storage_options:
        out_dir += f" --storage_options={redacted(config)['storage_options']}"
    return f"""next:
  {program} sample {out_dir}
  {program} inspect {out_dir}
  {program} export {out_dir} --format=nanogpt --to=ckpt.pt"""


def _program() -> str:
    """Return the words that start this program again from the same shell."""
    if Path(sys.argv[0]).name != "orchestrator":
        return "python -m orchestrator"
    return "orchestrator" if shutil.which("orchestrator") else os.path.relpath(sys.argv[0])


def plan(argv: Sequence[str]) -> int:
    """Tell what a run needs."""
    from orchestrator.checkpoint.restore.beginning import beginning_of
    from orchestrator.commands import plan as planning

    gpu, is_json, words = planning.own_flags(argv)
    config = check(_parse(TrainConfig, words, "plan"))
    found = planning.forecast(*beginning_of(config), gpu)
    print(planning.to_json(found) if is_json else planning.to_text(found, words))
    return 0


def sample(argv: Sequence[str]) -> int:
    """Print text from a model."""
    from orchestrator.commands import sample as sampling

    sampling.sample(_parse(sampling.SampleConfig, argv, "sample"))
    return 0


def export(argv: Sequence[str]) -> int:
    """Write a run for other programs."""
    from orchestrator.commands import export as exporting

    print(exporting.export(_parse(exporting.ExportConfig, argv, "export")))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """List what a run holds."""
    from orchestrator.commands import inspect_run as inspecting

    config = _parse(inspecting.InspectConfig, argv, "inspect")
    print(inspecting.inspect(config))
    source = "" if config.init_from == "resume" else config.init_from
    print(_next_steps(config, source, inspecting.lora_flags(config) if source else ""))
    return 0


def report(argv: Sequence[str]) -> int:
    """Tell where the time of a run went."""
    from orchestrator.commands import report as reporting

    print(reporting.report(_parse(reporting.ReportConfig, argv, "report")))
    return 0


def _parse(kind: type[C], argv: Sequence[str], command: str) -> C:
    return parse(kind, argv, f"orchestrator {command}", HELP[command])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "plan": plan,
    "sample": sample,
    "export": export,
    "inspect": inspect,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for a user's mistake, 1 for a failure, 3 for a lost cluster, 130 for
    Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("orchestrator").setLevel(logging.INFO)  # other packages' say too much
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not has_lost_its_reader(sys.stdout.fileno()):  # it is another pipe, or a connection
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"{words[0]}: no such command{nearest(words[0], COMMANDS)}\n\n{USAGE}")
    try:
        return COMMANDS[words[0]](words[1:])
    except SystemExit as end:  # tyro's: 0 after --help, 2 after a wrong flag
        return int(end.code or 0)


if __name__ == "__main__":
    sys.exit(main())

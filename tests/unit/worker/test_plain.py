"""`python -m orchestrator.loop`: a user's mistakes, Ctrl-C and SIGTERM, as the command line has them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.capacity.cards import Card
from orchestrator.capacity.warning import memory_warning
from orchestrator.checkpoint.restore.beginning import beginning_of
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig, check
from orchestrator.storage.run_folder import open_run_folder
from orchestrator.telemetry.format import print_record
from orchestrator.telemetry.records import Record, Step
from orchestrator.worker import plain
from tests.conftest import final_state
from tests.support.commands import flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n_head=3"], "error: n_embd=32 is not divisible by n_head=3"),
        (["--dataset=none"], "error: no dataset folder"),
        (["--block_size=100000"], "error: "),
        (["--init_from=resume"], "error: init_from=resume, but out_dir="),
        (["nothing.py"], "error: settings file nothing.py does not exist"),
        (["--out_dir=s4://bucket/run"], "s4://bucket/run: no such protocol"),
    ],
)
def test_a_users_mistake_is_a_line(
    tiny: TrainConfig, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plain.main([*flags(tiny), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not Path(tiny.out_dir).exists() or not any(Path(tiny.out_dir).glob("checkpoint_*"))


def test_of_several_ranks_the_first_tells_the_mistake(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert plain.main([*flags(tiny), "--n_head=3"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny: TrainConfig,
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def print_and_interrupt(record: Record) -> None:
        print_record(record)
        if isinstance(record, Step) and record.iter == 6:
            os.kill(os.getpid(), number)
            if number == signal.SIGHUP:
                raise OSError(errno.EIO, "the terminal is gone")

    with monkeypatch.context() as patch:
        patch.setattr(plain, "print_record", print_and_interrupt)
        assert plain.main(flags(tiny)) == 130
    assert capsys.readouterr().out.endswith(
        f"stopped at iteration 8 of 24, saved in {tiny.out_dir}; the same command goes on from there\n"
    )
    assert final_state(tiny.out_dir).iter_num == 8
    assert plain.main(flags(tiny)) == 0
    calm = replace(tiny, out_dir=str(tmp_path / "calm"))
    assert plain.main(flags(calm)) == 0
    assert tensors_equal(final_state(tiny.out_dir), final_state(calm.out_dir))


def test_what_nohup_ignores_stays_ignored(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(plain, "print_record", lambda _record: os.kill(os.getpid(), signal.SIGHUP))

    try:
        assert plain.main(flags(replace(tiny, max_iters=4))) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert final_state(tiny.out_dir).iter_num == 4


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_one_line_and_a_signal_saves(tiny: TrainConfig) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command = [*torchrun, "-m", "orchestrator.loop"]
    done = subprocess.run(
        [*command, *flags(replace(tiny, dataset="none"))], timeout=120, capture_output=True, check=False, text=True
    )
    assert done.stderr.count("error: no dataset folder") == 1
    assert "orchestrator/" not in done.stderr.replace("-m orchestrator", ""), "no traceback of ours"

    config = replace(tiny, max_iters=100_000, log_interval=10)
    with subprocess.Popen([*command, *flags(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout
        while b"iter 50:" not in running.stdout.readline():
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        said = running.communicate(timeout=60)[0].decode()
    assert "stopped at iteration" in said, said
    assert final_state(config.out_dir).iter_num > 50


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_gpu_that_is_too_small_is_told_before_training(
    tiny: TrainConfig, is_begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config, small = check(tiny), Card("NVIDIA Small", 10**9, None)
    if is_begun:
        assert plain.main(flags(config)) == 0
    folder = open_run_folder(config)
    caplog.clear()
    plain.warn_of_memory(config, 1, folder, Card("NVIDIA A10G", 24 * 10**9, None))
    assert not caplog.messages
    plain.warn_of_memory(config, 2, folder, small)  # NCCL's buffers are too much for it
    assert caplog.messages == [memory_warning(*beginning_of(replace(config, num_workers=2), folder), [small])]
    assert "NVIDIA Small has 1 GB" in caplog.text


def test_a_cpu_is_no_card_and_a_mistake_is_the_loops_to_tell(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert plain._card_of(torch.device("cpu")) is None
    small = Card("NVIDIA Small", 10**8, None)
    plain.warn_of_memory(replace(tiny, init_from="resume"), 1, open_run_folder(tiny), small)
    assert not caplog.records

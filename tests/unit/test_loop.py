"""The loop in one plain process: it learns, resumes with the same bits, and says what nanoGPT says."""

from __future__ import annotations

import errno
import logging
import math
import re
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator import loop
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.restore.init_from import told_finished
from orchestrator.checkpoint.save import upload as durable
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.config import TrainConfig
from orchestrator.data import dataset
from orchestrator.data.token_files import open_token_files
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, ConfigError, StorageError
from orchestrator.loop import train
from orchestrator.storage.run_folder import open_run_folder
from orchestrator.telemetry.format import line_of
from orchestrator.telemetry.records import CheckpointFailed, CheckpointSaved, Evaluation, Record, Step
from orchestrator.training import attempt
from orchestrator.training.attempt import Callbacks, Outcome, StopRequest, batch_order
from orchestrator.training.step import dropout_seed
from tests.conftest import in_steps
from tests.support.runs import checkpoints_in


def run(config: TrainConfig, stop_after: int | None = None, attempt: str = "a") -> tuple[Outcome, list[Record]]:
    records: list[Record] = []
    calls = iter(range(10**6))
    outcome = train(
        resolve(config),
        World(attempt=attempt),
        Callbacks(
            records.append,
            stop_request=in_steps(lambda: stop_after is not None and next(calls) >= stop_after),
        ),
    )
    return outcome, records


def last_state(config: TrainConfig) -> Any:
    store = checkpoints_in(config.out_dir)
    return store.read(store.select("latest"))


def test_it_learns_and_says_so_in_nanogpts_words(tiny: TrainConfig) -> None:
    outcome, records = run(replace(tiny, max_iters=120, lr_decay_iters=120))
    losses = {r.iter: r.val_loss for r in records if isinstance(r, Evaluation)}
    assert losses[0] == pytest.approx(math.log(tiny_vocab(tiny)), abs=0.2)
    assert outcome.best_val_loss == min(losses.values()) < losses[0] - 1
    lines = [line for record in records if (line := line_of(record))]
    assert lines[1].startswith("step 0: train loss 4.")
    assert any(re.fullmatch(r"iter 10: loss \d\.\d{4}, time \d+\.\d\dms", line) for line in lines), "on a CPU, no MFU"


def tiny_vocab(config: TrainConfig) -> int:
    return int(last_state(config).model_args["vocab_size"])


@pytest.mark.parametrize(
    ("trained", "change"),
    [
        ("tiny", {}),
        ("tiny", {"sampling": "epoch"}),
        ("tiny", {"dtype": "bfloat16"}),
        ("tiny", {"dtype": "float16"}),
        ("tiny", {"decay_lr": False}),
        ("adapters", {"dtype": "float16"}),
        ("adapters", {"lora_targets": "c_attn", "lora_base_dtype": "float32", "dropout": 0.0}),
        ("adapters", {"activation_checkpointing": True, "loss_chunk": 16}),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_bits(
    trained: str, change: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config: TrainConfig = request.getfixturevalue(trained)
    undisturbed = replace(config, out_dir=str(tmp_path / "undisturbed"), **change)
    disturbed = replace(config, **change)
    run(undisturbed)
    outcome, _ = run(disturbed, stop_after=9)
    assert outcome == Outcome(10, outcome.best_val_loss, stopped=True)
    outcome, records = run(disturbed, attempt="b")
    assert [r.iter for r in records if isinstance(r, Step)] == list(range(10, 24))
    assert tensors_equal(last_state(disturbed), last_state(undisturbed))
    assert last_state(disturbed).best_val_loss == last_state(undisturbed).best_val_loss
    assert last_state(disturbed).scaler == last_state(undisturbed).scaler
    assert bool(last_state(disturbed).scaler) == (change.get("dtype") == "float16")


def test_epochs_go_on_with_another_batch(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    drawn: dict[tuple[int, int], list[int]] = {}  # one that was drawn ahead and not used is drawn again
    real = dataset.offsets

    def noted(sampling: Any, n: int, split: Any, iter_num: int, micro_step: int, stream: Any) -> Any:
        starts = real(sampling, n, split, iter_num, micro_step, stream)
        if stream == "train":
            drawn[iter_num, micro_step] = starts.tolist()
        return starts

    monkeypatch.setattr(dataset, "offsets", noted)
    config = replace(tiny, sampling="epoch")
    run(config, stop_after=4)
    run(replace(config, batch_size=2, gradient_accumulation_steps=3), stop_after=2, attempt="b")  # 5 to 7
    assert "sampling=epoch goes on at block 80 of its order" in caplog.text
    assert last_state(config).config["epoch_began"] == [5, 80]
    caplog.clear()
    run(replace(config, batch_size=2, gradient_accumulation_steps=3, max_iters=10), attempt="c")
    assert "goes on at block" not in caplog.text
    assert last_state(config).config["epoch_began"] == [5, 80]
    seen = [start for (iter_num, _), starts in sorted(drawn.items()) if iter_num < 10 for start in starts]
    n_tokens = len(open_token_files(config.data_dir, config.dataset).splits["train"])
    one = replace(batch_order(config), batch_size=1, gradient_accumulation_steps=1)
    assert seen == [int(real(one, n_tokens, "train", i, 0)[0]) for i in range(5 * 16 + 5 * 6)]


def told_in_evaluation(at_iter: int, answer: int, after: int = 2) -> Any:
    """Return a stop_request that gives its answer in the evaluation of an iteration: at its `after`-th batch."""
    asked = {"steps": -1, "batches": 0}
    original = loop.seed_dropout

    def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
        asked.update(steps=iter_num, batches=0)
        original(dropout, seed, iter_num, micro_step)

    def stop_request() -> int:
        asked["batches"] += 1
        return answer if asked["steps"] == at_iter - 1 and asked["batches"] >= after else StopRequest.NONE

    return seed_dropout, stop_request, asked


@pytest.mark.parametrize(
    ("at_iter", "answer"),
    [
        pytest.param(8, StopRequest.STOP, marks=pytest.mark.slow),
        (16, StopRequest.PREEMPTED),
        pytest.param(24, StopRequest.STOP, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_is_broken_off_and_done_by_the_next_attempt(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_iter: int, answer: int
) -> None:
    undisturbed = replace(tiny, out_dir=str(tmp_path / "undisturbed"), eval_iters=50)
    disturbed = replace(tiny, eval_iters=50)
    run(undisturbed)
    with monkeypatch.context() as patch:
        seed_dropout, stop_request, asked = told_in_evaluation(at_iter, answer)
        patch.setattr(loop, "seed_dropout", seed_dropout)
        outcome = train(resolve(disturbed), World(attempt="a"), Callbacks(stop_request=stop_request))
    assert asked["batches"] < 5, "within a batch"
    assert (outcome.iter_num, outcome.stopped, outcome.preempted) == (at_iter, True, answer == StopRequest.PREEMPTED)
    (checkpoint,) = [each for each in checkpoints_in(tiny.out_dir).newest_first() if each.iter_num == at_iter]
    assert (checkpoint.is_evaluated, checkpoint.val_loss) == (False, None)
    assert told_finished(disturbed, checkpoints_in(tiny.out_dir)) == "", "at max_iters, too"

    outcome, records = run(disturbed, attempt="b")
    assert not outcome.stopped
    assert "is finished" in told_finished(disturbed, checkpoints_in(tiny.out_dir))
    assert [r.iter for r in records if isinstance(r, Evaluation)] == [*range(at_iter, 25, 8)]
    assert tensors_equal(last_state(disturbed), last_state(undisturbed))
    assert last_state(disturbed).best_val_loss == last_state(undisturbed).best_val_loss
    assert (
        checkpoints_in(tiny.out_dir).select("best").val_loss
        == checkpoints_in(undisturbed.out_dir).select("best").val_loss
    )


def test_a_stop_before_the_first_iteration_leaves_nothing(tiny: TrainConfig) -> None:
    outcome = train(resolve(tiny), World(attempt="a"), Callbacks(stop_request=lambda: StopRequest.STOP))
    assert outcome == Outcome(0, 1e9, stopped=True)
    assert checkpoints_in(tiny.out_dir).names() == []
    assert run(tiny, attempt="b")[0].iter_num == tiny.max_iters


def test_an_evaluation_alone_is_stopped_and_changes_nothing(tiny: TrainConfig) -> None:
    run(replace(tiny, max_iters=8))
    before = contents(tiny.out_dir)
    config = replace(tiny, eval_only=True, eval_iters=10**6)
    outcome = train(resolve(config), World(attempt="b"), Callbacks(stop_request=lambda: StopRequest.STOP))
    assert (outcome.stopped, outcome.iter_num) == (True, 8)
    assert contents(tiny.out_dir) == before


class Alone:
    """The least that a Parallelism has to be: one rank, no compiler, no DDP."""

    def __init__(self, net: nn.Module, n_micro_steps: int) -> None:
        self.net, self.micro_steps, self.weight = net, range(n_micro_steps), 1 / n_micro_steps

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = self.net(idx, targets)
        return logits, loss

    def accumulate(self, micro_step: int) -> AbstractContextManager[None]:
        assert micro_step in self.micro_steps
        return nullcontext()

    def clip(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float) -> Tensor:
        scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(self.net.parameters(), grad_clip)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()


def test_the_loop_asks_a_parallelism_for_no_more_than_its_protocol(tiny: TrainConfig, tmp_path: Path) -> None:
    run(tiny)
    other = resolve(replace(tiny, out_dir=str(tmp_path / "other")))
    opened = attempt.open_attempt(other, World(attempt="b"), open_run_folder(other), Callbacks())
    loop.iterate(opened, Alone(opened.state.model, tiny.gradient_accumulation_steps))
    assert tensors_equal(last_state(tiny), last_state(other))


def test_weights_follow_from_seed_and_data_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    run(tiny)
    torch.rand(5)  # a random state that something else has moved
    other = replace(tiny, out_dir=str(tmp_path / "other"))
    run(other)
    assert tensors_equal(last_state(tiny), last_state(other))
    reseeded = replace(tiny, out_dir=str(tmp_path / "reseeded"), seed=7)
    run(reseeded)
    assert not tensors_equal(last_state(tiny), last_state(reseeded))


def test_a_resumed_iteration_is_neither_evaluated_nor_saved_again(tiny: TrainConfig) -> None:
    run(replace(tiny, max_iters=8))
    _, records = run(replace(tiny, max_iters=9), attempt="b")
    assert [(r.kind, r.iter) for r in records] == [
        ("begin", 8), ("steps", 9), ("step", 8), ("eval", 9), ("checkpoint", 9), ("steps", 9),
    ]  # fmt: skip


def test_eval_only_evaluates_once_and_writes_nothing(tiny: TrainConfig) -> None:
    run(replace(tiny, max_iters=8))
    before = contents(tiny.out_dir)
    _, records = run(replace(tiny, eval_only=True), attempt="b")
    assert [r.kind for r in records] == ["begin", "eval"]
    assert contents(tiny.out_dir) == before


def contents(out_dir: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(out_dir).rglob("*") if path.is_file()}


def test_an_evaluation_has_no_moments_and_reads_none(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(replace(tiny, max_iters=8))
    begun: list[TrainState] = []
    original = attempt.restore_or_initialize
    monkeypatch.setattr(attempt, "restore_or_initialize", lambda *args: begun.append(original(*args)) or begun[-1])
    _, records = run(replace(tiny, eval_only=True), attempt="b")
    assert not begun[0].optimizer.state
    assert all(parameter.grad is None for parameter in begun[0].model.parameters())
    weights_bytes = sum(parameter.nbytes for parameter in begun[0].model.parameters())
    assert weights_bytes <= records[0].from_storage_bytes < 1.1 * weights_bytes
    assert tensors_equal(replace(last_state(tiny), optimizer={}), capture(begun[0]))


def test_an_evaluation_tells_perplexity_and_bits_per_byte(tiny: TrainConfig) -> None:
    run(replace(tiny, max_iters=8))
    _, (_, record) = run(replace(tiny, eval_only=True), attempt="b")
    files = open_token_files(tiny.data_dir, tiny.dataset)
    assert files.tokenizer
    tokens = files.splits["val"]
    text_bytes = len(files.tokenizer.decode(tokens).encode())
    assert record.perplexity == pytest.approx(math.exp(record.val_loss))
    assert record.bits_per_byte == pytest.approx(record.val_loss / math.log(2) * len(tokens) / text_bytes)
    line = line_of(record)
    assert line
    assert line.endswith(f", perplexity {record.perplexity:.3f}, {record.bits_per_byte:.4f} bits per byte")


def test_a_nanogpt_checkpoint_goes_on_with_optimizer_and_iteration(tiny: TrainConfig, tmp_path: Path) -> None:
    run(tiny)
    run(replace(tiny, out_dir=str(tmp_path / "first"), max_iters=12))
    first = replace(tiny, out_dir=str(tmp_path / "first"))
    write_nanogpt(last_state(first), str(tmp_path / "ckpt.pt"))
    imported = replace(tiny, out_dir=str(tmp_path / "imported"), init_from=str(tmp_path / "ckpt.pt"))
    _, records = run(imported)
    assert records[0].iter == 12
    assert tensors_equal(last_state(imported), last_state(tiny))


def test_resume_finds_nanogpts_own_file_in_out_dir(tiny: TrainConfig, tmp_path: Path) -> None:
    run(replace(tiny, max_iters=12))
    old = tmp_path / "nanogpt"
    write_nanogpt(last_state(tiny), str(old / "ckpt.pt"))
    _, records = run(replace(tiny, out_dir=str(old), init_from="resume"))
    assert records[0].iter == 12


def test_a_shorter_block_crops_positions_and_their_moments(tiny: TrainConfig, tmp_path: Path) -> None:
    run(replace(tiny, max_iters=4))
    write_nanogpt(last_state(tiny), str(tmp_path / "ckpt.pt"))
    cropped = replace(
        tiny, out_dir=str(tmp_path / "cropped"), init_from=str(tmp_path / "ckpt.pt"), block_size=8, max_iters=5
    )
    run(cropped)
    state = last_state(cropped)
    assert state.model_args["block_size"] == 8
    assert {state.model[k].shape[0] for k in state.model if "wpe" in k} == {8}
    assert {state.optimizer[k].shape[0] for k in state.optimizer if "wpe" in k} == {8}
    with pytest.raises(ConfigError, match="block_size=32 is over the model's"):
        run(replace(cropped, out_dir=str(tmp_path / "longer"), block_size=32))


def test_pretrained_weights_are_the_starting_point(tiny: TrainConfig, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=100))
    theirs.save_pretrained(tmp_path / "gpt2")
    config = replace(tiny, init_from=str(tmp_path / "gpt2"), max_iters=1, learning_rate=0.0001, decay_lr=False)
    run(config)
    state = last_state(config)
    assert (state.model_args["activation"], state.model_args["bias"], state.model_args["block_size"]) == (
        "gelu_tanh",
        True,
        16,
    )
    moved = (state.model["transformer.wte.weight"] - theirs.transformer.wte.weight).abs().max()
    assert 0 < moved < 1e-3


def test_other_surroundings_are_told(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    run(replace(tiny, max_iters=4))
    with caplog.at_level(logging.WARNING):
        run(replace(tiny, dtype="bfloat16", max_iters=5), attempt="b")
    assert "the last bits may differ from an undisturbed run's: dtype float32 -> bfloat16" in caplog.text


def test_saved_hyperparameters_stay_as_in_nanogpt(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    run(replace(tiny, max_iters=4))
    run(replace(tiny, max_iters=5, beta2=0.5), attempt="b")
    assert "the optimizer goes on as saved, as in nanoGPT: betas (0.9, 0.95) instead of (0.9, 0.5)" in caplog.text
    assert last_state(tiny).param_groups[0].betas == (0.9, 0.95)


def test_nothing_to_resume_is_an_error(tiny: TrainConfig) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither a checkpoint nor nanoGPT's ckpt\.pt"):
        run(replace(tiny, init_from="resume"))


def test_a_lost_checkpoint_does_not_end_the_run_but_a_lost_last_one_does(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = durable.write_file

    def refuse_all_but_the_last(fs: Any, path: str, *rest: Any) -> Any:
        if "checkpoint_00000012" not in path:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(fs, path, *rest)

    monkeypatch.setattr(durable, "write_file", refuse_all_but_the_last)
    outcome, records = run(replace(tiny, max_iters=12))
    assert outcome.iter_num == 12
    assert [r.iter for r in records if isinstance(r, CheckpointSaved)] == [12]
    (failed, *_) = [r for r in records if isinstance(r, CheckpointFailed)]
    assert "no space left on device" in failed.why
    with pytest.raises(StorageError, match=r"the last state could not be saved: rank 0: OSError: .* no space left"):
        run(replace(tiny, max_iters=16), attempt="b")


def test_settings_that_differ_from_the_saved_runs_are_told(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(replace(tiny, max_iters=4))
    assert "settings that differ" not in caplog.text
    run(replace(tiny, max_iters=5, learning_rate=0.02, dropout=0.0, grad_clip=0.5, memory_dir=""), attempt="b")
    told = "dropout 0.1 -> 0.0, learning_rate 0.01 -> 0.02, max_iters 4 -> 5, grad_clip 1.0 -> 0.5"
    assert f"settings that differ from the saved run's: {told}\n" in caplog.text


def test_dropout_seeds_are_frozen() -> None:
    seeds = [dropout_seed(1337, 0, 0), dropout_seed(1337, 1, 0), dropout_seed(1337, 0, 1)]
    assert seeds == [13582406009521608908, 16623927000384563079, 5041976786429857533]


def test_config_and_tokenizer_are_stored_with_the_state(tiny: TrainConfig) -> None:
    run(replace(tiny, max_iters=4))
    state = last_state(tiny)
    assert state.config["n_embd"] == tiny.n_embd
    assert state.config["tokenizer"]["kind"] == "char"
    assert asdict(tiny).keys() <= state.config.keys()


def test_no_micro_step_keeps_the_logits_of_the_one_before(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given, were_alive = list[weakref.ref[Tensor]](), list[bool]()

    class Watched:
        def __init__(self, model: Any) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            were_alive.append(any(each() is not None for each in given))
            logits, loss = self._model(idx, targets)
            given.append(weakref.ref(logits))
            return logits, loss

    wrap = loop.parallelize
    monkeypatch.setattr(loop, "parallelize", lambda *args: Watched(wrap(*args)))
    run(replace(tiny, max_iters=2))
    assert were_alive == [False] * 2 * tiny.gradient_accumulation_steps

"""nanoGPT's ckpt.pt: read as it is, written so that nanoGPT goes on from it."""

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from orchestrator.checkpoint.formats.nanogpt import parameter_shapes, plain, read_nanogpt, write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.errors import CheckpointError
from tests.support.golden import CKPT, EVAL_LOSS, EVAL_ROWS

NANOGPT_KEYS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def build(snapshot: Snapshot) -> GPT:
    model = GPT(GPTConfig(**snapshot.model_args))
    model.load_state_dict({**snapshot.model, HEAD: snapshot.model[EMBEDDING]})
    return model


def resume_as_nanogpt(path: Path) -> tuple[GPT, torch.optim.AdamW]:
    """Do what nanoGPT's train.py does with init_from=resume, written out: model, then AdamW by parameter number."""
    checkpoint = load(path)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    params = dict(model.named_parameters())
    decayed = [p for p in params.values() if p.dim() >= 2]
    others = [p for p in params.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer


def step(model: GPT, optimizer: torch.optim.AdamW, times: int) -> None:
    rows = torch.tensor(EVAL_ROWS)
    for i in range(times):
        batch = rows.roll(i, dims=0)[:4]
        _, loss = model(batch[:, :-1], batch[:, 1:])
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def rewritten(tmp_path: Path, change: Any) -> Path:
    """Return a copy of the golden file after a change to its content."""
    content = load(CKPT)
    change(content)
    path = tmp_path / "changed.pt"
    torch.save(content, path)
    return path


def test_real_checkpoint_has_the_recorded_loss() -> None:
    snapshot = read_nanogpt(CKPT)
    rows = torch.tensor(EVAL_ROWS)
    _, loss = build(snapshot)(rows[:, :-1], rows[:, 1:])
    assert loss is not None
    assert loss.item() == pytest.approx(EVAL_LOSS, abs=2e-6)
    assert (snapshot.iter_num, snapshot.config["dataset"]) == (800, "shakespeare_char")
    assert type(snapshot.best_val_loss) is float
    assert snapshot.best_val_loss == pytest.approx(2.3282694816589355)
    assert HEAD not in snapshot.model


def test_optimizer_state_carries_the_name_of_its_parameter() -> None:
    snapshot = read_nanogpt(CKPT)
    model, optimizer = resume_as_nanogpt(CKPT)
    for name, parameter in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][slot], snapshot.optimizer[f"{slot}.{name}"])
    assert snapshot.optimizer["step"].item() == 800
    assert [(g.lr, g.betas, g.eps, g.weight_decay) for g in snapshot.param_groups] == [
        (1e-4, (0.9, 0.99), 1e-8, 0.1),
        (1e-4, (0.9, 0.99), 1e-8, 0.0),
    ]


def test_parameter_order_is_that_of_the_model() -> None:
    for bias in (True, False):
        args = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": bias}
        model = GPT(GPTConfig(**args))
        assert list(parameter_shapes(args).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


def test_written_and_read_again_nothing_changes(tmp_path: Path) -> None:
    first = read_nanogpt(CKPT)
    write_nanogpt(first, tmp_path / "run" / "ckpt.pt")
    second = read_nanogpt(tmp_path / "run" / "ckpt.pt")
    assert tensors_equal(first, second)
    assert replace(first, model={}, optimizer={}) == replace(second, model={}, optimizer={})
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["ckpt.pt"]


def test_nanogpt_goes_on_from_the_written_file_with_the_same_bits(tmp_path: Path) -> None:
    write_nanogpt(read_nanogpt(CKPT), tmp_path / "ckpt.pt")
    ends = []
    for path in (CKPT, tmp_path / "ckpt.pt"):
        model, optimizer = resume_as_nanogpt(path)
        step(model, optimizer, times=3)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0][EMBEDDING], load(CKPT)["model"][EMBEDDING])


def test_written_file_has_nanogpts_keys_and_plain_types(tmp_path: Path) -> None:
    snapshot = replace(read_nanogpt(CKPT), config={"device": "cpu", "path": Path("/x"), "betas": (1, 2.5), "n": None})
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    ours, theirs = load(tmp_path / "ckpt.pt"), load(CKPT)
    assert ours.keys() == NANOGPT_KEYS
    assert ours["model_args"] == theirs["model_args"]
    assert ours["config"] == {"device": "cpu", "path": "/x", "betas": [1, 2.5], "n": None}
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["model"][HEAD].data_ptr() == ours["model"][EMBEDDING].data_ptr()
    assert (tmp_path / "ckpt.pt").stat().st_size < 1.02 * CKPT.stat().st_size


def test_a_gpu_run_is_resumed_with_the_fused_optimizer_that_nanogpt_makes(tmp_path: Path) -> None:
    snapshot = replace(read_nanogpt(CKPT), config={"device": "cuda"})
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    model, optimizer = resume_as_nanogpt(tmp_path / "ckpt.pt")
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    step(model, optimizer, times=1)


def test_unstepped_or_model_only_state_resumes_with_new_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = read_nanogpt(CKPT, model_only=True)
    assert snapshot.optimizer == {}
    assert snapshot.param_groups == ()
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    assert "no optimizer moments" in caplog.text
    model, optimizer = resume_as_nanogpt(tmp_path / "ckpt.pt")
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3  # learning_rate of the run's config
    step(model, optimizer, times=1)
    assert read_nanogpt(tmp_path / "ckpt.pt").optimizer == {}


def test_variants_of_nanogpts_files_are_accepted(tmp_path: Path) -> None:
    def compiled_with_masks_and_without_optimizer(content: dict[str, Any]) -> None:
        mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}
        content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in (content["model"] | mask).items()}
        content["best_val_loss"] = 2.5
        del content["optimizer"]

    path = rewritten(tmp_path, compiled_with_masks_and_without_optimizer)
    snapshot = read_nanogpt(path)
    path.unlink()  # the snapshot does not need the file any more
    assert tensors_equal(snapshot, read_nanogpt(CKPT, model_only=True))
    assert snapshot.best_val_loss == 2.5


def test_a_url_is_read_and_written() -> None:
    snapshot = read_nanogpt(CKPT)
    write_nanogpt(snapshot, "memory://nanogpt-format/run/ckpt.pt")
    assert tensors_equal(snapshot, read_nanogpt("memory://nanogpt-format/run/ckpt.pt"))


def test_tanh_activation_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = read_nanogpt(CKPT)
    snapshot.model_args["activation"] = "gelu_tanh"
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "0.02" in warning.getMessage()
    assert "activation" not in load(tmp_path / "ckpt.pt")["model_args"]


def test_any_flipped_bit_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    raw = bytearray(CKPT.read_bytes())
    raw[len(raw) // 2] ^= 1  # torch.load itself would not mind
    path = tmp_path / "ckpt.pt"
    path.write_bytes(raw)
    load(path)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt is damaged: the checksum of its record ckpt/data/\d+"):
        read_nanogpt(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cut off or not a file of torch.save's"),
        (b"hello", "cut off or not a file of torch.save's"),
        (CKPT.read_bytes()[:600_000], "cut off or not a file of torch.save's"),
        (pickle.dumps({"model": 1}), "cut off or not a file of torch.save's"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_nanogpt(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such file"):
        read_nanogpt(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such file"):
        read_nanogpt("memory://nanogpt-format/nowhere.pt")
    with pytest.raises(CheckpointError, match="nothing://"):
        read_nanogpt("nothing://ckpt.pt")


class Trap:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a checkpoint was run",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(config=Trap()), "nothing is run from a checkpoint"),
        (lambda c: c.pop("model_args"), "no 'model_args' in it"),
        (lambda c: c["model_args"].pop("n_head"), "model_args lacks n_head, and no tensor tells it"),
        (lambda c: c["model"].pop("transformer.wpe.weight"), r"missing transformer\.wpe\.weight"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "unexpected extra"),
        (lambda c: c["model_args"].update(n_embd=32), r"\(65, 64\) instead of \(65, 32\)"),
        (lambda c: c["model"].update({HEAD: torch.zeros(65, 64)}), "differs from"),
        (lambda c: c.update(model=3), "not laid out as nanoGPT's"),
        (lambda c: c["optimizer"]["param_groups"].pop(), "not that of nanoGPT's AdamW"),
        (lambda c: c["optimizer"]["state"].pop(3), "not that of nanoGPT's AdamW"),
        (lambda c: c["optimizer"]["state"][3].pop("exp_avg"), "not that of nanoGPT's AdamW"),
        (lambda c: c["optimizer"]["state"][3].update(step=torch.tensor(3.0)), "stepped differently often"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_nanogpt(rewritten(tmp_path, change))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt.pt"
    snapshot = read_nanogpt(CKPT)
    write_nanogpt(snapshot, path)

    def disk_full(_: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_nanogpt(snapshot, path)
    assert tensors_equal(snapshot, read_nanogpt(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_nanogpt_does_not_have_is_refused(tmp_path: Path) -> None:
    snapshot = read_nanogpt(CKPT)
    short = replace(snapshot, model={EMBEDDING: snapshot.model[EMBEDDING]})
    with pytest.raises(CheckpointError, match=r"missing transformer\.wpe\.weight.*and 9 more"):
        write_nanogpt(short, tmp_path / "ckpt.pt")
    one_group = (replace(snapshot.param_groups[0], params=tuple(snapshot.model)),)
    with pytest.raises(CheckpointError, match="groups are not nanoGPT's two"):
        write_nanogpt(replace(snapshot, param_groups=one_group), tmp_path / "ckpt.pt")
    assert not any(tmp_path.iterdir())


def test_plain_values() -> None:
    value = {1: torch.tensor(2.0), "nan": float("nan"), "set": {3}, "flag": True, "list": (None, "x")}
    assert plain(value) == {"1": 2.0, "nan": None, "set": "{3}", "flag": True, "list": [None, "x"]}

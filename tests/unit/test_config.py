"""TrainConfig's keys, and nanoGPT's grammar for giving them."""

from __future__ import annotations

import dataclasses
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from orchestrator.__main__ import main
from orchestrator.config import TrainConfig, check, parse
from orchestrator.errors import ConfigError
from orchestrator.settings.bounds import AT_LEAST_0, AT_LEAST_1, bounds_of

# Source: the defaults at the head of nanoGPT's train.py, but for dtype, which it chooses by what the GPU can do.
NANOGPT = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "compile": True,
}

TRAIN_GPT2 = """\
# for a machine with 8 GPUs:
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'

# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300B tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
"""

FINETUNE_SHAKESPEARE = """\
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model

always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
"""

EVAL_GPT2 = """\
batch_size = 8
eval_iters = 500 # use more iterations to get a good estimate
eval_only = True
wandb_log = False
init_from = 'gpt2'
"""

TRAIN_SHAKESPEARE_CHAR = """\
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # context of up to 256 previous characters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
"""


def parsed(*argv: str | Path) -> TrainConfig:
    return parse(TrainConfig, [str(word) for word in argv], "orchestrator train")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(content: str, name: str = "settings.py") -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write_file


def test_nanogpt_keys_have_nanogpt_defaults() -> None:
    config = dataclasses.asdict(parsed())
    assert {key: config[key] for key in NANOGPT} == NANOGPT
    assert config["dtype"] == "auto"


def test_defaults_are_in_range() -> None:
    assert check(TrainConfig()) == TrainConfig()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (TRAIN_GPT2, {"wandb_run_name": "gpt2-124M", "gradient_accumulation_steps": 40, "weight_decay": 0.1}),
        (FINETUNE_SHAKESPEARE, {"init_from": "gpt2-xl", "learning_rate": 3e-5, "decay_lr": False, "max_iters": 20}),
        (EVAL_GPT2, {"batch_size": 8, "eval_iters": 500, "eval_only": True, "init_from": "gpt2", "max_iters": 600000}),
        (TRAIN_SHAKESPEARE_CHAR, {"block_size": 256, "dropout": 0.2, "beta2": 0.99, "n_embd": 384, "device": "cuda"}),
    ],
    ids=["train_gpt2", "finetune_shakespeare", "eval_gpt2", "train_shakespeare_char"],
)
def test_nanogpt_settings_load_unchanged(write: Any, content: str, expected: dict[str, Any]) -> None:
    config = check(parsed(write(content)))
    assert {key: getattr(config, key) for key in expected} == expected


def test_expressions_of_python_are_values(write: Any) -> None:
    config = parsed(write("import time\nbatch_size = 5 * 8\nwandb_run_name = 'ft-' + str(time.time())\n"))
    assert config.batch_size == 40
    assert re.fullmatch(r"ft-\d+\.\d+", config.wandb_run_name)


@pytest.mark.parametrize(
    ("order", "expected"), [("ab", 2), ("ba", 1), ("af", 3), ("fa", 1), ("abf", 3), ("afb", 2), ("fab", 2)]
)
def test_the_later_one_wins(write: Any, order: str, expected: int) -> None:
    words = {"a": write("max_iters = 1", "a.py"), "b": write("max_iters = 2", "b.py"), "f": "--max_iters=3"}
    assert parsed(*(words[letter] for letter in order)).max_iters == expected


def test_a_file_sees_what_stands_so_far(write: Any) -> None:
    assert parsed("--max_iters=100", write("lr_decay_iters = max_iters")).lr_decay_iters == 100


def test_setting_a_key_back_to_its_default(write: Any) -> None:
    assert parsed("--n_layer=3", write("n_layer = 12")).n_layer == 12


def test_flags_with_and_without_equals_sign(write: Any) -> None:
    config = parsed("--max_iters", "7", write("n_layer = 3"), "--dropout=0.5", "--bias", "True")
    assert (config.max_iters, config.n_layer, config.dropout, config.bias) == (7, 3, 0.5, True)


def test_a_flag_without_a_value_turns_on_what_is_on_or_off(write: Any) -> None:
    file = write("n_layer = 3")
    for words in (["--bias"], ["--bias", file], ["--bias", "--max_iters=7"], ["--bias=False", "--bias"]):
        assert parsed(*words).bias is True
    assert parsed("--bias", file).n_layer == 3
    assert parsed("--always-save-checkpoint", "False").always_save_checkpoint is False
    assert parsed("--activation-checkpointing").activation_checkpointing is True
    with pytest.raises(SystemExit):
        parsed("--max_iters")


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--compile=False", "compile", False),
        ("--dtype=bfloat16", "dtype", "bfloat16"),
        ("--gpus_per_worker=None", "gpus_per_worker", None),
        ("--gpus_per_worker=0.5", "gpus_per_worker", 0.5),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--max_failures=-1", "max_failures", -1),
        ("--dataset=a=b", "dataset", "a=b"),
    ],
)
def test_flag_has_the_type_of_its_key(word: str, key: str, value: Any) -> None:
    found = getattr(parsed(word), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("max_iters = 6e5", "max_iters", 600000),
        ("dropout = 0", "dropout", 0.0),
        ("gpus_per_worker = 1", "gpus_per_worker", 1.0),
        ("gpus_per_worker = None", "gpus_per_worker", None),
        ("dtype = 'float16'", "dtype", "float16"),
        ("_steps = [1, 2]; max_iters = sum(_steps)", "max_iters", 3),
        ("def double(x): return 2 * x\nmax_iters = double(4)", "max_iters", 8),
        ("for i in range(2): pass", "max_iters", 600000),
        ("for i, (a, b) in enumerate([(1, 2)]): max_iters = a + b", "max_iters", 3),
        ("if (n := 5) > 3: max_iters = n", "max_iters", 5),
        ("import io\nwith io.StringIO('7') as file: max_iters = int(file.read())", "max_iters", 7),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    max_iters = 9", "max_iters", 9),
    ],
)
def test_value_in_a_file_has_the_type_of_its_key(write: Any, line: str, key: str, value: Any) -> None:
    found = getattr(parsed(write(line)), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layer = 2\nmax_itres = 3\n", "line 2: max_itres=3: no such setting; did you mean max_iters?"),
        ("for max_itres in (1, 2): pass\nmax_itres = 3\n", "line 2: max_itres=3: no such setting"),
        ("globals()['max_itres'] = 3", "line 1: max_itres=3: no such setting; did you mean max_iters?"),
        ("gpus_per_wroker = None", "line 1: gpus_per_wroker=None: no such setting; did you mean gpus_per_worker?"),
        ("\n\nmax_iters = '3'", "line 3: max_iters='3' should be of type int"),
        ("max_iters = 3.5", "line 1: max_iters=3.5 should be of type int"),
        ("max_iters = True", "line 1: max_iters=True should be of type int"),
        ("bias = 1", "line 1: bias=1 should be of type bool"),
        ("gpus_per_worker = 'one'", "line 1: gpus_per_worker='one' should be of type float or NoneType"),
        ("dtype = 'float61'", "line 1: dtype='float61' is none of auto, float32, bfloat16, float16; did you mean"),
        ("batch_size = 4\ndropout = 1.5", "line 2: dropout=1.5 is out of range: from 0 up to, not including, 1"),
        ("max_iters = (1\n", "line 1: '(' was never closed"),
        ("batch_size = 4\nmax_iters = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("import no_such_package", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit(0)", "line 1: SystemExit: 0"),
    ],
)
def test_mistake_in_a_file_is_located(write: Any, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        parsed(path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.py"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"settings\.py cannot be read: 'utf-8' codec"):
        parsed(path)


def test_missing_file_names_the_nearest(write: Any) -> None:
    path = write("", "train_gpt2.py")
    with pytest.raises(ConfigError, match=f"train_gtp2.py does not exist; did you mean {path}"):
        parsed(path.with_name("train_gtp2.py"))


def test_forgotten_dashes() -> None:
    with pytest.raises(ConfigError, match="max_iters=3 does not exist; did you mean --max_iters=3"):
        parsed("max_iters=3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_iters": -1}, "max_iters=-1 is out of range: 0 or more"),
        ({"dropout": 1.5}, "dropout=1.5 is out of range"),
        ({"dropout": float("nan")}, "dropout=nan is out of range"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is out of range: more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is out of range"),
        ({"num_workers": "8-2"}, "num_workers='8-2' is out of range: 1 or more, or a range such as 2-8"),
        *(
            ({"num_workers": x}, "is out of range: 1 or more, or a range")
            for x in ("2-", "-2", "2-3-4", "0-2", "x", "")
        ),
        ({"seed": 2**64}, r"seed=18446744073709551616 is out of range: from 0 to 2\*\*64 - 1"),
        ({"num_workers": -6}, "num_workers=-6 is out of range: 1 or more, or a range such as 2-8"),
        ({"num_workers": "2-41"}, "num_workers=2-41 is more than gradient_accumulation_steps=40"),
        ({"block_size": 0}, "block_size=0 is out of range: 1 or more"),
        ({"max_failures": -2}, "max_failures=-2 is out of range"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 is out of range"),
        ({"out_dir": ""}, "out_dir='' is out of range"),
        ({"out_dir": "s3://"}, "out_dir='s3://' is out of range"),
        ({"dataset": "."}, "dataset='.' is out of range"),
        ({"device": "cuda:x"}, "device='cuda:x' is out of range: cpu, cuda or cuda:<index>"),
        ({"n_embd": 33, "n_head": 2}, "n_embd=33 is not divisible by n_head=2"),
        ({"num_workers": 41}, "num_workers=41 is more than gradient_accumulation_steps=40"),
        ({"init_from": "gtp2-xl"}, "init_from='gtp2-xl' is neither scratch, .* did you mean gpt2-xl"),
    ],
)
def test_check_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(TrainConfig(**settings))


@pytest.fixture(scope="module")
def help_boxes() -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "120")  # from 130 on tyro puts boxes side by side
        assert main(["train", "--help"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def help_text(help_boxes: str) -> str:
    return " ".join(help_boxes.replace("│", " ").split())


def test_help_groups_the_keys_under_titles(help_boxes: str) -> None:
    keys: dict[str, list[str]] = {}
    for line in help_boxes.splitlines():
        if title := re.match(r"\W+(\w+) options ", line):
            keys[title[1]] = []
        elif key := re.match(r"\W+--(\w+) ", line.replace("-h, --help", "")):
            keys[list(keys)[-1]].append(key[1])
    assert list(keys) == ["run", "data", "model", "LoRA", "optimizer", "cluster", "recovery", "checkpoints", "logging"]
    assert [key for group in keys.values() for key in group] == [
        field.name for field in dataclasses.fields(TrainConfig)
    ]
    for title, key in [("run", "out_dir"), ("data", "dataset"), ("model", "n_layer"), ("optimizer", "max_iters")]:
        assert key in keys[title]
    for title, key in [("cluster", "num_workers"), ("recovery", "max_failures"), ("logging", "wandb_log")]:
        assert key in keys[title]


def test_help_shows_what_files_and_flags_before_it_have_set(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write("n_layer = 3")), "--n_head=5", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "transformer blocks (default: 3)" in shown


def test_bounds_stand_in_the_fields() -> None:
    bounds = bounds_of(TrainConfig)
    assert bounds["batch_size"] is AT_LEAST_1
    assert bounds["gpus_per_worker"] is AT_LEAST_0
    assert {"bias", "dtype", "init_from"}.isdisjoint(bounds)


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_help_explains_every_key(help_text: str, field: dataclasses.Field[Any]) -> None:
    default = str(field.default) or "''"
    entry = re.search(rf"--{field.name} (.+?)\(default: {re.escape(default)}\)", help_text)
    assert entry, f"{field.name} or its default is missing"
    assert "(default:" not in entry[1], f"{field.name} shows another key's default"
    kind, _, words = entry[1].strip().partition(" ")
    assert kind.strip("{}")
    assert len(words.split()) >= 2, f"{field.name} has no help text"


def test_number_of_workers() -> None:
    fixed, elastic = (parse(TrainConfig, [f"--num_workers={n}"], "x") for n in ("3", "2-8"))
    assert (fixed.num_workers, fixed.min_workers, fixed.max_workers, fixed.is_elastic) == (3, 3, 3, False)
    assert (elastic.num_workers, elastic.min_workers, elastic.max_workers, elastic.is_elastic) == ("2-8", 2, 8, True)

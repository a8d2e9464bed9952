"""What all tests share: no GPU, no token files in the home folder, a tiny dataset and tiny settings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.support.runs import checkpoints_in

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or a local cluster writes a token into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from fsspec import get_filesystem_class

from benchmarks.browser import Browser, BrowserMissingError
from benchmarks.topics import prepare_topics
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import DataError
from orchestrator.loop import train
from tests.support.proxy import FaultyProxy
from tests.support.servers import S3Server, ServerMissingError, SFTPServer


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the dataset `tiny`: some English of the Python manual, by characters."""
    folder = tmp_path_factory.mktemp("data")
    prepare_topics("tiny", folder)
    return str(folder)


@pytest.fixture(scope="session")
def memory_dir() -> Iterator[str]:
    """Node memory of the tests' own, so that what is killed leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-tests-", dir="/dev/shm") as folder:
        yield folder


@pytest.fixture
def tiny(data_dir: str, memory_dir: str, tmp_path: Path) -> TrainConfig:
    """Settings of a run that takes milliseconds per iteration; dropout is on, so that its seeds matter."""
    return tiny_settings(data_dir, memory_dir, tmp_path / "run")


@pytest.fixture
def adapters(tiny: TrainConfig, base_run: str) -> TrainConfig:
    """Settings of such a run that trains adapters, with all that may make a difference to them."""
    return replace(
        tiny,
        init_from=base_run,
        lora_rank=2,
        lora_dropout=0.1,
        lora_targets="all-linear",
        lora_base_dtype="bfloat16",
    )


@pytest.fixture(scope="session")
def base_run(data_dir: str, memory_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run of two iterations, whose weights are the base model of adapters."""
    config = tiny_settings(data_dir, memory_dir, tmp_path_factory.mktemp("base") / "run")
    train(resolve(replace(config, max_iters=2)), World(attempt="base"))
    return config.out_dir


def tiny_settings(data_dir: str, memory_dir: str, out_dir: Path) -> TrainConfig:
    return TrainConfig(
        out_dir=str(out_dir),
        data_dir=data_dir,
        dataset="tiny",
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=16,
        batch_size=4,
        gradient_accumulation_steps=4,
        dropout=0.1,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=2,
        lr_decay_iters=24,
        max_iters=24,
        eval_interval=8,
        eval_iters=4,
        checkpoint_interval=4,
        memory_dir=memory_dir,
        device="cpu",
        compile=False,
        cpus_per_worker=0.5,
    )


Undisturbed = Callable[[TrainConfig, int], Snapshot]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The final state of a tiny run that nothing happens to, with torchrun instead of Ray, for any world size."""
    known: dict[tuple[int | str, ...], Snapshot] = {}

    def final(config: TrainConfig, world_size: int) -> Snapshot:
        lanes = (config.lanes, config.gradient_accumulation_steps, config.deterministic)
        lora = (config.lora_rank, config.lora_targets, config.lora_base_dtype)
        key = (world_size, config.max_iters, *lanes, *lora)
        if key not in known:
            out_dir = str(tmp_path_factory.mktemp("undisturbed") / "run")
            train_with_torchrun(replace(config, out_dir=out_dir), world_size)
            known[key] = final_state(out_dir)
        return known[key]

    return final


def train_with_torchrun(config: TrainConfig, world_size: int) -> None:
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = subprocess.run([*command, "-m", "orchestrator.loop", *flags], timeout=600, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def in_steps(stop_request: Callable[[], int]) -> Callable[[], int]:
    """Return a stop_request whose calls count iterations: in an evaluation, with every batch, it answers 0."""
    return lambda: 0 if sys._getframe(1).f_code.co_name == "evaluate" else stop_request()


def final_state(out_dir: str) -> Snapshot:
    store = checkpoints_in(out_dir)
    return store.read(store.select("latest"))


@dataclass(frozen=True)
class Storage:
    """A folder of one test's own on a server: its URL, and what a user would give besides."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests; one that kills it starts it again."""
    folder = tmp_path_factory.mktemp("s3") / "files"
    folder.mkdir()
    try:
        server = S3Server(folder)
    except ServerMissingError as missing:
        pytest.skip(str(missing))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def sftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SFTPServer]:
    """An SFTP server for all tests; one that kills it starts it again."""
    try:
        server = SFTPServer(tmp_path_factory.mktemp("sftp"))
    except ServerMissingError as missing:
        pytest.skip(str(missing))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A new folder in the bucket; the server's address and credentials are in the environment."""
    s3_server.ensure()
    enter(monkeypatch, s3_server.environment)
    return Storage(f"{s3_server.url}/{tmp_path.name}")


@pytest.fixture
def sftp(sftp_server: SFTPServer, tmp_path: Path) -> Storage:
    """A new folder on the SFTP server, with the key file in the options."""
    sftp_server.ensure()
    return Storage(f"{sftp_server.url}/{tmp_path.name}", sftp_server.storage_options)


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the S3 server; clients find it through the environment."""
    s3_server.ensure()
    proxy = FaultyProxy(s3_server)
    enter(monkeypatch, proxy.environment)
    yield proxy
    proxy.close()


@pytest.fixture
def faulty_s3(proxy: FaultyProxy, tmp_path: Path) -> Storage:  # noqa: ARG001
    """A new folder in the bucket, behind the proxy."""
    return Storage(f"{S3Server.url}/{tmp_path.name}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of pages."""
    try:
        browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    except BrowserMissingError as missing:
        pytest.skip(str(missing))
    yield browser
    browser.close()


def enter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set variables that clients read when they are made: fsspec would return those that it has made before."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)  # the user's own are not for tests
    forget_clients()


def forget_clients() -> None:
    """Make fsspec connect anew: with another environment, or to a server that was started again."""
    for protocol in ("s3", "sftp"):
        get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture
def _gpt2_vocabulary() -> None:
    """Skip where GPT-2's vocabulary cannot be had."""
    try:
        load_gpt2_encoding()
    except DataError as error:
        pytest.skip(f"GPT-2's vocabulary is not on this machine: {error}")

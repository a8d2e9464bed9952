"""Whatever a server or a disk answers, the user reads it in words."""

from __future__ import annotations

import errno
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, UserError
from orchestrator.storage.transfer import local_copy
from tests.conftest import Storage, enter, forget_clients
from tests.support.ports import free_ports
from tests.support.proxy import FaultyProxy
from tests.support.servers import S3Server


def why_not(config: TrainConfig) -> str:
    with pytest.raises(UserError) as refused:
        plan(config)
    said = str(refused.value)
    assert "None" not in said
    assert "\n" not in said
    assert not {S3Server.secret, S3Server.reader_secret} & set(said.split())
    return said


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("message", ["as the test asked", None, ""])
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "NoSuchBucket", "no such bucket (NoSuchBucket"),
        (403, "AccessDenied", "access denied (AccessDenied"),
        (403, "SignatureDoesNotMatch", "access denied, the secret key is wrong (SignatureDoesNotMatch"),
        (403, "InvalidAccessKeyId", "access denied, the server does not know this access key"),
        (400, "ExpiredToken", "the credentials have expired (ExpiredToken"),
        (403, "RequestTimeTooSkewed", "this machine's clock differs too much from the server's"),
        (400, "AuthorizationHeaderMalformed", "the region is wrong (AuthorizationHeaderMalformed"),
        (418, "NobodyKnowsThisOne", "the server has refused it (NobodyKnowsThisOne"),
    ],
)
def test_every_answer_is_told_in_words(
    status: int, code: str, words: str, message: str | None, tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy
) -> None:
    proxy.answer(status, code, lambda *_: True, 10**6, message)
    assert words in why_not(replace(tiny, out_dir=f"{faulty_s3.url}/run"))


@pytest.mark.usefixtures("one_try")
def test_what_servers_really_say_is_told_in_words(
    tiny: TrainConfig, s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, out_dir=f"{s3.url}/run")
    assert "no such bucket" in why_not(replace(tiny, out_dir="s3://mistyped/run"))
    with pytest.raises(CheckpointError, match="no such bucket"):
        inspect(InspectConfig(out_dir="s3://mistyped/run"))
    with pytest.raises(CheckpointError, match="no such bucket"), local_copy("s3://mistyped/ckpt.pt"):
        pass
    assert "there is no bucket in it" in why_not(replace(tiny, out_dir="s3:///ckpt/run"))
    for key, secret, words in (
        (S3Server.key, "wrong", "the secret key is wrong"),
        ("nobody", S3Server.secret, "does not know this access key"),
    ):
        options = json.dumps({"key": key, "secret": secret})
        assert words in why_not(replace(config, storage_options=options))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    assert "no credentials were found" in why_not(config)


@pytest.fixture
def web_server() -> Iterator[str]:
    """A server that is none of S3's."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = b"<html><body><p>Welcome<br></body></html>\n" * 100
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page)

        do_HEAD = do_PUT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("one_try")
def test_an_address_that_is_not_of_s3_is_told_in_words(
    tiny: TrainConfig, s3_server: S3Server, web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    for endpoint, words in {
        f"http://{web_server}": "or is no S3 server: look at the address",
        f"https://{web_server}": "TLS has failed",
        f"http://127.0.0.1:{port}": "the server cannot be reached",
    }.items():
        enter(monkeypatch, {**s3_server.environment, "AWS_ENDPOINT_URL": endpoint})
        assert words in why_not(replace(tiny, out_dir="s3://ckpt/run")), endpoint


def test_a_disk_is_told_of_in_words(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path, words in {
        "file": "Not a directory",
        "file/run": "Not a directory",
        "x" * 300: "File name too long",
        "a/run": "Too many levels of symbolic links",
    }.items():
        assert words in why_not(replace(tiny, out_dir=f"{tmp_path}/{path}"))

    def full(_fs: Any, path: str, *_rest: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    assert "cannot be written: OSError: [Errno 30] Read-only file system" in why_not(tiny)
    assert not Path(tiny.out_dir).exists()

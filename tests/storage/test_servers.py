"""The servers and the proxy that other tests lean on: they store, they die and come back, and their faults happen."""

from __future__ import annotations

import os
import time

import paramiko
import pytest
from fsspec.core import url_to_fs

from tests.conftest import Storage, forget_clients
from tests.support.proxy import FaultyProxy
from tests.support.servers import S3Server, SFTPServer

CONTENT = os.urandom(300_000)


def is_put(method: str, _path: str) -> bool:
    return method == "PUT"


def is_get(method: str, _path: str) -> bool:
    return method == "GET"


def test_s3_keeps_what_it_had_when_it_is_killed(s3: Storage, s3_server: S3Server) -> None:
    fs, path = url_to_fs(f"{s3.url}/file")
    fs.pipe_file(path, CONTENT)
    s3_server.kill()
    s3_server.start()
    assert fs.cat_file(path) == CONTENT  # the same client goes on


def test_s3_refuses_a_mistyped_bucket_and_a_wrong_secret(s3: Storage, s3_server: S3Server) -> None:
    fs, _ = url_to_fs(s3.url)
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        fs.pipe_file("mistyped/file", b"")
    fs, path = url_to_fs(s3.url, key=s3_server.key, secret="wrong")
    with pytest.raises(PermissionError):
        fs.pipe_file(f"{path}/file", b"")


def test_sftp_keeps_what_it_had_when_it_is_killed(sftp: Storage, sftp_server: SFTPServer) -> None:
    fs, path = url_to_fs(sftp.url, **sftp.options)
    fs.makedirs(path)
    fs.pipe_file(f"{path}/file", CONTENT)
    sftp_server.kill()
    with pytest.raises((OSError, EOFError, paramiko.SSHException)):  # whichever end of it paramiko meets first
        fs.cat_file(f"{path}/file")
    sftp_server.start()
    with pytest.raises(OSError, match="Socket is closed"):  # this client never connects again
        fs.cat_file(f"{path}/file")
    forget_clients()
    fs, path = url_to_fs(sftp.url, **sftp.options)
    assert fs.cat_file(f"{path}/file") == CONTENT


def test_proxy_passes_everything_on_and_counts_it(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    fs, path = url_to_fs(f"{faulty_s3.url}/file")
    fs.pipe_file(path, CONTENT)
    assert proxy.traffic.bytes_up >= len(CONTENT)
    assert proxy.traffic.bytes_down < 1000
    assert fs.cat_file(path) == CONTENT
    assert fs.info(path)["size"] == len(CONTENT)
    assert proxy.traffic.bytes_down >= len(CONTENT)
    assert ("PUT", f"/{path}") in proxy.traffic.seen
    fs.rm_file(path)
    assert not fs.exists(path)


def test_proxy_answers_errors_that_clients_try_again_after(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    fs, path = url_to_fs(f"{faulty_s3.url}/file")
    slow_down, internal = proxy.answer(503, "SlowDown", is_put), proxy.answer(500, "InternalError", is_put)
    fs.pipe_file(path, CONTENT)
    assert (slow_down.fired, internal.fired) == (1, 1)
    assert fs.cat_file(path) == CONTENT
    denied = proxy.answer(403, "AccessDenied", is_get)
    with pytest.raises(PermissionError):
        fs.cat_file(path)
    assert denied.fired == 1


def test_proxy_resets_connections_in_mid_body(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    fs, path = url_to_fs(f"{faulty_s3.url}/file")
    up, down = proxy.reset(is_put, after_bytes=100_000), proxy.reset(is_get, after_bytes=100_000)
    fs.pipe_file(path, CONTENT)
    assert fs.cat_file(path) == CONTENT
    assert (up.fired, down.fired) == (1, 1)
    assert proxy.traffic.bytes_up >= len(CONTENT) + 100_000


def test_proxy_does_not_answer_until_it_is_healed(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    options = {"config_kwargs": {"read_timeout": 0.5, "retries": {"max_attempts": 0}}}
    fs, path = url_to_fs(f"{faulty_s3.url}/file", **options)
    hung = proxy.hang(is_put, times=100)
    with pytest.raises(Exception, match="timeout"):
        fs.pipe_file(path, CONTENT)
    assert hung.fired
    proxy.heal()
    fs.pipe_file(path, CONTENT)
    assert fs.cat_file(path) == CONTENT


def test_proxy_limits_bandwidth(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    fs, path = url_to_fs(f"{faulty_s3.url}/file")
    proxy.bytes_per_s = 1e6
    t0 = time.perf_counter()
    fs.pipe_file(path, CONTENT)
    assert time.perf_counter() - t0 >= len(CONTENT) / 1e6

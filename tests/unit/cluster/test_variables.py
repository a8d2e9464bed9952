"""What shells hold for Ray: addresses of all forms, temporary folders, switches."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from orchestrator.cluster import variables
from orchestrator.errors import ConfigError


@pytest.mark.parametrize("text", ["", " ", "local", " local "])
def test_a_new_cluster(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", text)
    assert variables.cluster_address() is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("head:6379", "head:6379"),
        (" 10.0.0.1:6379\n", "10.0.0.1:6379"),
        ("ray-head.ns.svc.cluster.local:6379", "ray-head.ns.svc.cluster.local:6379"),
        ("[::1]:6379", "[::1]:6379"),
        ("auto", "auto"),
    ],
)
def test_an_address(text: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", text)
    assert variables.cluster_address() == address


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://127.0.0.1:8265", "the address of Ray's dashboard; .* by host:port \\(RAY_ADDRESS=127.0.0.1:6379\\)"),
        ("https://ray.example.com", "Ray's dashboard; .*RAY_ADDRESS=ray.example.com:6379"),
        ("ray://head:10001", "the address of Ray's client; .*RAY_ADDRESS=head:6379.*ray job submit"),
        ("redis://head:6379", "no cluster; .*RAY_ADDRESS=head:6379"),
        ("http://", "RAY_ADDRESS=HOST:6379"),
        ("http://[::1", "RAY_ADDRESS=HOST:6379"),
        ("somehost", "give host:port, such as somehost:6379"),
        ("6379", "give host:port"),
        (":6379", "give host:port, such as head:6379"),
        ("host:", "give host:port"),
        ("host:port", "give host:port"),
        ("host:99999", "a port from 1024 to 65535"),
        ("host:80", "a port from 1024 to 65535"),
        ("host:-1", "give host:port"),
        ("host:６３７９", "give host:port"),
        ("::1:6379", "give host:port"),
        ("user@host:6379", "give host:port"),
        ("host/path:6379", "give host:port"),
        ("a b:6379", "give host:port"),
        ("host:6379,other:6379", "give host:port"),
    ],
)
def test_what_is_no_address(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", text)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS=.*{told}.*Unset RAY_ADDRESS to train on this machine") as found:
        variables.cluster_address()
    assert "\n" not in str(found.value)


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_folder_is_passed_over(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv(variable, str(folder))
    found = variables.temp_dir()
    assert found
    assert len(found) < 30
    assert f"{variable}={folder} is too long for Ray's sockets" in caplog.text
    assert f"Ray's files go to {found}" in caplog.text


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize("text", ["/nowhere/at/all", "relative", "", "/dev/null"])
def test_what_is_no_folder_is_passed_over(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TMPDIR", text)
    assert variables.temp_dir()
    assert f"TMPDIR={text} is no folder" in caplog.text


@pytest.mark.usefixtures("no_folder")
def test_a_short_folder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variables.temp_dir() is None, "Ray's own choice"
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert variables.temp_dir() is None


@pytest.mark.usefixtures("no_folder")
def test_no_folder_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/missing")
    monkeypatch.setattr(variables, "_SHORT_FOLDERS", ("/neither",))
    with pytest.raises(ConfigError, match="TMPDIR=/missing is no folder, and none of /neither fits: set RAY_TMPDIR"):
        variables.temp_dir()


@pytest.mark.parametrize("text", ["0", "false", "", "no"])
def test_train_v2_is_turned_on(text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", text)
    with caplog.at_level(logging.WARNING):
        variables.set_defaults()
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    assert f"RAY_TRAIN_V2_ENABLED={text} is set to 1" in caplog.text


def test_what_the_user_has_set_stays_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.setenv("RAY_REDIS_PASSWORD", "secret")
    variables.set_defaults()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert "RAY_REDIS_PASSWORD" in variables.given()
    assert "secret" not in variables.given()


def test_the_interface_is_one_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    variables.check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    variables.check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(
        ConfigError, match=r"GLOO_SOCKET_IFNAME=eth99: this machine has .*lo.*; give one of them, or unset it"
    ):
        variables.check_interface()

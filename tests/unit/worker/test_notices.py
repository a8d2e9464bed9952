from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.worker.notices import AWS, GCP, VARIABLE, Azure, Cloud, Notice, Watcher, cloud_here, recognised
from tests.support.metadata import Metadata

AWS_TIME = "2026-11-24T12:34:56Z"


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.close()


def test_aws(metadata: Metadata) -> None:
    metadata.required = {"X-aws-ec2-metadata-token": "token1"}
    cloud = AWS(metadata.url)
    assert cloud.read() is None
    metadata.answers["/latest/meta-data/events/recommendations/rebalance"] = json.dumps({"noticeTime": AWS_TIME})
    notice = cloud.read()
    assert notice
    assert not notice.is_certain
    metadata.required = {"X-aws-ec2-metadata-token": "token2"}  # the first one has expired
    action = json.dumps({"action": "terminate", "time": AWS_TIME})
    metadata.answers["/latest/meta-data/spot/instance-action"] = action
    assert cloud.read() == Notice("AWS will terminate this spot instance at 12:34:56 UTC", 1795523696.0)
    assert metadata.tokens == 2


def test_gcp(metadata: Metadata) -> None:
    metadata.required = {"Metadata-Flavor": "Google"}
    root = "/computeMetadata/v1/instance"
    cloud = GCP(metadata.url)
    metadata.answers = {f"{root}/preempted": "FALSE", f"{root}/maintenance-event": "NONE"}
    assert cloud.read() is None
    metadata.answers[f"{root}/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert cloud.read() is None
    metadata.answers[f"{root}/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    notice = cloud.read()
    assert notice
    assert "maintenance" in notice.text
    metadata.answers[f"{root}/preempted"] = "TRUE"
    notice = cloud.read()
    assert notice
    assert notice.deadline_s
    assert 25 < notice.deadline_s - time.time() <= 30


def azure_event(kind: str, *machines: str, when: str = "Tue, 24 Nov 2026 12:34:56 GMT") -> str:
    event = {"EventType": kind, "NotBefore": when, "Resources": list(machines)}
    return json.dumps({"Events": [event]})


def test_azure(metadata: Metadata) -> None:
    metadata.required = {"Metadata": "true"}
    metadata.answers = {"/metadata/instance/compute/name": "vm1", "/metadata/scheduledevents": '{"Events": []}'}
    cloud = Azure(metadata.url)
    assert cloud.read() is None
    for event in (azure_event("Freeze", "vm1"), azure_event("Preempt", "vm2")):
        metadata.answers["/metadata/scheduledevents"] = event
        assert cloud.read() is None
    metadata.answers["/metadata/scheduledevents"] = azure_event("Preempt", "vm2", "vm1")
    assert cloud.read() == Notice("Azure announces Preempt at 12:34:56 UTC", 1795523696.0)
    metadata.answers["/metadata/scheduledevents"] = azure_event("Reboot", "vm1", when="")
    assert cloud.read() == Notice("Azure announces Reboot at any moment", None)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("sys_vendor", "Amazon EC2\n", "aws"),
        ("product_name", "Google Compute Engine\n", "gcp"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n", "azure"),
        ("sys_vendor", "Microsoft Corporation\n", None),  # of a laptop
    ],
)
def test_the_firmware_tells_the_cloud(tmp_path: Path, file: str, text: str, expected: str | None) -> None:
    (tmp_path / file).write_text(text)
    assert recognised(tmp_path) == expected
    cloud = cloud_here({}, tmp_path)
    assert (cloud and cloud.name.lower()) == expected


def test_the_variable_decides(tmp_path: Path) -> None:
    (tmp_path / "sys_vendor").write_text("Amazon EC2")
    cloud = cloud_here({VARIABLE: "gcp=http://localhost:1/"}, tmp_path)
    assert cloud == GCP("http://localhost:1")
    assert cloud_here({VARIABLE: "off"}, tmp_path) is None


@pytest.mark.parametrize("value", ["ibm=http://h:1", "aws", "aws=x", "aws=httpfoo", "aws=http://", "aws=http://h:x"])
def test_a_wrong_variable_is_a_mistake_of_the_users(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cloud_here({VARIABLE: value}, tmp_path)
    assert str(raised.value) == f"{VARIABLE}={value}: give aws | gcp | azure=http://host:port, or off"


class Script:
    """A cloud that says what it is told to, one answer after the other, the last one again and again."""

    name = "cloud"

    def __init__(self, *answers: Notice | Exception | None) -> None:
        self._answers = list(answers)
        self.asked = threading.Semaphore(0)

    def read(self) -> Notice | None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.asked.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, times: int) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=5)


def watched(cloud: Cloud, until: Callable[[], None]) -> list[Notice]:
    told: list[Notice] = []
    watcher = Watcher(cloud, told.append, poll_s=0.001, slow_poll_s=0.002)
    until()
    watcher.close()
    return told


def test_each_notice_is_told_once() -> None:
    maybe, surely = Notice("rebalance", is_certain=False), Notice("interruption")
    cloud = Script(None, maybe, maybe, surely, surely, maybe)
    assert watched(cloud, lambda: cloud.wait(9)) == [maybe, surely]


def test_a_service_that_fails_is_told_of_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice("interruption")
    cloud = Script(OSError("no route"), ValueError("no JSON"), KeyError("time"), notice, notice)
    with caplog.at_level(logging.WARNING):
        assert watched(cloud, lambda: cloud.wait(6)) == [notice]
    assert [record.message for record in caplog.records] == [
        "cloud's metadata service is not heard, notices may be missed: OSError: no route"
    ]


def test_nobody_there_and_nonsense_raise_what_the_watcher_expects(metadata: Metadata) -> None:
    with pytest.raises(OSError, match="refused"):
        AWS("http://127.0.0.1:9").read()
    metadata.answers = {"/latest/meta-data/spot/instance-action": "<html>"}
    with pytest.raises(ValueError, match="Expecting value"):
        AWS(metadata.url).read()
    metadata.answers = {"/computeMetadata/v1/instance/preempted": 500}
    with pytest.raises(OSError, match="500"):
        GCP(metadata.url).read()


def test_a_service_that_never_answers_is_given_up_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began_s = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            GCP(f"http://127.0.0.1:{mute.getsockname()[1]}").read()
        assert time.monotonic() - began_s < 30


@pytest.mark.parametrize(
    "nonsense", ["[]", "3", '{"Events": null}', "[" * 60000, azure_event("Preempt", "vm1", when="?")]
)
def test_the_watcher_outlives_any_answer(metadata: Metadata, nonsense: str) -> None:
    heard = threading.Event()
    path = "/metadata/scheduledevents"
    metadata.answers = {"/metadata/instance/compute/name": "vm1", path: nonsense}
    cloud = Azure(metadata.url)
    asked = threading.Semaphore(0)

    class Counted:
        name = "Azure"

        def read(self) -> Notice | None:
            try:
                return cloud.read()
            finally:
                asked.release()

    watcher = Watcher(Counted(), lambda _: heard.set(), poll_s=0.001, slow_poll_s=0.002)
    assert asked.acquire(timeout=5)
    metadata.answers[path] = azure_event("Preempt", "vm1")
    assert heard.wait(5)
    watcher.close()


def test_a_notice_is_heard_after_one_that_could_not_be_acted_upon() -> None:
    maybe, surely = Notice("rebalance", is_certain=False), Notice("interruption")
    heard = threading.Event()

    def on_notice(notice: Notice) -> None:
        if not notice.is_certain:
            raise RuntimeError("no way to the head")
        heard.set()

    watcher = Watcher(Script(maybe, maybe, surely), on_notice, poll_s=0.001)
    assert heard.wait(5)
    watcher.close()


def test_one_failure_does_not_make_it_slow() -> None:
    cloud = Script(OSError("once"), Notice("interruption"))
    watcher = Watcher(cloud, lambda _: None, poll_s=0.001, slow_poll_s=60)
    cloud.wait(3)
    watcher.close()


def test_a_service_that_goes_on_failing_is_asked_less_often() -> None:
    cloud = Script(OSError("always"))
    watcher = Watcher(cloud, lambda _: None, poll_s=0.001, slow_poll_s=60)
    cloud.wait(5)
    assert not cloud.asked.acquire(timeout=0.2)
    watcher.close()

"""How workers and their driver talk: records arrive in order, the wish to stop comes back, and training never waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from orchestrator.cluster.mailbox import MailboxClient, MailboxReader, open_mailbox
from orchestrator.telemetry.records import Note, Stamped
from tests.support.clusters import small_cluster

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with small_cluster():
        yield


def noted(number: int) -> Stamped:
    return Stamped(Note(text=str(number)), time_s=1000.0 + number, attempt="a")


def test_records_arrive_in_order_and_the_wish_to_stop_comes_back() -> None:
    actor = open_mailbox()
    mailbox, listener = MailboxClient(actor), MailboxReader(actor)
    told = [noted(it) for it in range(100)]
    for stamped in told[:50]:
        mailbox.post(stamped)
    mailbox.hurry()
    for stamped in told[50:]:
        mailbox.post(stamped)
    taken = listener.take(stop=False)
    assert not mailbox.should_stop()
    taken += listener.take(stop=True)
    deadline_s = time.monotonic() + 60
    while not mailbox.should_stop():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    mailbox.close()
    while len(taken) < len(told):  # a take may come to nothing on a busy machine, and loses nothing
        assert time.monotonic() < deadline_s
        taken += listener.take(stop=True)
    assert taken == told
    assert listener.take(stop=True) == []


def test_an_answer_that_is_lost_loses_no_record() -> None:
    mailbox = open_mailbox()
    ray.get(mailbox.post.remote([noted(it).to_json() for it in range(5)]))
    ray.get(mailbox.take.remote(False, 0))  # as of a driver that has waited long enough
    listener = MailboxReader(mailbox)
    assert listener.take(stop=False) == [noted(it) for it in range(5)]
    ray.get(mailbox.post.remote([noted(5).to_json()]))
    assert listener.take(stop=False) == [noted(5)]


class Silent:
    def post(self, _records: list[dict[str, Any]]) -> bool:
        time.sleep(3600)
        return False


def test_training_does_not_wait_for_a_mailbox_that_does_not_answer() -> None:
    actor = ray.remote(Silent).options(num_cpus=0).remote()
    mailbox = MailboxClient(actor)
    longest_s = 0.0
    deadline_s = time.monotonic() + 3
    while time.monotonic() < deadline_s:  # some posts are under way by then
        began_s = time.monotonic()
        mailbox.post(noted(0))
        assert not mailbox.should_stop()
        longest_s = max(longest_s, time.monotonic() - began_s)
        time.sleep(0.01)
    ray.kill(actor)  # so that what it was asked ends, and the mailbox's thread does before the cluster
    mailbox.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mailbox"]
    assert longest_s < 4  # the mailbox itself waits for an answer for five seconds

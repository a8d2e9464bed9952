"""The clouds' own notices that this machine will be taken away, read from their metadata services. Knows no Ray.

    AWS      spot interruption (2 minutes before), rebalance recommendation (earlier, not certain)
    GCP      preempted (30 s before), maintenance that ends the machine (60 s before)
    Azure    scheduled events: Preempt (30 s before), Terminate, Reboot, Redeploy

The machine's firmware tables name the cloud; in no cloud, nothing is asked. For tests and unusual networks:
ORCHESTRATOR_METADATA=aws=http://127.0.0.1:1234, or `off`.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
https://cloud.google.com/compute/docs/instances/create-use-preemptible,
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from orchestrator.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "ORCHESTRATOR_METADATA"
_DMI = Path("/sys/class/dmi/id")
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
_LINK_LOCAL = "http://169.254.169.254"
_TOKEN_S = 21600
_ANSWER_S = 1.0
_ANSWER_BYTES = 64 * 1024
_POLL_S, _SLOW_POLL_S = 2.0, 10.0  # the latter while the service does not answer; the shortest notice is 30 s
_PATIENCE = 5  # failures in a row, then it is asked less often: one that passes must not cost a notice
# no connection, no HTTP, no JSON, JSON of another shape or too deep, times out of range
NO_ANSWER = (
    *(OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError),
    *(RecursionError, ArithmeticError),
)


@dataclass(frozen=True)
class Notice:
    """An announcement of a cloud's; deadline_s: when the machine goes (seconds since 1970), None: not known.

    is_certain: False for a recommendation to leave.
    """

    text: str
    deadline_s: float | None = None
    is_certain: bool = True


class Cloud(Protocol):
    """One cloud's metadata service."""

    name: str

    def read(self) -> Notice | None:
        """Return the present announcement, None for none.

        Raises:
            NO_ANSWER: the service does not answer, or not as documented.
        """


def cloud_here(environment: Mapping[str, str] = os.environ, dmi: Path = _DMI) -> Cloud | None:
    """Return the cloud that this machine is in, None where it is in none of them.

    Raises:
        ConfigError: the variable names another, or no address.
    """
    if override := environment.get(VARIABLE, ""):
        name, _, url = override.partition("=")
        if override == "off":
            return None
        if name not in _CLOUDS or not _is_address(url):
            raise ConfigError(f"{VARIABLE}={override}: give {' | '.join(_CLOUDS)}=http://host:port, or off")
        return _CLOUDS[name](url.rstrip("/"))
    found = recognised(dmi)
    return _CLOUDS[found](_LINK_LOCAL) if found else None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def recognised(dmi: Path) -> str | None:
    """Return which cloud's firmware this is."""

    def text(name: str) -> str:
        try:
            return (dmi / name).read_text().strip()
        except OSError:
            return ""

    if "Amazon EC2" in (text("sys_vendor"), text("bios_vendor")) or text("bios_version").endswith(".amazon"):
        return "aws"
    if text("sys_vendor") == "Google" or text("product_name") == "Google Compute Engine":
        return "gcp"
    return "azure" if text("chassis_asset_tag") == _AZURE_ASSET_TAG else None


@dataclass
class AWS:
    """Amazon EC2, by version 2 of its metadata service: with a session token."""

    url: str
    name: str = "AWS"
    _token: str = ""

    def read(self) -> Notice | None:
        if action := self._get("spot/instance-action"):
            notice = json.loads(action)
            when_s = _iso_s(notice["time"])
            return Notice(f"AWS will {notice['action']} this spot instance at {_clock(when_s)}", when_s)
        if self._get("events/recommendations/rebalance"):
            return Notice("AWS recommends to leave this spot instance (rebalance)", is_certain=False)
        return None

    def _get(self, what: str) -> str | None:
        for is_last in (False, True):
            if not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                self._token = _ask(f"{self.url}/latest/api/token", headers, method="PUT") or ""
            try:
                return _ask(f"{self.url}/latest/meta-data/{what}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                self._token = ""  # it has expired
                if error.code != 401 or is_last:
                    raise
        return None


@dataclass
class GCP:
    """Google Compute Engine."""

    url: str
    name: str = "GCP"

    def read(self) -> Notice | None:
        if self._get("preempted") == "TRUE":
            return Notice("GCP takes this machine away (preempted)", time.time() + 30)
        event = self._get("maintenance-event")
        if event.startswith("TERMINATE"):  # a migration keeps it
            return Notice(f"GCP ends this machine for maintenance ({event})", time.time() + 60)
        return None

    def _get(self, what: str) -> str:
        return _ask(f"{self.url}/computeMetadata/v1/instance/{what}", {"Metadata-Flavor": "Google"}) or ""


@dataclass
class Azure:
    """Azure's virtual machines."""

    url: str
    name: str = "Azure"
    _machine: str = ""
    _ending: frozenset[str] = field(default=frozenset({"Preempt", "Terminate", "Reboot", "Redeploy"}), repr=False)

    def read(self) -> Notice | None:
        if not self._machine:
            self._machine = self._get("instance/compute/name?api-version=2021-02-01&format=text")
        answer = json.loads(self._get("scheduledevents?api-version=2020-07-01") or "{}")
        for event in answer.get("Events", []):
            if event["EventType"] in self._ending and self._machine in event["Resources"]:
                when = event.get("NotBefore", "")
                when_s = parsedate_to_datetime(when).timestamp() if when else None
                return Notice(f"Azure announces {event['EventType']} at {_clock(when_s)}", when_s)
        return None

    def _get(self, what: str) -> str:
        return _ask(f"{self.url}/metadata/{what}", {"Metadata": "true"}) or ""


_CLOUDS: dict[str, Callable[[str], Cloud]] = {"aws": AWS, "gcp": GCP, "azure": Azure}
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has metadata of its own machine


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Return an answer, None where there is none of that name."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with _opener.open(request, timeout=_ANSWER_S) as answer:
            return str(answer.read(_ANSWER_BYTES).decode().strip())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _iso_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _clock(when_s: float | None) -> str:
    return "any moment" if when_s is None else datetime.fromtimestamp(when_s, UTC).strftime("%H:%M:%S UTC")


class Watcher:
    """A thread that asks a cloud every poll_s; on_notice gets each notice once. It never ends a run."""

    def __init__(
        self,
        cloud: Cloud,
        on_notice: Callable[[Notice], Any],
        poll_s: float = _POLL_S,
        slow_poll_s: float = _SLOW_POLL_S,
    ) -> None:
        self._cloud, self._on_notice = cloud, on_notice
        self._poll_s, self._slow_poll_s = poll_s, slow_poll_s
        self._failures = 0  # in a row
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="cloud notices", daemon=True).start()

    def close(self) -> None:
        """Stop asking."""
        self._closed.set()

    def _watch(self) -> None:
        reported: set[bool] = set()  # an uncertain notice may be followed by a certain one
        while not self._closed.wait(self._slow_poll_s if self._failures >= _PATIENCE else self._poll_s):
            notice = self._read()
            if notice and notice.is_certain not in reported and True not in reported:
                reported.add(notice.is_certain)
                self._report(notice)

    def _read(self) -> Notice | None:
        try:
            notice = self._cloud.read()
        except NO_ANSWER as error:
            if not self._failures:
                reason = f"{type(error).__name__}: {error}"
                logger.warning(
                    "%s's metadata service is not heard, notices may be missed: %s", self._cloud.name, reason
                )
            self._failures += 1
            return None
        self._failures = 0
        return notice

    def _report(self, notice: Notice) -> None:
        try:
            self._on_notice(notice)
        except (OSError, RuntimeError) as error:  # a certain notice may follow, and must get through
            logger.warning("%s; nothing could be done about it: %s: %s", notice.text, type(error).__name__, error)

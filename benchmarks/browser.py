"""A real browser without a window: Debian's chromium, spoken to through its DevTools protocol over two pipes.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

_ANSWER_S = 60.0
_DRAWN = "document.readyState === 'complete' && (!window.Bokeh || Bokeh.documents.every(each => each.is_idle))"


class BrowserMissingError(Exception):
    """No chromium is installed; the message says how to install it."""


class Browser:
    """A process of the browser's, with a profile of its own; end it with `close`.

    Raises:
        BrowserMissingError: there is none.
    """

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        if not program:
            raise BrowserMissingError("chromium is not installed: apt-get install --no-install-recommends chromium")
        (read, self._in), (self._out, written) = os.pipe(), os.pipe()
        its_in, its_out = (fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (read, written))  # not 3 nor 4
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        # it reads from 3 and writes to 4
        command = ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", program, *flags]
        with (profile.parent / "chromium.log").open("ab") as log:
            self._process = subprocess.Popen(command, pass_fds=(its_in, its_out), stdout=log, stderr=log)
        for each in (read, written, its_in, its_out):
            os.close(each)
        self._buffer, self._last_id, self.events = b"", 0, list[dict[str, Any]]()

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        os.write(self._in, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline_s = time.monotonic() + _ANSWER_S
        while True:
            answer = self._read(deadline_s)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, "the browser does not answer"
            found = os.read(self._out, 1 << 16)
            assert found, "the browser has ended"
            self._buffer += found
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(
        self, file: Path, *, width: int = 1300, height: int = 1400, is_dark: bool = False, density: float = 1.0
    ) -> Page:
        """Open a file in a tab of its own, and wait until everything in it is drawn; density: pixels per CSS pixel."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Runtime", "Log", "Network", "Page"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=file.as_uri())
        page.wait_until(_DRAWN)
        return page

    def close(self) -> None:
        """End all its processes, which write into the profile until then."""
        self.call("Browser.close")
        try:
            self._process.wait(timeout=_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Page:
    """A page in a tab."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_until(self, condition: str, timeout_s: float = 60.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline_s = time.monotonic() + timeout_s
        while not self.value(condition):
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {condition}\n{self.complaints()}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Return what the console shows as errors and warnings, and exceptions that nobody caught."""
        return [text for each in self._heard() if (text := _complaint(each))]

    def requests(self) -> list[str]:
        """Return the URLs that the page has asked for over a network."""
        sent = [
            each["params"]["request"]["url"] for each in self._heard() if each["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("file:", "data:", "blob:", "about:"))]

    def _heard(self) -> list[dict[str, Any]]:
        self.value("1")  # what was on its way is here then
        return [each for each in self._browser.events if each.get("sessionId") == self._session]

    def move_mouse(self, x: float, y: float) -> None:
        """Move the mouse there, as a user would."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 1, y=y)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, element: str = "document.documentElement") -> None:
        """Write a picture of an element, given as a JavaScript expression; by default of the whole page."""
        box = self.value(f"(each => each.toJSON())({element}.getBoundingClientRect())")
        clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(b64decode(shot["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


def _complaint(event: dict[str, Any]) -> str:
    params = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            return json.dumps(params["exceptionDetails"])
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            return json.dumps(params["args"])
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            return json.dumps(params["entry"])
    return ""

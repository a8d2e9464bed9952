"""A proxy before an S3 server: it answers errors, breaks connections, says nothing, and counts what goes through."""

from __future__ import annotations

import http.client
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.servers import S3Server

_PIECE_BYTES = 64 * 1024


@dataclass
class Fault:
    """Something that a proxy does to the next `times` requests that match, instead of passing them on whole.

    kind: `answer` an error, never answer (`hang`), or `reset` the connection when after_bytes of the body went through.
    """

    kind: str
    matches: Callable[[str, str], bool]  # of method and path with its query
    times: int
    status: int = 500
    code: str = "InternalError"
    message: str | None = "as the test asked"  # None: no message, as some servers answer
    after_bytes: int = 0
    signed_by: str = ""  # only requests that are signed with this access key
    fired: int = 0

    def is_due(self, method: str, path: str, signature: str) -> bool:
        is_theirs = not self.signed_by or f"Credential={self.signed_by}/" in signature
        return is_theirs and self.fired < self.times and self.matches(method, path)

    @property
    def body(self) -> str:
        message = "" if self.message is None else f"<Message>{self.message}</Message>"
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code>{message}</Error>"


@dataclass
class Traffic:
    """What went through a proxy; bytes are those of bodies, of requests that it answered itself too."""

    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)  # method and path with its query


class FaultyProxy:
    """Stands before an S3 server, passes everything on and does what `answer`, `hang` and `reset` ask for.

    Clients sign the address that they are given: they are given the proxy's (`environment`), and it goes on unchanged.
    """

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._wire = threading.Lock()  # held while bytes "travel": all connections share the bandwidth
        self._faults: list[Fault] = []
        self._is_open = threading.Event()
        self.traffic = Traffic()
        self.bytes_per_s: float | None = None  # None: as fast as it goes
        self._http = _Listener(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, name="proxy", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {**self._server.environment, "AWS_ENDPOINT_URL": self.endpoint}

    def answer(
        self,
        status: int,
        code: str,
        matches: Callable[[str, str], bool],
        times: int = 1,
        message: str | None = "as the test asked",
    ) -> Fault:
        """Answer with an S3 error instead: 500 InternalError, 503 SlowDown, ..."""
        return self._add(Fault("answer", matches, times, status=status, code=code, message=message))

    def expire(self, key: str, status: int = 400, code: str = "ExpiredToken") -> Fault:
        """Answer every request that is signed with an access key with an error, until `heal`."""
        return self._add(Fault("answer", lambda *_: True, 10**9, status=status, code=code, signed_by=key))

    def hang(self, matches: Callable[[str, str], bool], times: int = 1) -> Fault:
        """Take the request and never answer, until `heal` or `close`."""
        return self._add(Fault("hang", matches, times))

    def reset(self, matches: Callable[[str, str], bool], times: int = 1, after_bytes: int = 0) -> Fault:
        """Reset the connection when after_bytes of the body went: the request's, or the answer's if it has none."""
        return self._add(Fault("reset", matches, times, after_bytes=after_bytes))

    def heal(self) -> None:
        """Drop all faults, let go of what hangs (its connection is reset), and lift the limit."""
        with self._lock:
            self._faults = []
            self._is_open.set()
            self._is_open = threading.Event()
        self.bytes_per_s = None

    def close(self) -> None:
        self.heal()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def _take(self, method: str, path: str, signature: str) -> Fault | None:
        """Count a request and return the fault that meets it."""
        with self._lock:
            self.traffic.requests += 1
            self.traffic.seen.append((method, path))
            fault = next((fault for fault in self._faults if fault.is_due(method, path, signature)), None)
            if fault:
                fault.fired += 1
            return fault

    def _travel(self, piece: bytes, up: bool) -> bytes:
        with self._lock:
            if up:
                self.traffic.bytes_up += len(piece)
            else:
                self.traffic.bytes_down += len(piece)
        if self.bytes_per_s:
            with self._wire:
                time.sleep(len(piece) / self.bytes_per_s)
        return piece

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections, and says 100 Continue to who waits for it

            def do_GET(self) -> None:
                fault = proxy._take(self.command, self.path, self.headers.get("Authorization") or "")
                if fault and fault.kind == "hang":
                    proxy._is_open.wait()
                    raise _Cut
                limit = fault.after_bytes if fault and fault.kind == "reset" else None
                length = int(self.headers.get("Content-Length") or 0)
                body = self._pieces(self.rfile, length, limit if length else None, up=True)
                if fault and fault.kind == "answer":
                    for _ in body:
                        pass
                    self._refuse(fault)
                    return
                self._pass_on(body, None if length else limit)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

            def _pieces(self, source: Any, length: int, limit: int | None, up: bool) -> Iterator[bytes]:
                """Yield a body of so many bytes; with a limit, as many as that, and then the connection breaks."""
                left = length if limit is None else min(length, limit)
                while left and (piece := source.read1(min(left, _PIECE_BYTES))):
                    left -= len(piece)
                    yield proxy._travel(piece, up)
                if limit is not None:
                    raise _Cut

            def _pass_on(self, body: Iterator[bytes], limit: int | None) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", proxy._server.port)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for key, value in self.headers.items():
                        if key.lower() != "expect":  # answered here
                            upstream.putheader(key, value)
                    upstream.endheaders()
                    for piece in body:
                        upstream.send(piece)
                    self._bring_back(upstream.getresponse(), limit)
                finally:
                    upstream.close()

            def _bring_back(self, answer: http.client.HTTPResponse, limit: int | None) -> None:
                is_sized = answer.length is not None or self.command == "HEAD"
                self.send_response_only(answer.status, answer.reason)
                for key, value in answer.getheaders():
                    if key.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(key, value)
                if not is_sized:
                    self.send_header("Connection", "close")  # the end of the body is the end of the connection
                self.end_headers()
                length = sys.maxsize if answer.length is None else answer.length
                for piece in self._pieces(answer, 0 if self.command == "HEAD" else length, limit, up=False):
                    self.wfile.write(piece)

            def _refuse(self, fault: Fault) -> None:
                text = fault.body
                self.send_response_only(fault.status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


class _Cut(Exception):  # noqa: N818
    """The connection shall break now."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Break the connection for a fault, or as the server has broken its own; anything else is shown."""
        error = sys.exc_info()[1]
        if isinstance(error, _Cut | OSError | http.client.HTTPException):
            with suppress(OSError):  # to linger for 0 s: the client sees a reset instead of an end
                request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        super().handle_error(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        socketserver.TCPServer.close_request(self, request)  # no polite end: a reset is asked for where it matters

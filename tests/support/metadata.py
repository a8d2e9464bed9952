"""A cloud's metadata service on this machine."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Metadata:
    """A metadata service: answers by path (a text, or a status), and requires what the real ones do."""

    def __init__(self) -> None:
        self.answers: dict[str, str | int] = {}
        self.required: dict[str, str] = {}
        self.tokens = 0
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                metadata.tokens += 1
                assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.reply(f"token{metadata.tokens}")

            def do_GET(self) -> None:
                if any(self.headers[name] != value for name, value in metadata.required.items()):
                    self.reply(401)
                    return
                self.reply(metadata.answers.get(self.path.split("?")[0], 404))

            def reply(self, answer: str | int) -> None:
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                self.wfile.write(b"" if isinstance(answer, int) else answer.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

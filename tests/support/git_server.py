"""A git server over HTTP: the program's own upload-pack behind Python's web server."""

from __future__ import annotations

import contextlib
import gzip
import os
import subprocess
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.support.loopback import LoopbackServer


class GitServer(LoopbackServer):
    """Serves one repository at ``url`` (smart protocol, https://git-scm.com/docs/gitprotocol-http).

    Attributes:
        fetches: requests for a pack so far.
    """

    def __init__(self, repository: Path) -> None:
        self.fetches = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = owner.run(repository, self, "--advertise-refs", b"")
                self.answer("advertisement", b"001e# service=git-upload-pack\n0000" + data)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                owner.fetches += b"command=fetch" in body
                self.answer("result", owner.run(repository, self, "", body))

            def answer(self, kind: str, data: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", f"application/x-git-upload-pack-{kind}")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have had enough
                    self.wfile.write(data)

        super().__init__(Handler)
        self.url = f"http://{self.host}/fleet.git"

    @staticmethod
    def run(repository: Path, request: BaseHTTPRequestHandler, option: str, body: bytes) -> bytes:
        command = ["git", "upload-pack", "--stateless-rpc", *([option] if option else []), str(repository)]
        environment = {**os.environ, "GIT_PROTOCOL": request.headers.get("Git-Protocol", "")}
        return subprocess.run(command, input=body, env=environment, capture_output=True, check=False).stdout

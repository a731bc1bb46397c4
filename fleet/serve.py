"""A release server for a desk or a small site: the static files of ``repository/``, read-only.

Any static web server does the same job; devices trust signatures, not this server. GET and HEAD only, one
conditional request (``If-None-Match``) per poll, one range per request so that a download can go on where it
stopped, nothing outside ``metadata/``, ``targets/`` and ``blobs/``, no directory listing, no symlinks out.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Final

from edge_agent.contract.repository import METADATA, TARGETS, TIMESTAMP
from fleet.errors import ServeError

_FOLDERS: Final = (METADATA, TARGETS, "blobs")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]*")  # of a path: no dot files, no "..", nothing encoded
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_SOCKET_TIMEOUT: Final = 30.0  # seconds that a silent client keeps a thread
_MAX_CONNECTIONS: Final = 256  # threads; a device holds one for the milliseconds of a poll
_CHECK_SECONDS: Final = 60.0  # between two looks at the expiry; timestamps live for hours


class StaticServer:
    """Serves ``root``. ``start`` binds; ``url`` says where."""

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 8090) -> None:
        self._root = root
        self._host, self._port = host, port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Bind and serve in a thread.

        Raises:
            ServeError: the port is taken, or the address is not of this machine.
        """
        handler = type("_Bound", (_Handler,), {"root": self._root.resolve()})
        try:
            self._server = _Server((self._host, self._port), handler)
        except OSError as error:
            raise ServeError(
                f"{self._host}:{self._port} cannot be served: {error.strerror}; give another --port (0: any)"
            ) from error
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="serve")
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting and close."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._slots.acquire()  # the accept loop waits: the kernel's queue holds the others back
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    root: ClassVar[Path]
    protocol_version = "HTTP/1.1"
    server_version = "edge-fleet"
    sys_version = ""
    timeout = _SOCKET_TIMEOUT

    def do_GET(self) -> None:
        """The file, a part of it, or 304."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """The same without the body."""
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        """500 devices poll every 15 s; the access log of a real server is for that."""

    def _answer(self, *, body: bool) -> None:
        path = self._path()
        try:
            if path is None:
                raise FileNotFoundError
            file = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            # The open file is what is described and sent, whatever is renamed over its name meanwhile.
            facts = os.fstat(file.fileno())
            etag = f'"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}"'
            if etag in (self.headers.get("If-None-Match") or "").split(", "):
                self.send_response(HTTPStatus.NOT_MODIFIED)
                self._facts(etag)
                self.end_headers()
                return
            first, last = 0, facts.st_size - 1
            wanted = self._range(facts.st_size, etag)
            if wanted is not None:
                first, last = wanted
                if first > last:
                    self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                    self.send_header("Content-Range", f"bytes */{facts.st_size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(HTTPStatus.PARTIAL_CONTENT)
                self.send_header("Content-Range", f"bytes {first}-{last}/{facts.st_size}")
            else:
                self.send_response(HTTPStatus.OK)
            self._facts(etag)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if body:
                file.seek(first)
                left = last - first + 1
                while left > 0 and (chunk := file.read(min(left, 1 << 16))):
                    self.wfile.write(chunk)
                    left -= len(chunk)

    def _facts(self, etag: str) -> None:
        self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "bytes")
        # Only timestamp.json ever changes under its name.
        changes = self.path.partition("?")[0] == f"/{TIMESTAMP}"
        self.send_header("Cache-Control", "no-cache" if changes else "public, max-age=86400, immutable")

    def _path(self) -> Path | None:
        """The file that the request names, if it may be seen."""
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[0] not in _FOLDERS or not all(_PART.fullmatch(part) for part in parts):
            return None
        path = self.root.joinpath(*parts)
        return path if path.is_file() and path.resolve().is_relative_to(self.root) else None

    def _range(self, size: int, etag: str) -> tuple[int, int] | None:
        """First and last byte; None for the whole; first > last where it cannot be satisfied."""
        match = _RANGE.fullmatch(self.headers.get("Range") or "")
        unless = self.headers.get("If-Range")
        if match is None or match.group(0) == "bytes=-" or unless not in {None, etag}:
            return None
        begin, end = match.groups()
        if not begin:
            return max(0, size - int(end)), size - 1 if int(end) else -1
        return int(begin), min(int(end), size - 1) if end else size - 1


def keep_fresh(refresh: Callable[[], object], stop: threading.Event, seconds: float = _CHECK_SECONDS) -> None:
    """Call ``refresh`` now and every ``seconds`` until ``stop``."""
    while True:
        refresh()
        if stop.wait(seconds):
            return

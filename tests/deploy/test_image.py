"""The Dockerfile names what exists, and its health check tells a live agent from a dead one."""

from __future__ import annotations

import fnmatch
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.deploy.files import DOCKER, ROOT
from tests.support.services import free_port

TEXT = (DOCKER / "Dockerfile").read_text()
# One instruction a line, comments gone.
LINES = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()


def _instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in LINES if line.startswith(f"{name} ")]


def test_it_copies_what_exists_and_the_context_holds() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copy in _instructions("COPY"):
        if copy.startswith("--from="):
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is in .dockerignore"


def test_it_asks_no_registry_for_a_front_end() -> None:
    assert "syntax=" not in TEXT.splitlines()[0]
    assert not re.search(r"(?m)^#\s*syntax\s*=", TEXT)


def test_the_agent_runs_as_nobody_in_particular() -> None:
    assert _instructions("USER") == ["10001:10001"]
    assert _instructions("STOPSIGNAL") == ["SIGTERM"]
    final = TEXT.rsplit("\nFROM ", 1)[1]
    assert "\nRUN " not in final  # else an arm64 image would need an emulator


@pytest.mark.parametrize(
    "setting",
    [
        "ORT_DISABLE_TELEMETRY=1",
        "MALLOC_TRIM_THRESHOLD_=131072",
        "MALLOC_MMAP_THRESHOLD_=131072",
        "OPENBLAS_NUM_THREADS=1",
        "PYTHONDONTWRITEBYTECODE=1",
    ],
)
def test_the_environment_is_set(setting: str) -> None:
    assert setting in " ".join(_instructions("ENV")).split()


@contextmanager
def _answering(status: int) -> Iterator[int]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/live" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _check(port: int) -> int:
    (instruction,) = _instructions("HEALTHCHECK")
    command = json.loads(instruction[instruction.index("[") :])
    assert command[0] == "python"
    command = [sys.executable, *(argument.replace("8080", str(port)) for argument in command[1:])]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode


def test_the_health_check_tells_a_live_agent_from_a_dead_one() -> None:
    with _answering(200) as port:
        assert _check(port) == 0
    with _answering(503) as port:
        assert _check(port) != 0
    assert _check(free_port()) != 0

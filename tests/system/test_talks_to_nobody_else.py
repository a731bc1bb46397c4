"""The agent connects to what it was told to, and to nobody else: seen from the kernel, not from the code.

``CI`` is taken out of the environment: onnxruntime's telemetry stays silent where it is set, and a test with
it would notice nothing. ``EDGE_STRACE_SECONDS`` makes the work longer.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.agents import BIN, AgentProcess, run_cli
from tests.support.bundles import tiny_bundle
from tests.support.services import Mosquitto, eventually, free_port

WORK_SECONDS = float(os.environ.get("EDGE_STRACE_SECONDS", "2"))
SECONDS = 60.0
CALLS = "connect,sendto,sendmsg,sendmmsg"

# connect(7, {sa_family=AF_INET, sin_port=htons(1883), sin_addr=inet_addr("127.0.0.1")}, 16) = 0
INET = re.compile(
    r"(?P<call>connect|sendto|sendmsg|sendmmsg)\(.*?sa_family=AF_INET6?, sin6?_port=htons\((?P<port>\d+)\)"
    r".*?(?:inet_addr\(\"(?P<v4>[^\"]+)\"\)|inet_pton\(AF_INET6, \"(?P<v6>[^\"]+)\")"
)


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed: apt-get install strace")
        pytest.skip("strace is not installed: apt-get install strace")
    if subprocess.run([found, "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here (ptrace is forbidden)")
    return found


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[int]:
    """A web server that holds no releases and takes no metrics: the agent asks it again and again."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(204)
            self.end_headers()

    (tmp_path / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def _peers(log: Path) -> set[tuple[str, int]]:
    found = set()
    for line in log.read_text(errors="replace").splitlines():
        if match := INET.search(line):
            found.add((match["v4"] or match["v6"], int(match["port"])))
    return found


def test_a_working_agent_connects_to_its_configured_peers_only(
    tmp_path: Path, strace: str, mosquitto: Mosquitto, silent: int
) -> None:
    root = tmp_path / "root.json"
    root.write_text("{}")  # nothing can be trusted with it: the agent looks, and goes on without updates
    agent = AgentProcess(
        tmp_path / "agent",
        mqtt={"host": mosquitto.host, "port": mosquitto.port},
        remote_write={"url": f"http://127.0.0.1:{silent}/write", "interval_seconds": 0.5},
        updates={"source": f"http://127.0.0.1:{silent}", "root": str(root), "interval_seconds": 0.5},
    )
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    trace, log = tmp_path / "trace", tmp_path / "agent.log"
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)  # the agent sets it by itself, or this test fails
    command = [
        strace,
        "-f",
        "-qq",
        "-e",
        "trace=connect,sendto,sendmsg,sendmmsg",
        "-s",
        "64",
        "-o",
        str(trace),
    ]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, str(BIN / "edge-agent"), "run", "--config", str(agent.config)],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        eventually(lambda: _answers(agent), f"an answer: {log.read_text()[-2000:]}", SECONDS)
        end = time.monotonic() + WORK_SECONDS
        while time.monotonic() < end:
            assert agent.predict([0.1, 0.2, 0.3, 0.4])["source"] == "model"
        wanted = {(mosquitto.host, mosquitto.port), ("127.0.0.1", silent)}
        eventually(lambda: wanted <= _peers(trace), f"all of {wanted} in the trace", SECONDS)
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(SECONDS)

    assert _peers(trace) == wanted


def _answers(agent: AgentProcess) -> bool:
    try:
        return agent.predict([0.1, 0.2, 0.3, 0.4])["source"] == "model"
    except (OSError, http.client.HTTPException):
        return False


def test_the_trace_is_read_as_strace_writes_it(tmp_path: Path, strace: str) -> None:
    port, port6 = free_port(), free_port()
    code = (
        "import socket\n"
        f"s = socket.socket(); s.connect_ex(('127.0.0.1', {port}))\n"
        f"s = socket.socket(socket.AF_INET6); s.connect_ex(('::1', {port6}))\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', 9))\n"
    )
    trace = tmp_path / "trace"
    command = [strace, "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(trace)]
    subprocess.run([*command, "python3", "-c", code], check=True, timeout=SECONDS)
    peers = _peers(trace)
    assert {("127.0.0.1", port), ("127.0.0.1", 9)} <= peers
    assert peers <= {("127.0.0.1", port), ("127.0.0.1", 9), ("::1", port6)}  # a machine may have no IPv6

"""Real agents as processes: started from a configuration, asked over their sockets, killed at will."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.services import eventually, free_port

BIN = Path(sys.executable).parent
READY_SECONDS = 60.0  # a start takes under a second; a loaded machine gets patience


def run_cli(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of our console scripts to its end."""
    return subprocess.run(
        [str(BIN / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


class AgentProcess:
    """``edge-agent run`` with its own store and port."""

    def __init__(self, folder: Path, device: str = "unit-1", **config: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self.store = folder / "store"
        self.port = free_port()
        self.log = folder / "agent.log"
        self.config = folder / "agent.yaml"
        self._child: subprocess.Popen[bytes] | None = None
        content = {"device": device, "store": str(self.store), "http": {"port": self.port}} | config
        self.config.write_text(json.dumps(content))

    def start(self) -> None:
        """Start it and wait until it is live."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [str(BIN / "edge-agent"), "run", "--config", str(self.config)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        eventually(self._live_or_dead, "agent live", READY_SECONDS)
        assert self._child.poll() is None, self.log.read_text()[-3000:]

    def _live_or_dead(self) -> bool:
        if self._child is None or self._child.poll() is not None:
            return True
        try:
            return self.get("/v2/health/live")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def kill(self) -> None:
        """kill -9."""
        assert self._child is not None
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        self._child = None

    def stop(self) -> int | None:
        """SIGTERM; the exit code."""
        if self._child is None:
            return None
        self._child.terminate()
        try:
            return self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            raise
        finally:
            self._child = None

    def request(
        self, method: str, path: str, body: bytes | None = None, token: str | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str, token: str | None = None) -> tuple[int, bytes]:
        return self.request("GET", path, token=token)

    def predict(self, row: Sequence[float | None] | Mapping[str, float], **fields: Any) -> dict[str, Any]:
        status, body = self.request("POST", "/predict", json.dumps({"features": row, **fields}).encode())
        answer: dict[str, Any] = json.loads(body)
        assert status == 200, answer
        return answer

    def wait_for(self, seconds: float = READY_SECONDS, **expected: Any) -> dict[str, Any]:
        """Ask until the answer has these fields, for example ``version="2.0.0", source="model"``."""
        last: dict[str, Any] = {}

        def matches() -> bool:
            nonlocal last
            try:
                status, body = self.request("POST", "/predict", b'{"features": [0.1, 0.2, 0.3, 0.4]}')
            except (OSError, http.client.HTTPException):
                assert self._child is not None
                assert self._child.poll() is None, self.log.read_text()[-3000:]
                return False
            last = json.loads(body)
            return status == 200 and all(last.get(key) == value for key, value in expected.items())

        eventually(matches, f"an answer with {expected}, last {last}", seconds)
        return last


class Stream:
    """Rows at a steady rate from a thread, while the ``with`` lasts; counts answers and failures."""

    def __init__(self, agent: AgentProcess, row: Sequence[float], rate: float = 100.0) -> None:
        self._agent, self._rate = agent, rate
        self._body = json.dumps({"features": list(row)}).encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: Counter[tuple[str, str, str]] = Counter()
        self.refused = 0  # nobody listened: the agent was down
        self.wrong: list[str] = []  # answered, but not with 200 and a decision
        self.longest_gap = 0.0

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._over.wait(1 / self._rate):
            try:
                status, body = self._agent.request("POST", "/predict", self._body)
            except (OSError, http.client.HTTPException):
                self.refused += 1
                continue
            if status != 200:
                self.wrong.append(f"{status} {body[:200]!r}")
                continue
            now = time.perf_counter()
            self.longest_gap, last = max(self.longest_gap, now - last), now
            answer = json.loads(body)
            self.answers[answer["source"], answer["reason"], answer["version"]] += 1

"""Real services for tests: mosquitto and Prometheus, each on a free loopback port with its own data.

A service that is not installed skips the test with the reason; with CI=true in the environment it fails it,
so that a green run in CI has run everything. A started process never outlives its fixture.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

START_SECONDS = 30.0  # generous: the machine may be busy; a healthy start takes well under two
STOP_SECONDS = 10.0  # then SIGKILL
POLL_SECONDS = 0.02

# Straight to loopback, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServiceError(RuntimeError):
    """A service did not start, or did not answer, in time."""


class Sample(NamedTuple):
    """One element of an instant query's vector."""

    labels: dict[str, str]
    value: float


class Series(NamedTuple):
    """One element of a range selector's matrix: (unix seconds, value), oldest first."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Poll ``condition`` until it holds; ServiceError saying ``what`` did not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(f"{what}: not within {seconds:g} s")
        time.sleep(POLL_SECONDS)


def require(program: str, package: str | None = None) -> str:
    """The path of a program; without it the test is skipped, or fails where CI=true."""
    # Debian puts daemons where only root's PATH looks.
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin")
    if path is None:
        reason = f"{program} is not installed: apt-get install {package or program}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (required where CI=true)")
        pytest.skip(reason)
    return path


class _Process:
    """A child process with its output in a file."""

    def __init__(self, argv: Sequence[str], folder: Path) -> None:
        self.argv, self.folder = list(argv), folder
        self.log = folder / "log"
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, ready: Callable[[], bool]) -> None:
        with self.log.open("ab") as log:
            child = self._child = subprocess.Popen(
                self.argv, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            eventually(lambda: child.poll() is not None or ready(), f"{self.argv[0]} ready")
            if child.poll() is not None:
                raise ServiceError(f"{self.argv[0]} ended with {child.returncode} at start")
        except ServiceError as error:
            self.stop()
            raise ServiceError(f"{error}; its last output:\n{self.log.read_text()[-2000:]}") from error

    def stop(self, *, kill: bool = False) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if kill:
            child.kill()
        else:
            child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Mosquitto:
    """A broker at ``host``:``port``; after ``stop()`` the port refuses until ``start()``.

    ``settings`` is a mosquitto.conf whose ``listener 1883`` is moved to the free port.
    """

    host = "127.0.0.1"

    def __init__(
        self, folder: Path, settings: str = "listener 1883\nallow_anonymous true\npersistence false\n"
    ) -> None:
        program = require("mosquitto")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        config = folder / "mosquitto.conf"
        # Started as root it would drop to a user that cannot read the test's folder: it stays.
        config.write_text(
            settings.replace("listener 1883\n", f"listener {self.port} {self.host}\n") + "\nuser root\n"
        )
        self._process = _Process([program, "-c", str(config)], folder)

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        self._process.start(self._accepts)

    def stop(self, *, kill: bool = False) -> None:
        """End it; with ``kill`` by SIGKILL, as a power cut would."""
        self._process.stop(kill=kill)

    def _accepts(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return False
        return True


class Prometheus:
    """A Prometheus at ``url`` that accepts remote write and scrapes what ``scrape()`` was told."""

    def __init__(self, folder: Path) -> None:
        program = require("prometheus")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.remote_write_url = f"{self.url}/api/v1/write"
        self._targets = folder / "targets.json"
        self._targets.write_text("[]")
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}\n"
            "storage: {tsdb: {out_of_order_time_window: 24h}}\n"
            "scrape_configs:\n"
            "  - job_name: edge-agent\n"
            "    file_sd_configs: [{files: [targets.json], refresh_interval: 250ms}]\n"
        )
        self._process = _Process(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--web.enable-remote-write-receiver",
                "--log.level=warn",
            ],
            folder,
        )

    def start(self) -> None:
        """Start and wait until it answers queries."""
        self._process.start(self._ready)

    def stop(self, *, kill: bool = False) -> None:
        """End it; with ``kill`` by SIGKILL. Its data stay for the next ``start()``."""
        self._process.stop(kill=kill)

    def scrape(self, targets: Mapping[str, Mapping[str, str]]) -> None:
        """Scrape these ``host:port`` addresses from now on, each with its labels (``device``)."""
        groups = [{"targets": [address], "labels": dict(labels)} for address, labels in targets.items()]
        staged = self._targets.with_suffix(".tmp")
        staged.write_text(json.dumps(groups))
        staged.replace(self._targets)

    def query(self, promql: str) -> list[Sample]:
        """The vector of an instant query, evaluated now."""
        return [
            Sample(result["metric"], float(result["value"][1])) for result in self._query(promql, "vector")
        ]

    def series(self, promql: str) -> list[Series]:
        """The raw samples of a range selector such as ``edge_answers_total[1h]``."""
        return [
            Series(result["metric"], [(float(when), float(value)) for when, value in result["values"]])
            for result in self._query(promql, "matrix")
        ]

    def _query(self, promql: str, kind: str) -> list[dict[str, Any]]:
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
        try:
            with _OPENER.open(url, timeout=10) as answer:
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ServiceError(
                    f"{promql}: {error.code} {error.read().decode(errors='replace')}"
                ) from error
        if data["resultType"] != kind:
            raise ServiceError(f"{promql}: a {data['resultType']}, not a {kind}")
        result: list[dict[str, Any]] = data["result"]
        return result

    def _ready(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

"""A device and a release repository for tests: real store, real TUF, real onnxruntime; the traffic is said.

``TalliedServing`` is the serving side as the updater sees it, loading real bundles; what they answered is
whatever the test says. The agent's own service takes its place in test_with_the_service.py.
"""

from __future__ import annotations

import datetime
import random
import ssl
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from edge_agent.config import EngineConfig, ProbationConfig, UpdatesConfig
from edge_agent.contract.assignments import (
    Assignments,
    Candidate,
    Cohort,
    Mode,
    ModelAssignment,
    Release,
    Split,
)
from edge_agent.contract.bundle import MODEL, Bundle
from edge_agent.contract.digest import Digest
from edge_agent.serving.engine import Engine
from edge_agent.store.fs import Disk
from edge_agent.store.state import State
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.update.updater import Updater
from fleet.repository import ExpiryConfig, Keys, Repository
from tests.support.bundles import tiny_bundle

DEVICE = "unit-1"


@dataclass
class Served:
    rows: int = 0
    fallback_rows: int = 0
    non_finite_rows: int = 0
    failed_rows: int = 0
    latencies: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    late_rows: int = 0


@dataclass
class Shadowed:
    requests: int = 0
    rows: int = 0
    disagreeing_rows: int = 0
    seconds: float = 0.0
    active_seconds: float = 0.0


@dataclass
class Status:
    name: str
    digest: str | None
    state: str


class TalliedServing:
    """Serves one release of each model; rows and faults come from the test."""

    def __init__(self) -> None:
        self.running: dict[str, Bundle] = {}
        self.states: dict[str, str] = {}
        self.tallies: dict[str, Served] = {}
        self.before: dict[str, Served] = {}
        self.shadows: dict[str, Bundle] = {}
        self.shadowed = Shadowed()
        self.killed: dict[str, bool] = {}
        self.swaps: list[str] = []
        self.forgotten: list[str] = []
        self.fault: Exception | None = None

    async def prepare(self, bundle: Bundle) -> Bundle:
        if self.fault is not None:
            raise self.fault
        bundle.verify()
        Engine.load(bundle.member(MODEL), EngineConfig())
        return bundle

    def swap(self, prepared: Bundle) -> None:
        if prepared.name in self.tallies:
            self.before[prepared.name] = self.tallies[prepared.name]
        self.running[prepared.name] = prepared
        self.states[prepared.name] = "ready"
        self.tallies[prepared.name] = Served()
        self.swaps.append(prepared.manifest.version)

    def served(self, name: str) -> Served:
        return self.tallies[name]

    def served_before(self, name: str) -> Served | None:
        return self.before.get(name)

    def shadow(self, prepared: Bundle, share: float) -> None:
        assert prepared.name not in self.shadows
        self.shadows[prepared.name] = prepared

    def shadow_report(self, name: str) -> Shadowed:
        return self.shadowed

    async def end_shadow(self, name: str) -> None:
        self.shadows.pop(name, None)

    def split(self, prepared: Bundle, share: float) -> None:
        raise AssertionError("A/B is shown with the real service: tests/update/test_ab.py")

    def split_report(self, name: str) -> None:
        return None

    def end_split(self, name: str) -> None:
        pass

    def forget(self, prepared: Bundle) -> None:
        self.forgotten.append(prepared.manifest.version)

    def degrade(self, name: str, state: str, reason: str) -> None:
        self.states[name] = state

    def set_killed(self, name: str, killed: bool) -> None:
        self.killed[name] = killed

    def statuses(self) -> list[Status]:
        return [Status(name, bundle.digest, self.states[name]) for name, bundle in self.running.items()]

    def take_up(self, store: Store) -> None:
        """What the agent does at its start."""
        for model in store.models():
            bundle = store.current(model)
            if bundle is None:
                continue
            if self.states.get(model) == "rejected":
                self.running[model] = bundle
            else:
                self.swap(bundle)


@dataclass
class Clock:
    """Time that passes when the test says so."""

    seconds: float = 1000.0
    offset: float = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).timestamp() - 1000.0)

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> float:
        return self.seconds + self.offset

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Publisher:
    """The other end: a fleet's repository, and what it says today."""

    def __init__(self, folder: Path, **expiry: float) -> None:
        self.folder = folder
        self.repository = Repository.create(
            folder / "repository", Keys(folder / "keys"), ExpiryConfig(**expiry)
        )
        self.path = self.repository.path
        self.root = folder / "root.json"
        self.root.write_bytes(self.repository.root())
        self.models: dict[str, ModelAssignment] = {}
        self._bundles = 0

    def publish(self, version: str, *, name: str = "demo", **options: Any) -> Release:
        """Sign a tiny bundle as a release."""
        self._bundles += 1
        bundle = tiny_bundle(self.folder / f"bundle-{self._bundles}", name, version, **options)
        return self.publish_bundle(bundle)

    def publish_bundle(self, bundle: Bundle) -> Release:
        return self.repository.publish(bundle).release

    def assign(self, release: Release | None, *, name: str = "demo", **more: Any) -> None:
        """Make it the stable release for everybody."""
        self.models[name] = ModelAssignment(stable=release, **more)
        self.sign()

    def assign_candidate(
        self,
        release: Release,
        *,
        stable: Release | None,
        mode: Mode = Mode.ACTIVE,
        ab: Split | msgspec.UnsetType = msgspec.UNSET,
    ) -> None:
        candidate = Candidate(release, Cohort(devices=(DEVICE,)), mode, rollout="r1", ab=ab)
        self.models["demo"] = ModelAssignment(stable=stable, candidate=candidate)
        self.sign()

    def sign(self) -> None:
        serial = self.repository.assignments().serial + 1
        self.repository.assign(Assignments(serial=serial, models=dict(self.models)))


class Device:
    """One device: store, serving side, updater and a clock of its own."""

    def __init__(
        self,
        folder: Path,
        publisher: Publisher,
        name: str = DEVICE,
        *,
        disk: Disk | None = None,
        **config: Any,
    ) -> None:
        probation = ProbationConfig(seconds=60, requests=100, max_seconds=3600, max_restarts=2)
        self.config = msgspec.structs.replace(
            UpdatesConfig(
                source=str(publisher.path), root=str(publisher.root), in_process=True, jitter=0.0,
                timeout_seconds=20.0, probation=probation,
            ),
            **config,
        )  # fmt: skip
        self.folder, self.name = folder, name
        self.clock = Clock()
        self.start(disk)

    def start(self, disk: Disk | None = None) -> None:
        """A new process, as far as the store can tell."""
        self.store = Store.open(self.folder, disk)
        self.serving = TalliedServing()
        self.metrics = AgentMetrics(CollectorRegistry(), self.name, "0.1.0")
        self.updater = Updater(
            self.config, self.name, self.store, self.serving, self.metrics,
            now=self.clock.now, monotonic=self.clock.monotonic, rng=random.Random(1),
        )  # fmt: skip

    async def restart(self, disk: Disk | None = None) -> None:
        """The process dies and the agent comes up again, in the order of app.run."""
        self.store.close()
        self.start(disk)
        await self.updater.recover()
        self.serving.take_up(self.store)

    async def commit(self) -> None:
        """Let what is on probation prove itself."""
        (tally,) = self.serving.tallies.values()
        tally.rows += 100
        self.clock.sleep(61)
        await self.updater.run_once()

    async def follow(self) -> None:
        """Poll once, and commit."""
        await self.updater.run_once()
        await self.commit()

    def state(self, model: str = "demo") -> State:
        return self.store.record(model).state

    def version(self, model: str = "demo") -> str | None:
        """What the store says answers, every byte of it proven."""
        current = self.store.current(model)
        if current is None:
            return None
        current.verify()
        return current.manifest.version

    def result_count(self, result: str, model: str = "demo") -> float:
        value = self.metrics.registry.get_sample_value(
            "edge_update_results_total", {"model": model, "result": result}
        )
        return value or 0.0

    def shown_state(self, model: str = "demo") -> str:
        (shown,) = (
            state.value
            for state in State
            if self.metrics.registry.get_sample_value(
                "edge_update_state", {"model": model, "state": state.value}
            )
        )
        return shown


class StaticServer:
    """A web server for a folder, with ETags, counting what was asked."""

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.cut_after: int | None = None  # bytes of a blob, then the connection ends
        self.hang_on: str | None = None  # requests with this in their path get no answer
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(_Handler, directory=str(folder), owner=self)
        )
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, owner: StaticServer, **more: Any) -> None:
        self.owner = owner
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self._answer(404, b"")
            return
        data = path.read_bytes()
        etag = f'"{Digest.of_bytes(data).short}"'
        if self.headers.get("If-None-Match") == etag:
            self._answer(304, b"", etag)
            return
        wanted = self.headers.get("Range")
        if wanted:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self._answer(206, data[first:], etag, f"bytes {first}-{len(data) - 1}/{len(data)}")
            return
        self._answer(200, data, etag)

    def _answer(self, status: int, body: bytes, etag: str = "", content_range: str = "") -> None:
        self.owner.requests.append((self.command, self.path, status))
        if self.owner.hang_on is not None and self.owner.hang_on in self.path:
            self.owner.released.wait()
            self.close_connection = True
            return
        self.send_response(status)
        if etag:
            self.send_header("ETag", etag)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.owner.cut_after is not None and "/blobs/" in self.path:
            self.wfile.write(body[: self.owner.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass

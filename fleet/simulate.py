"""Simulated devices: real updaters, real stores, real TUF over real HTTP; only the traffic is modelled.

Every device of a ``Site`` is an ``edge_agent.update.Updater`` with an ``edge_agent.store.Store`` of its own,
in one process. What a model does with requests comes from a ``Profile`` per version, and is exposed by the
agent's own metrics class at ``/devices/<id>/metrics``, so that ``measure.Scraper`` reads a simulated device
as it reads a real one. ``edge-fleet simulate`` carries out a good and a bad roll-out on a site; tests use the
same site.

The self-test is real too: a simulated bundle holds a small real ONNX model with golden vectors, so this
module alone of the fleet side needs onnxruntime at run time (through ``edge_agent.update``).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import random
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Final

from prometheus_client import CollectorRegistry

from edge_agent import __version__
from edge_agent.config import ProbationConfig, UpdatesConfig
from edge_agent.contract import golden as goldens
from edge_agent.contract.assignments import Release
from edge_agent.contract.bundle import MODEL, RULES, Bundle, write_bundle
from edge_agent.contract.golden import Array, Golden
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version
from edge_agent.errors import EdgeError
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics, ReleaseMetrics
from edge_agent.update.updater import Updater
from fleet import controller, folder, status
from fleet.controller import Controller
from fleet.errors import FleetError
from fleet.folder import Fleet
from fleet.machine import Phase
from fleet.serve import StaticServer

NAME: Final = "simulated"  # the model of simulated bundles


@dataclass(frozen=True, slots=True)
class Profile:
    """What a version does with requests."""

    fail: float = 0.05  # share of rows decided fail
    fallback: float = 0.0  # share of rows that the rules answer because the model raised
    latency: float = 0.0004  # median seconds a request
    spread: float = 0.3  # of the logarithm of the latency


@dataclass(frozen=True, slots=True)
class _Served:
    rows: int
    fallback_rows: int
    non_finite_rows: int = 0
    failed_rows: int = 0  # decisions, latencies and scores are compared by the fleet's analysis here
    latencies: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    late_rows: int = 0


@dataclass(frozen=True, slots=True)
class _Status:
    name: str
    digest: str | None
    state: str


@dataclass(frozen=True, slots=True)
class _NothingSeen:
    """Shadow mode is not modelled: nothing is compared, so a shadow goes live when its time is over."""

    requests: int = 0
    rows: int = 0
    disagreeing_rows: int = 0
    seconds: float = 0.0
    active_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _NothingTried:
    """Neither is A/B."""

    candidate: _Served = _Served(0, 0)
    active: _Served = _Served(0, 0)
    ended: str = ""


@dataclass(frozen=True, slots=True)
class _Prepared:
    bundle: Bundle


class ModelledServing:
    """The serving side of one device: answers ``rate`` rows a second as the version's profile says.

    Rows are accounted for when somebody looks (a scrape, the updater's probation), so that a thousand devices
    cost nothing in between. Thread-safe: scrapes come from the HTTP server's threads.
    """

    def __init__(
        self,
        device: str,
        profiles: Mapping[Version, Profile],
        rate: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        registry = CollectorRegistry()
        self.metrics = AgentMetrics(registry, device, __version__)
        self._profiles = profiles
        self._rate = rate
        self._clock = clock
        self._random = random.Random(device)
        self._lock = threading.RLock()
        self._since = clock()
        self._owed = 0.0  # rows, less than one
        self._release: Release | None = None
        self._counters: ReleaseMetrics | None = None
        self._rows = self._fallback_rows = 0
        self._killed = self._rejected = self._split = False
        self._ok = self.metrics.request("http", "ok")

    async def prepare(self, bundle: Bundle) -> _Prepared:
        """Verify the bundle, as serving does before it loads one."""
        bundle.verify()
        return _Prepared(bundle)

    def swap(self, prepared: _Prepared) -> None:
        """Answer with another release from now on."""
        with self._lock:
            self._account()
            manifest = prepared.bundle.manifest
            self._release = Release(manifest.version, prepared.bundle.digest)
            self._counters = self.metrics.for_release(manifest.name, manifest.version)
            self._rows = self._fallback_rows = 0
            self._rejected = False
            self.metrics.model_info(manifest.name, manifest.version, prepared.bundle.digest)
            self.metrics.model_state(manifest.name, "ready")

    def served(self, model: str) -> _Served:
        """Rows since the last swap."""
        with self._lock:
            self._account()
            return _Served(self._rows, self._fallback_rows)

    def served_before(self, model: str) -> _Served | None:
        """Not kept: probation judges the release by itself."""
        return None

    def shadow(self, prepared: _Prepared, share: float) -> None:
        """Nothing is compared."""

    def shadow_report(self, model: str) -> _NothingSeen:
        """Nothing was compared."""
        return _NothingSeen()

    async def end_shadow(self, model: str) -> None:
        """Nothing to end."""

    def split(self, prepared: _Prepared, share: float) -> None:
        """As a shadow: nothing is compared, so it goes live when its time is over."""
        self._split = True

    def split_report(self, model: str) -> _NothingTried | None:
        """Nobody asked it anything."""
        return _NothingTried() if self._split else None

    def end_split(self, model: str) -> None:
        """Nothing to end."""
        self._split = False

    def forget(self, prepared: object) -> None:
        """Nothing to free."""

    def degrade(self, model: str, state: str, reason: str) -> None:
        """It failed, and there is nothing to go back to: every answer comes from the rules."""
        with self._lock:
            self._account()
            self._rejected = True
            self.metrics.model_state(model, state)

    def set_killed(self, model: str, killed: bool) -> None:
        """The signed kill switch: every answer comes from the rules."""
        with self._lock:
            self._account()
            self._killed = killed

    def statuses(self) -> list[_Status]:
        """The one model, if there is one yet."""
        release = self.running()
        return [_Status(NAME, release.digest, "rejected" if self._rejected else "ready")] if release else []

    def running(self) -> Release | None:
        """The release that answers now."""
        with self._lock:
            return self._release

    def exposition(self) -> bytes:
        """The metrics, with everything answered until now."""
        with self._lock:
            self._account()
            return self.metrics.exposition()

    def _account(self) -> None:
        now = self._clock()
        owed = self._owed + (now - self._since) * self._rate
        self._since = now
        rows, self._owed = int(owed), owed % 1.0
        if self._release is None or self._counters is None:
            return  # no model yet, and nobody to ask it
        profile = self._profiles.get(self._release.version, Profile())
        for _ in range(rows):
            failed = int(self._random.random() < profile.fail)
            seconds = profile.latency * math.exp(self._random.gauss(0.0, profile.spread))
            away = "killed" if self._killed else "rejected" if self._rejected else ""
            by_rules = self._random.random() < profile.fallback
            reason = away or ("model_error" if by_rules else "ok")
            self._counters.answered(reason, 1, failed, seconds)
            self._ok()
            self._fallback_rows += reason == "model_error"
        self._rows += rows


class Site:
    """Simulated devices and the HTTP server that exposes them.

    Args:
        path: folder of the stores.
        source: URL of the release repository.
        root: the TUF root of the fleet.
        profiles: what each version does; a version that is not there is a good one.
        rate: rows a second of each device.
        poll_seconds: interval of the updaters.
        probation: how a device itself judges a new release.
    """

    def __init__(
        self,
        path: Path,
        devices: int,
        *,
        source: str,
        root: bytes,
        profiles: Mapping[Version, Profile],
        rate: float = 200.0,
        poll_seconds: float = 0.5,
        probation: ProbationConfig | None = None,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "root.json").write_bytes(root)
        self._path = path
        self._updates = UpdatesConfig(
            source=source,
            root=str(path / "root.json"),
            interval_seconds=poll_seconds,
            probation=probation or ProbationConfig(seconds=0.5, requests=20, max_seconds=30.0),
            in_process=True,
        )
        self.serving = {
            f"sim-{number:04}": ModelledServing(f"sim-{number:04}", profiles, rate)
            for number in range(1, devices + 1)
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name="devices")
        self._ready = threading.Event()
        self._server = _MetricsServer(("127.0.0.1", 0), _Metrics)
        self._server.site = self
        self._server_thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="device-metrics"
        )

    def start(self) -> None:
        """Start every device and the metrics server."""
        self._server_thread.start()
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Stop everything."""
        if self._loop is not None:
            for device in list(self.serving):
                self.cut(device)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._server.shutdown()
        self._server_thread.join()
        self._server.server_close()

    def cut(self, device: str) -> None:
        """Take a device off the network: its updater stops, its metrics are gone."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._cut(device), self._loop).result()

    def address(self, device: str) -> str:
        """The base URL of a device."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/devices/{device}"

    def inventory(self) -> str:
        """devices.yaml of the site: every other device on another line of the plant."""
        devices = [
            {"id": device, "address": self.address(device), "labels": {"line": "AB"[number % 2]}}
            for number, device in enumerate(self.serving)
        ]
        return json.dumps({"devices": devices}, indent=1) + "\n"  # JSON is YAML

    def running(self) -> dict[str, Release | None]:
        """What every device answers with now."""
        return {device: serving.running() for device, serving in self.serving.items()}

    def exposition(self, device: str) -> bytes | None:
        """The metrics of a device; None if there is no such device on the network."""
        return self.serving[device].exposition() if device in self._tasks else None

    def _run(self) -> None:
        loop = self._loop = asyncio.new_event_loop()
        for device, serving in self.serving.items():
            self._tasks[device] = loop.create_task(self._device(device, serving), name=device)
        loop.call_soon(self._ready.set)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    async def _device(self, device: str, serving: ModelledServing) -> None:
        store = Store.open(self._path / device)
        try:
            updater = Updater(
                self._updates, device, store, serving, serving.metrics, rng=random.Random(device)
            )
            await updater.recover()
            await updater.run()
        finally:
            store.close()

    async def _cut(self, device: str) -> None:
        task = self._tasks.pop(device, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class _MetricsServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False
    site: Site


class _Metrics(BaseHTTPRequestHandler):
    server: _MetricsServer
    protocol_version = "HTTP/1.1"
    server_version = "edge-fleet-simulate"
    timeout: ClassVar[float] = 30.0

    def do_GET(self) -> None:
        """``/devices/<id>/metrics``."""
        parts = self.path.split("/")
        body = None
        if len(parts) == 4 and parts[1] == "devices" and parts[3] == "metrics":
            body = self.server.site.exposition(parts[2])
        if body is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet: every device is scraped every second."""


def simulated_bundle(path: Path, version: Version) -> Bundle:
    """A bundle with a small real ONNX model (the mean of two numbers) and golden vectors."""
    path.mkdir(parents=True)
    rows = ((0.0, 0.5), (1.0, 3.0), (-2.0, 2.0))
    golden = Golden(
        inputs=(Array("x", Datatype.FP32, (3, 2), struct.pack("<6f", *(v for row in rows for v in row))),),
        outputs=(Array("score", Datatype.FP32, (3,), struct.pack("<3f", *(sum(row) / 2 for row in rows))),),
        absolute=1e-6,
    )
    manifest = Manifest(
        name=NAME,
        version=version,
        task=Task.ANOMALY,
        inputs=(TensorSpec("x", Datatype.FP32, (-1, 2), features=("a", "b")),),
        outputs=(TensorSpec("score", Datatype.FP32, (-1,)),),
        members={},
        decision=Decision("score", 1.0),
        precision="fp32",
    )
    files = {
        MODEL: _mean_model(version),
        RULES: b"default: fail\n",
        goldens.FILE_NAME: goldens.encode(golden),
    }
    return write_bundle(path, manifest, files)


def _mean_model(version: Version) -> bytes:
    """The ONNX bytes of ``score = ReduceMean(x, axes=[1], keepdims=0)``, opset 13, written by hand.

    onnx is not installed where a fleet is operated. Field numbers: onnx.proto3 of
    https://github.com/onnx/onnx (ModelProto, GraphProto, NodeProto, AttributeProto, ValueInfoProto).
    """

    def varint(number: int) -> bytes:
        out = b""
        while number > 0x7F:
            out += bytes([number & 0x7F | 0x80])
            number >>= 7
        return out + bytes([number])

    def field(number: int, value: int | bytes | str) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        data = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(data)) + data

    def tensor(name: str, *dimensions: str | int) -> bytes:
        shape = b"".join(
            field(1, field(1, dim) if isinstance(dim, int) else field(2, dim)) for dim in dimensions
        )
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))  # element type 1: float

    axes = field(1, "axes") + field(8, 1) + field(20, 7)  # ints; type INTS
    keep = field(1, "keepdims") + field(3, 0) + field(20, 2)  # i; type INT
    node = field(1, "x") + field(2, "score") + field(4, "ReduceMean") + field(5, axes) + field(5, keep)
    graph = (
        field(1, node) + field(2, "mean") + field(11, tensor("x", "n", 2)) + field(12, tensor("score", "n"))
    )
    opset = field(1, "") + field(2, 13)
    return (
        field(1, 8)
        + field(2, "edge-fleet")
        + field(6, f"simulated {version}")
        + field(7, graph)
        + field(8, opset)
    )


# A roll-out in seconds instead of minutes; the rules are the product's own.
_POLICY: Final = """\
name: simulated
policy:
  canary: {{devices: {canary}, stratify_by: [line]}}
  waves: [0.5]
  interval_seconds: 0.5
  max_unreachable: 0.1
  in_progress_timeout_seconds: 30
  progress_deadline_seconds: 120
  analysis:
    initial_delay_seconds: 0.5
    count: 3
"""
_SETTLE_SECONDS: Final = 120.0  # for what takes two; a loaded machine may be slow


@contextlib.contextmanager
def site(
    path: Path, devices: int, profiles: Mapping[Version, Profile], policy: str = ""
) -> Iterator[tuple[Fleet, Site]]:
    """A fleet folder, its release server and its devices, all running."""
    made = folder.create(path / "fleet", "simulated")
    canary = max(2, min(10, devices // 5))
    made.folder.config.write_text(policy or _POLICY.format(canary=canary))
    server = StaticServer(made.folder.repository, port=0)
    server.start()
    try:
        running = Site(
            path / "devices", devices, source=server.url, root=made.repository.root(), profiles=profiles
        )
        made.folder.devices.write_text(running.inventory())
        running.start()
        try:
            yield folder.opened(made.folder.root), running
        finally:
            running.stop()
    finally:
        server.stop()


def run(devices: int, bad: Version, *, keep: Path | None = None, as_json: bool = False) -> int:
    """``edge-fleet simulate``: first release, a good roll-out, a bad one. Returns the exit code."""
    if devices < 3:
        raise FleetError(f"{devices} devices: a canary needs others to be compared with, give at least 3")
    if importlib.util.find_spec("onnxruntime") is None:
        raise FleetError("simulated devices test their models with onnxruntime, which is not installed")
    if bad <= Version("2.0.0"):
        raise FleetError(f"--bad-version {bad}: it must be above 2.0.0, the good release of the simulation")
    with tempfile.TemporaryDirectory(prefix="edge-fleet-simulate-") as temporary:
        path = keep or Path(temporary)
        say = (lambda _: None) if as_json else (lambda text: print(text, flush=True))
        profiles = {bad: Profile(fail=0.6)}  # calibrated in wrong units, say: it fails most parts
        try:
            with site(path, devices, profiles) as (fleet, running):
                report = _story(fleet, running, path, bad, say)
        except EdgeError as error:
            raise FleetError(f"the simulated devices stopped: {error}") from error
    if as_json:
        print(json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


def _story(
    fleet: Fleet, running: Site, path: Path, bad: Version, say: Callable[[str], None]
) -> dict[str, object]:
    first, good = Version("1.0.0"), Version("2.0.0")
    report: dict[str, object] = {"devices": len(running.serving), "steps": []}
    steps: list[dict[str, object]] = []
    ok = True

    def done(what: str, began: float, expected: bool) -> None:
        nonlocal ok
        ok &= expected
        seconds = time.monotonic() - began
        steps.append({"step": what, "seconds": round(seconds, 2), "ok": expected})
        say(f"{'ok  ' if expected else 'FAIL'} {what}: {seconds:.1f} s")

    began = time.monotonic()
    for version in (first, good, bad):
        fleet.repository.publish(simulated_bundle(path / "bundles" / version, version))
    fleet.commit("Three simulated releases", trailers={"Reason": "simulate"})
    done("three releases are signed and published", began, expected=True)

    began = time.monotonic()
    fleet.assign_stable(NAME, first, Phase.SUCCEEDED, "simulate")
    done(f"{len(running.serving)} devices install {first}", began, _settles(running, first))

    for version, phase, ends in ((good, Phase.SUCCEEDED, good), (bad, Phase.ROLLED_BACK, good)):
        began = time.monotonic()
        record = controller.start(fleet, NAME, version)
        say(f"     {record.plan.power}")
        for step in Controller(fleet).run(record.id):
            record = step
            say(f"     {status.line(record, time.time())}")
            if record.phase is Phase.PAUSED:
                break  # it waits for a person, and here is none
        done(
            f"{record.id} ends {record.phase.value} (expected {phase.value}): {record.reason}",
            began,
            record.phase is phase,
        )
        began = time.monotonic()
        done(f"every device runs {ends}", began, _settles(running, ends))

    results = [
        float(
            serving.metrics.registry.get_sample_value(
                "edge_update_results_total", {"model": NAME, "result": "failed_unable_to_rollback"}
            )
            or 0
        )
        for serving in running.serving.values()
    ]
    done(f"failed updates: {sum(results):.0f}", time.monotonic(), not any(results))
    report |= {"steps": steps, "ok": ok}
    return report


def _settles(running: Site, version: Version) -> bool:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        if all(release is not None and release.version == version for release in running.running().values()):
            return True
        time.sleep(0.05)
    for device, release in running.running().items():
        if release is None or release.version != version:
            print(f"{device} runs {release.version if release else 'nothing'}", file=sys.stderr)
    return False

"""The composition root: builds everything from ``Config``, runs it in one TaskGroup, stops it in order.

``run`` is the story of an agent's life, top to bottom. Answers come first: the store is recovered, what it
holds is taken up, the doors open; only then are updates followed.

One agent writes a store. A second one answers over HTTP from what the first installs, and nothing else: there
is one control socket, one MQTT session, one queue of metrics and one updater per store. It gets them when the
first is gone (``standby.py``).

SIGTERM and SIGINT stop it, SIGHUP reads the configuration again: what is wrong changes nothing, what is
right is taken up where it can be (``http``, ``mqtt``, ``remote_write``, ``log_level``) and named in the log
where it waits for the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry

from edge_agent import __version__
from edge_agent.config import CONTROL_SOCKET, Config
from edge_agent.errors import ConfigError, StoreError, UnknownModel
from edge_agent.serving.service import Service
from edge_agent.standby import Standby
from edge_agent.store.store import Store
from edge_agent.telemetry import health, logs
from edge_agent.telemetry.logs import EventLog
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.telemetry.remote_write import RemoteWriter
from edge_agent.transport.http import HttpServer
from edge_agent.transport.mqtt import Hold, MqttTransport
from edge_agent.update.updater import Updater

log = logging.getLogger(__name__)
events = EventLog(__name__)

DRAIN_SECONDS: Final = 5.0  # below Kubernetes' and systemd's default patience, see docs/operations.md
# How long a thread that computes in Python (rules being parsed, a bundle being looked at) keeps the event
# loop waiting, each time the loop wants to run. Python's own 5 ms add up to a gap that everybody sees.
SWITCH_SECONDS: Final = 0.0005
PULSE_SECONDS: Final = 1.0  # how often the event loop shows that it turns
LONGEST_PAUSE: Final = 60.0  # before a background task that keeps failing is begun again
MOST_ALARMS: Final = 20  # sources with active alarms that the status names, per model
LIVE_SECTIONS: Final = ("http", "mqtt", "remote_write", "log_level")  # taken up by SIGHUP


async def run(
    config: Config,
    *,
    started: Callable[[str], None] = lambda _: None,
    reread: Callable[[], Config] | None = None,
) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Args:
        config: what to do.
        started: told the URL once the agent answers.
        reread: the configuration as it is now; called on SIGHUP. None: SIGHUP changes nothing.

    Raises:
        StoreError: the store cannot be opened; another agent has it, or the disk refuses.
        ConfigError: an address cannot be listened on, a file that the configuration names cannot be read.
    """
    _limit_heap()
    sys.setswitchinterval(SWITCH_SECONDS)
    signals = _signals()
    await asyncio.to_thread(check_files, config)
    store = await asyncio.to_thread(Store.open_or_read, Path(config.store))
    try:
        metrics = AgentMetrics(CollectorRegistry(), config.device, __version__)
        service = Service(config.serving, config.engine, config.drift, metrics)
        updater = Updater(config.updates, config.device, store, service, metrics, engine=config.engine)
        agent = Agent(config, store, service, updater)
        http = HttpServer(config.http, service, metrics, admin=agent)
        control = Path(config.store) / CONTROL_SOCKET
        standby = Standby(store, service, agent.take_up)

        if store.writable:
            await updater.recover()
        await standby.follow()
        await http.start()
        if store.writable:
            await http.open_control(control)
        gc.collect()
        gc.freeze()  # what lives now lives for ever: the collector need not look at it again

        async with asyncio.TaskGroup() as tasks:
            background = Background(tasks)
            background.start("pulse", agent.watch_loop)
            background.start("drift", service.watch_drift)
            connections = Connections(config, service, metrics, background, hold=updater.heed)

            def write() -> None:
                """What the one agent does that writes this store."""
                metrics.store_writable.set(1)
                connections.start(agent.config)
                background.start("updates", updater.run)  # without a source: probation and repair only

            async def succeed() -> None:
                """Wait for the store, then go on where the agent before ended."""
                await standby.wait()
                events.event("store_taken", store=config.store)
                await updater.recover()
                await standby.follow()
                try:
                    await http.open_control(control)
                except ConfigError as error:  # an agent without commands still serves and updates
                    events.error("control_socket_refused", reason=str(error))
                write()
                _notify(f"STATUS=answers on {http.url}")

            if store.writable:
                write()
            else:
                connections.prepare(config)  # what is wrong with it is said now, not in the night
                if store.refusal is None or store.refusal.reason != "locked":
                    connections.start(config)  # a disk that refuses: there is nobody else to connect
                events.warning("store_read_only", store=config.store, reason=str(store.refusal))
                background.start("standby", succeed)
            _notify(f"READY=1\nSTATUS=answers on {http.url}")
            started(http.url)

            while await signals.get() == signal.SIGHUP:
                _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                config = await _reload(config, reread, http, connections)
                agent.config = config
                _notify(f"READY=1\nSTATUS=answers on {http.url}")

            _notify("STOPPING=1")
            events.event("agent_stopping", drain_seconds=DRAIN_SECONDS)
            await http.stop(DRAIN_SECONDS)
            background.cancel()
        if store.writable:
            await updater.stop()
    finally:
        store.close()


def check_files(config: Config) -> None:
    """Whatever the configuration names and is read later can be read now: a start tells, not a night.

    Raises:
        ConfigError: names the key, the file and why.
    """
    named: dict[str, str | None] = {}
    if config.mqtt is not None:
        named["mqtt.password_file"] = config.mqtt.password_file
        if (tls := config.mqtt.tls) is not None:
            named |= {"mqtt.tls.ca": tls.ca, "mqtt.tls.certificate": tls.certificate, "mqtt.tls.key": tls.key}
    if config.updates.source:
        updates = config.updates
        named |= {
            "updates.root": updates.root,
            "updates.ca_file": updates.ca_file,
            "updates.client_certificate": updates.client_certificate,
            "updates.client_key": updates.client_key,
            "updates.credentials_file": updates.credentials_file,
        }
    for key, path in named.items():
        if not path:
            continue
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{key} {path}: {error.strerror}; correct the path or its permissions"
            ) from error


async def _reload(
    config: Config, reread: Callable[[], Config] | None, http: HttpServer, connections: Connections
) -> Config:
    """The configuration that holds from now on: the new one, or the old one if the new one is wrong."""
    if reread is None:
        return config
    try:
        new = await asyncio.to_thread(reread)
        await asyncio.to_thread(check_files, new)
        prepared = connections.prepare(new)
        if new.http != config.http:
            await http.reconfigure(new.http)
    except ConfigError as error:
        events.error("configuration_refused", reason=str(error), now="the old one stays in force")
        return config
    await connections.replace(prepared)
    logs.configure(new.log_level)
    before, after = msgspec.structs.asdict(config), msgspec.structs.asdict(new)
    changed = [key for key in after if after[key] != before[key]]
    waiting = [key for key in changed if key not in LIVE_SECTIONS]
    events.event("configuration_reloaded", changed=changed, at_next_start=waiting)
    # What waits is still what runs: the next reload compares with that.
    return msgspec.structs.replace(new, **{key: before[key] for key in waiting})


class Background:
    """The long-lived tasks by name, all of one TaskGroup, each of which may be replaced.

    A task that fails in a way nobody foresaw is reported and begun again, more slowly each time: whatever
    happens beside serving must not end it.
    """

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``work()``, again after a failure, until it is replaced or everything stops."""
        self._running[name] = self._tasks.create_task(_again(name, work), name=name)

    async def end(self, name: str) -> None:
        """End one and wait for it."""
        task = self._running.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def cancel(self) -> None:
        """End all."""
        for task in self._running.values():
            task.cancel()


async def _again(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    pause = PULSE_SECONDS
    while True:
        began = time.monotonic()
        try:
            await work()
        except Exception:  # a fault of ours: reported with its traceback, and outlived
            log.exception("task %s failed; it begins again in %g s", name, pause)
        else:
            return
        await asyncio.sleep(pause)
        calm = time.monotonic() - began > LONGEST_PAUSE
        pause = PULSE_SECONDS if calm else min(2 * pause, LONGEST_PAUSE)


class Connections:
    """What this agent connects to: the broker and the metrics receiver, as the configuration has them."""

    def __init__(
        self, config: Config, service: Service, metrics: AgentMetrics, background: Background, *, hold: Hold
    ) -> None:
        self._device = config.device
        self._queue = Path(config.store) / "metrics"
        self._spool = Path(config.store) / "decisions"
        self._service = service
        self._metrics = metrics
        self._background = background
        self._hold = hold
        self._begun = False
        self._in_force: dict[str, Any] = {"mqtt": None, "remote_write": None}

    def start(self, config: Config) -> None:
        """Begin what is configured. Harmless when repeated.

        Raises:
            ConfigError: as ``prepare``.
        """
        if self._begun:
            return
        self._begun = True
        for name, (section, connection) in self.prepare(config).items():
            self._begin(name, section, connection)

    def prepare(self, config: Config) -> dict[str, tuple[Any, MqttTransport | RemoteWriter | None]]:
        """What ``replace`` would begin: the changed sections, each with its new connection, if any.

        Raises:
            ConfigError: a section is wrong; nothing was changed.
        """
        prepared: dict[str, tuple[Any, MqttTransport | RemoteWriter | None]] = {}
        if (broker := config.mqtt) != self._in_force["mqtt"]:
            transport = None
            if broker is not None:
                transport = MqttTransport(
                    broker, self._device, self._service, self._metrics, spool=self._spool, hold=self._hold
                )
            prepared["mqtt"] = (broker, transport)
        if (receiver := config.remote_write) != self._in_force["remote_write"]:
            prepared["remote_write"] = (
                receiver,
                RemoteWriter(receiver, self._queue, self._metrics, self._device) if receiver else None,
            )
        return prepared

    async def replace(self, prepared: dict[str, tuple[Any, MqttTransport | RemoteWriter | None]]) -> None:
        """End the old connection of each section, then begin the new one; nothing before ``start``."""
        if not self._begun:
            return
        for name, (section, connection) in prepared.items():
            await self._background.end(name)
            self._begin(name, section, connection)

    def _begin(self, name: str, section: Any, connection: MqttTransport | RemoteWriter | None) -> None:
        self._in_force[name] = section
        if connection is not None:
            self._background.start(name, connection.run)


class Agent:
    """What an operator may ask of a running agent, over the control socket."""

    def __init__(self, config: Config, store: Store, service: Service, updater: Updater) -> None:
        self.config = config
        self._store = store
        self._service = service
        self._updater = updater
        self._since = time.time()
        self._late = 0.0  # seconds by which the loop was late at its last beat

    async def take_up(self, model: str) -> None:
        """Serve what the store holds for a model, the rules if the model itself is damaged."""
        current = await asyncio.to_thread(self._readable, self._store.current, model)
        previous = await asyncio.to_thread(self._readable, self._store.previous, model)
        await self._service.start(model, current or previous, previous)

    async def watch_loop(self) -> None:
        """Note how late the event loop is, and tell systemd's watchdog that it turns; for ever."""
        interval = PULSE_SECONDS
        wanted = _watchdog_seconds()
        if wanted is not None:
            interval = min(interval, wanted / 2)
        while True:
            before = time.monotonic()
            await asyncio.sleep(interval)
            self._late = max(0.0, time.monotonic() - before - interval)
            if wanted is not None:
                _notify("WATCHDOG=1")

    async def status(self) -> dict[str, Any]:
        """Everything ``edge-agent status`` shows."""
        statuses = self._service.statuses()
        updates = self._updater.status()
        queue_share, disk_free = await asyncio.to_thread(self._measure_disk)
        return {
            "device": self.config.device,
            "agent": __version__,
            "uptime_seconds": round(time.time() - self._since, 1),
            "store": self.config.store,
            "models": [
                {
                    "name": status.name,
                    "version": status.version,
                    "digest": status.digest,
                    "state": status.state,
                    "reason": status.reason,
                    "precision": status.precision,
                    "drifting": status.drifting,
                    "served": {
                        "rows": (served := self._service.served(status.name)).rows,
                        "fallback_rows": served.fallback_rows,
                    },
                    "split": split.as_dict()
                    if (split := self._service.split_report(status.name)) is not None
                    else None,
                    "alarms": dict(list(self._service.alarms(status.name).items())[:MOST_ALARMS]),
                }
                for status in statuses
            ],
            "updates": updates,
            "health": health.as_dict(
                health.judge(
                    {status.name: status.state for status in statuses},
                    metadata_expires=updates.get("metadata_expires"),
                    now=time.time(),
                    loop_late_seconds=self._late,
                    queue_share=queue_share,
                    disk_free_bytes=disk_free,
                )
            ),
        }

    async def install(self, path: str) -> dict[str, Any]:
        """Install a local bundle: verified, self-tested, then live, in probation."""
        return (await self._updater.install(Path(path))).as_dict()

    async def rollback(self, model: str | None) -> dict[str, Any]:
        """Go back to the previous release at once."""
        return (await self._updater.roll_back(model)).as_dict()

    async def hold(self, until: str | None, reason: str, *, release: bool) -> dict[str, Any]:
        """Let no update begin, until a time or until it is released."""
        return await (self._updater.release_hold() if release else self._updater.hold(until, reason))

    async def load(self, model: str) -> None:
        """Load a model again from the store."""
        if model not in self._store.models():
            known = ", ".join(self._store.models()) or "nothing"
            raise UnknownModel(f"no model {model[:80]!r} in the store, it holds {known}")
        bundle = await asyncio.to_thread(self._store.current, model)
        if bundle is None:
            raise UnknownModel(f"model {model!r} has no current release in the store")
        await self._service.load(model, bundle)

    async def unload(self, model: str) -> None:
        """Free a model's memory; its rules answer until it is loaded again."""
        self._service.unload(model)

    def _measure_disk(self) -> tuple[float | None, int | None]:
        """How full the metrics queue is, 0 to 1, and the bytes free in the store; None where unknown."""
        share = free = None
        store = Path(self.config.store)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(store).free
        if self.config.remote_write is not None:
            with contextlib.suppress(OSError):  # a segment may go while we look
                size = sum(entry.stat().st_size for entry in os.scandir(store / "metrics"))
                share = size / self.config.remote_write.max_queue_bytes
        return share, free

    @staticmethod
    def _readable(read: Callable[[str], Any], model: str) -> Any:
        try:
            return read(model)
        except (StoreError, ValueError) as error:  # ContractError is a ValueError
            log.error("model %s: %s", model, error)
            return None


def _signals() -> asyncio.Queue[signal.Signals]:
    """SIGTERM, SIGINT and SIGHUP, in the order they came."""
    came: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, came.put_nowait, number)
    return came


def _limit_heap() -> None:
    """Make glibc give freed memory back: swaps otherwise leave the old model's pages in the heap.

    M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) at their initial 128 kB also switch off glibc's habit of
    raising them after the first large free (mallopt(3)). Other C libraries have no mallopt: nothing to do.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):
            libc.mallopt(parameter, 131072)


def _watchdog_seconds() -> float | None:
    """How often systemd wants to hear from us (sd_watchdog_enabled(3)); None if it does not listen."""
    try:
        meant = int(os.environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid()
        seconds = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6
    except ValueError:
        return None
    return seconds if meant and seconds > 0 else None


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without a service manager nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(state.encode())

"""The composition root: builds everything from ``Config``, runs it in one TaskGroup, stops it in order.

``run`` is the story of an agent's life, top to bottom. Answers come first: the store is recovered, what it
holds is taken up, the doors open; only then are updates followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from edge_agent import __version__
from edge_agent.config import CONTROL_SOCKET, Config
from edge_agent.errors import StoreError, UnknownModel
from edge_agent.serving.service import Service
from edge_agent.store.store import Store
from edge_agent.telemetry import health
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.telemetry.remote_write import RemoteWriter
from edge_agent.transport.http import HttpServer
from edge_agent.transport.mqtt import MqttTransport
from edge_agent.update.updater import Updater

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 5.0  # below Kubernetes' and systemd's default patience, see docs/operations.md


async def run(config: Config, *, started: Callable[[str], None] = lambda _: None) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Args:
        config: what to do.
        started: told the URL once the agent answers.

    Raises:
        StoreError: the store cannot be opened; another agent has it, or the disk refuses.
        ConfigError: an address cannot be listened on.
    """
    _limit_heap()
    stop = _stop_on_signals()
    store = await asyncio.to_thread(Store.open, Path(config.store))
    try:
        metrics = AgentMetrics(CollectorRegistry(), config.device, __version__)
        service = Service(config.serving, config.engine, config.drift, metrics)
        updater = Updater(config.updates, config.device, store, service, metrics)
        agent = Agent(config, store, service, updater)
        control = Path(config.store) / CONTROL_SOCKET
        http = HttpServer(config.http, service, metrics, admin=agent, unix_path=control)

        await updater.recover()
        for model in store.models():
            await agent.take_up(model)
        await http.start()
        gc.collect()
        gc.freeze()  # what lives now lives for ever: the collector need not look at it again

        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(service.watch_drift(), name="drift")]
            if config.updates.source:
                background.append(tasks.create_task(updater.run(), name="updates"))
            if config.mqtt is not None:
                mqtt = MqttTransport(config.mqtt, config.device, service, metrics)
                background.append(tasks.create_task(mqtt.run(), name="mqtt"))
            if config.remote_write is not None:
                queue = Path(config.store) / "metrics"
                writer = RemoteWriter(config.remote_write, queue, metrics, config.device)
                background.append(tasks.create_task(writer.run(), name="remote-write"))
            _notify("READY=1")
            started(http.url)

            await stop.wait()
            _notify("STOPPING=1")
            await http.stop(DRAIN_SECONDS)
            for task in background:
                task.cancel()
    finally:
        store.close()


class Agent:
    """What an operator may ask of a running agent, over the control socket."""

    def __init__(self, config: Config, store: Store, service: Service, updater: Updater) -> None:
        self._config = config
        self._store = store
        self._service = service
        self._updater = updater
        self._since = time.time()

    async def take_up(self, model: str) -> None:
        """Serve what the store holds for a model, the rules if the model itself is damaged."""
        current = await asyncio.to_thread(self._readable, self._store.current, model)
        previous = await asyncio.to_thread(self._readable, self._store.previous, model)
        await self._service.start(model, current or previous, previous)

    async def status(self) -> dict[str, Any]:
        """Everything ``edge-agent status`` shows."""
        statuses = self._service.statuses()
        updates = self._updater.status()
        return {
            "device": self._config.device,
            "agent": __version__,
            "uptime_seconds": round(time.time() - self._since, 1),
            "store": self._config.store,
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
                }
                for status in statuses
            ],
            "updates": updates,
            "health": health.as_dict(
                health.judge(
                    {status.name: status.state for status in statuses},
                    metadata_expires=updates.get("metadata_expires"),
                    now=time.time(),
                )
            ),
        }

    async def install(self, path: str) -> dict[str, Any]:
        """Install a local bundle: verified, self-tested, then live, in probation."""
        return (await self._updater.install(Path(path))).as_dict()

    async def rollback(self, model: str | None) -> dict[str, Any]:
        """Go back to the previous release at once."""
        return (await self._updater.roll_back(model)).as_dict()

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

    @staticmethod
    def _readable(read: Callable[[str], Any], model: str) -> Any:
        try:
            return read(model)
        except (StoreError, ValueError) as error:  # ContractError is a ValueError
            log.error("model %s: %s", model, error)
            return None


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _limit_heap() -> None:
    """Make glibc give freed memory back: swaps otherwise leave the old model's pages in the heap.

    M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) at their initial 128 kB also switch off glibc's habit of
    raising them after the first large free (mallopt(3)). Other C libraries have no mallopt: nothing to do.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):
            libc.mallopt(parameter, 131072)


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without a service manager nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(state.encode())

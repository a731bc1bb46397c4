"""A real service behind real transports, on a loop in a thread, so that tests can use blocking clients."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, HttpConfig, MqttConfig, ServingConfig
from edge_agent.contract.bundle import Bundle
from edge_agent.serving.service import Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport.http import HttpServer
from edge_agent.transport.mqtt import MqttTransport
from edge_agent.transport.routes import Admin

TIMEOUT = 20.0  # seconds; a healthy step takes milliseconds


class Agent:
    """Everything lives on ``loop``; ``call`` runs a coroutine there and waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.registry = CollectorRegistry()
        self.metrics = AgentMetrics(self.registry, "line-1", "0.0.0")
        self.service = Service(ServingConfig(), EngineConfig(), DriftConfig(enabled=False), self.metrics)
        self.http: HttpServer | None = None
        self._exits = contextlib.ExitStack()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT)

    def serve(self, bundle: Bundle | None, name: str | None = None) -> None:
        self.call(self.service.start(name or (bundle.name if bundle else "demo"), bundle))

    def unload(self, name: str) -> None:
        async def unload() -> None:
            self.service.unload(name)

        self.call(unload())

    def listen(self, admin: Admin | None = None, unix_path: Path | None = None, **config: Any) -> HttpServer:
        server = HttpServer(
            HttpConfig(**{"port": 0, **config}), self.service, self.metrics, admin=admin, unix_path=unix_path
        )
        self.call(server.start())
        self._exits.callback(lambda: self.call(server.stop(0)))
        self.http = server
        return server

    def subscribe(self, port: int, *, spool: Path | None = None, **config: Any) -> MqttTransport:
        async def start() -> tuple[MqttTransport, asyncio.Task[None]]:
            transport = MqttTransport(
                MqttConfig(port=port, **config), "line-1", self.service, self.metrics, spool=spool
            )
            return transport, asyncio.create_task(transport.run())

        async def stop(task: asyncio.Task[None]) -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        transport, task = self.call(start())
        self._exits.callback(lambda: self.call(stop(task)))
        self.call(asyncio.wait_for(transport.connected.wait(), TIMEOUT))
        return transport

    def counted(self, protocol: str, status: str) -> float:
        value = self.registry.get_sample_value(
            "edge_requests_total", {"protocol": protocol, "status": status}
        )
        assert value is not None
        return value

    def stop(self) -> None:
        self._exits.close()


@contextlib.contextmanager
def running(loop: asyncio.AbstractEventLoop | None = None) -> Iterator[Agent]:
    """An agent on uvloop, as in the product, until the block ends."""
    loop = loop or uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="agent")
    thread.start()

    async def make() -> Agent:
        return Agent(loop)

    try:
        agent: Agent = asyncio.run_coroutine_threadsafe(make(), loop).result(TIMEOUT)
        try:
            yield agent
        finally:
            agent.stop()
            agent.call(loop.shutdown_default_executor())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT)
        loop.close()


class Response(NamedTuple):
    """What an HTTP client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One keep-alive HTTP connection; ``reconnects`` must stay 0 for it to be the same one."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        self._connection.connect()
        self._socket = self._connection.sock

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Response:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self._connection.request(method, path, data, headers or {})
        answer = self._connection.getresponse()
        assert self._connection.sock in (self._socket, None)
        return Response(
            answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        )

    def get(self, path: str) -> Response:
        return self.ask("GET", path)

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Response:
        return self.ask("POST", path, body, headers)

    def still_open(self) -> bool:
        """Whether the connection is the first one, and answers."""
        return self._connection.sock is self._socket and self.get("/v2/health/live").status == 200

    def close(self) -> None:
        self._connection.close()

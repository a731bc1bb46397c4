"""HTTP/1.1 on asyncio and httptools: a thin adapter over the service.

Invariants:

- an inference request costs no task: it is parsed, submitted, and answered from the future's callback;
  so everything readable in one turn of the loop reaches the service in that turn, and goes through the model
  together;
- answers leave a connection in the order of its requests, however they were pipelined;
- a caller's mistake gets a 4xx with one ``{"error": ...}`` sentence, and the connection stays usable; only
  what breaks the framing itself (a garbage request line, an oversized header) is answered and closed;
- every resource is bounded: header, body, bodies in memory together, pipelined requests, connections, time;
- admin routes exist on the Unix socket only, which its file mode protects.

The domain knows no status codes: ``STATUS_BY_ERROR`` is the one table.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast
from urllib.parse import unquote

import httptools
import msgspec

import edge_agent
from edge_agent.config import HttpConfig
from edge_agent.contract.errors import ContractError
from edge_agent.errors import (
    BadRules,
    ConfigError,
    DeadlineExceeded,
    EdgeError,
    EngineError,
    InvalidInput,
    Overloaded,
    StoreError,
    Unavailable,
    UnknownModel,
    UpdateRejected,
)
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport import codec
from edge_agent.transport.page import PAGE

log = logging.getLogger(__name__)

STATUS_BY_ERROR: Final[Mapping[type[Exception], int]] = {
    UnknownModel: 404,
    InvalidInput: 400,
    Overloaded: 429,
    DeadlineExceeded: 504,
    Unavailable: 503,
    ContractError: 400,
    BadRules: 400,
    EngineError: 400,  # only load and install raise it: that model cannot be loaded
    UpdateRejected: 409,
    StoreError: 500,
}
"""Looked up along the error's class, most specific first; whatever is not listed is a 500."""

MAX_HEADER_BYTES: Final = 32 << 10  # request line and headers together
MAX_HEADERS: Final = 100
MAX_TARGET_BYTES: Final = 8 << 10
MAX_PIPELINED: Final = 32  # requests of one connection under way; beyond it the socket is not read
DRAIN_FACTOR: Final = 8  # a refused body is read and thrown away up to this many times the limit, then cut
BODIES_FACTOR: Final = 4  # all bodies in memory together, in units of the limit for one
LINGER_SECONDS: Final = 2.0  # after a refusal that closes, so that the client can still read the answer
RETRY_AFTER_SECONDS: Final = 1
TEXT: Final = "text/plain; charset=utf-8"
EXPOSITION: Final = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES: Final = ("ok", "client_error", "unavailable", "error")  # labels of edge_requests_total
HTML: Final = "text/html; charset=utf-8"
_BACKLOG: Final = 1024
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_PAGE_HEADERS: Final = (
    b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"connect-src 'self'\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
)


class Admin(Protocol):
    """What the control socket can ask of the agent. Answers are JSON objects."""

    async def status(self) -> dict[str, Any]: ...  # noqa: D102
    async def install(self, path: str) -> dict[str, Any]: ...  # noqa: D102
    async def rollback(self, model: str | None) -> dict[str, Any]: ...  # noqa: D102
    async def load(self, model: str) -> None: ...  # noqa: D102
    async def unload(self, model: str) -> None: ...  # noqa: D102


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; 500 for what the table does not know."""
    for kind in type(error).__mro__:
        if kind in STATUS_BY_ERROR:
            return STATUS_BY_ERROR[cast("type[Exception]", kind)]
    return 500


class _Closing(Exception):
    """Raised inside a parser callback: answer with ``status`` and close, the framing is lost."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request and, in time, its response. Lives in its connection's queue until it is written."""

    target: bytes = b""
    method: bytes = b""
    keep_alive: bool = True
    old: bool = False  # HTTP/1.0: keeping the connection must be said
    json_size: bytes | None = None
    encoding: bytes | None = None
    expect: bytes | None = None
    host: bool = False
    headers: int = 0
    header_bytes: int = 0
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    refusal: tuple[int, str] | None = None  # known before the body ended; the body is thrown away
    future: asyncio.Future[Answer] | None = None
    response: bytes | None = None

    def body(self) -> bytes:
        """The whole body."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)


_Handler = Callable[["_Exchange", "_Connection", "_Route"], None]


class _Route(NamedTuple):
    """What a path means: its methods, and the names in it."""

    methods: dict[bytes, _Handler]
    model: str | None = None
    version: str | None = None
    admin: bool = False


class HttpServer:
    """The listeners, the routes and the handlers. Lives on one event loop.

    ``unix_path`` adds a second listener on a Unix socket (mode 0600) with everything and the admin routes.
    After ``start``: ``port`` and ``url``.
    """

    def __init__(
        self,
        config: HttpConfig,
        service: Service,
        metrics: AgentMetrics,
        *,
        admin: Admin | None = None,
        unix_path: Path | None = None,
    ) -> None:
        self.config = config
        self.port = config.port
        self.url = ""
        self.stopping = False
        self.body_bytes = 0  # of unfinished requests, all connections together
        self.connections: set[_Connection] = set()
        self._service = service
        self._metrics = metrics
        self._admin = admin
        self._unix_path = unix_path
        self._listeners: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._count = {status: metrics.request("http", status) for status in OUTCOMES}
        self._ok = self._count["ok"]
        self._routes: dict[bytes, _Route] = {}

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            ConfigError: the port is taken or not allowed, the host is not ours, the socket path is unusable.
        """
        loop = asyncio.get_running_loop()
        self.stopping = False
        host = self.config.host
        try:
            listener = await loop.create_server(
                lambda: _Connection(self, admin=False), host, self.config.port, backlog=_BACKLOG
            )
        except OSError as error:
            raise ConfigError(self._why_not_bound(error)) from error
        self._listeners.append(listener)
        self.port = listener.sockets[0].getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        if self._unix_path is not None:
            try:
                unix = _bind_unix(self._unix_path)
                self._listeners.append(
                    await loop.create_unix_server(lambda: _Connection(self, admin=True), sock=unix)
                )
            except OSError as error:
                await self.stop(0)
                raise ConfigError(
                    f"control socket {self._unix_path}: {error.strerror or error}; choose another store"
                ) from error
        self._sweep()

    async def stop(self, drain_seconds: float) -> None:
        """Stop accepting, give requests under way ``drain_seconds``, close everything."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close_when_idle()
        if self.connections and drain_seconds > 0:
            self._idle.clear()
            try:
                async with asyncio.timeout(drain_seconds):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("http: %d connections cut after %g s", len(self.connections), drain_seconds)
        for connection in list(self.connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _why_not_bound(self, error: OSError) -> str:
        where = f"port {self.config.port} on {self.config.host}"
        # asyncio words its own message around the number; the number is what can be relied on.
        if error.errno == errno.EADDRINUSE:
            return f"{where} is taken: set http.port, or stop the other program"
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"{where} is not allowed for this user; set http.port above 1023"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            return f"http.host {self.config.host} is not an address of this machine; set http.host"
        return f"{where} cannot be listened on: {error.strerror or error}; set http.host and http.port"

    def count(self, status: int) -> None:
        """Count a request by its outcome: every inference, and whatever else is refused."""
        self._count[outcome(status)]()

    def left(self, connection: _Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if not self.connections:
            self._idle.set()

    def _sweep(self) -> None:
        """Cut connections whose time ran out: one timer for all, not one per request."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            if connection.deadline < now:
                connection.time_out()
        step = min(1.0, self.config.header_timeout_seconds / 4, self.config.idle_timeout_seconds / 4)
        self._sweeper = loop.call_later(step, self._sweep)

    # -- dispatch ------------------------------------------------------------------------------------------

    def dispatch(self, exchange: _Exchange, connection: _Connection) -> None:
        """A request is complete: route it. Never raises."""
        try:
            route = self._route(exchange.target)
        except (ValueError, httptools.HttpParserError):
            route = None
        try:
            if exchange.refusal is not None:
                self._refuse(exchange, connection, *exchange.refusal)
            elif route is None:
                self._refuse(exchange, connection, 404, f"no such path: {_quoted(exchange.target)}")
            elif route.admin and not connection.admin:
                self._refuse(
                    exchange,
                    connection,
                    403,
                    f"{_quoted(exchange.target)} is answered only on the control socket of the store",
                )
            else:
                method = b"GET" if exchange.method == b"HEAD" else exchange.method
                if method in route.methods:
                    route.methods[method](exchange, connection, route)
                else:
                    self._other_method(exchange, connection, route)
        except Exception as error:
            self._fail(exchange, connection, error)

    def _route(self, target: bytes) -> _Route | None:
        try:
            return self._routes[target]
        except KeyError:
            route = self._resolve(target)
            # Paths come from strangers: the cache is emptied rather than grown.
            if len(self._routes) >= 256:
                self._routes.clear()
            if route is not None:
                self._routes[target] = route
            return route

    def _resolve(self, target: bytes) -> _Route | None:
        path = target.partition(b"?")[0]
        if not path.startswith(b"/"):  # absolute form, as a proxy sends it
            path = httptools.parse_url(target).path or b"/" if b"://" in path else b"/"
        parts = [unquote(part) for part in path.decode("ascii").split("/")[1:]]
        version: str | None = None
        match parts:
            case [""]:
                return _Route({b"GET": self._page})
            case ["predict"]:
                return _Route({b"POST": self._predict})
            case ["metrics"]:
                return _Route({b"GET": self._exposition})
            case ["v2"] | ["v2", ""]:
                return _Route({b"GET": self._server_metadata})
            case ["v2", "health", "live"]:
                return _Route({b"GET": self._live})
            case ["v2", "health", "ready"]:
                return _Route({b"GET": self._ready})
            case ["v2", "repository", "index"]:
                return _Route({b"POST": self._index})
            case ["v2", "repository", "models", model, "load"]:
                return _Route({b"POST": self._load}, model, admin=True)
            case ["v2", "repository", "models", model, "unload"]:
                return _Route({b"POST": self._unload}, model, admin=True)
            case ["admin", "status"]:
                return _Route({b"GET": self._status}, admin=True)
            case ["admin", "install"]:
                return _Route({b"POST": self._install}, admin=True)
            case ["admin", "rollback"]:
                return _Route({b"POST": self._rollback}, admin=True)
            case ["v2", "models", model, "versions", named, *rest]:
                version = named
            case ["v2", "models", model, *rest]:
                pass
            case _:
                return None
        match rest:
            case []:
                return _Route({b"GET": self._model_metadata}, model, version)
            case ["ready"]:
                return _Route({b"GET": self._model_ready}, model, version)
            case ["infer"]:
                return _Route({b"POST": self._infer}, model, version)
        return None

    def _other_method(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        offered = [method.decode() for method in route.methods]
        allow = ", ".join([*offered, *(["HEAD"] if "GET" in offered else []), "OPTIONS"])
        header = f"Allow: {allow}\r\n".encode()
        if exchange.method == b"OPTIONS":
            connection.respond(exchange, 204, b"", extra=header)
            return
        message = f"method {_quoted(exchange.method)} is not answered here, use {allow}"
        self.count(405)
        connection.respond(exchange, 405, codec.encode_error(message), extra=header)

    def _refuse(self, exchange: _Exchange, connection: _Connection, status: int, message: str) -> None:
        self.count(status)
        extra = f"Retry-After: {RETRY_AFTER_SECONDS}\r\n".encode() if status == 503 else b""
        connection.respond(exchange, status, codec.encode_error(message), extra=extra)

    def _fail(self, exchange: _Exchange, connection: _Connection, error: BaseException) -> None:
        status = status_of(error)
        extra = b""
        if status in (429, 503):
            extra = f"Retry-After: {RETRY_AFTER_SECONDS}\r\n".encode()
        if isinstance(error, EdgeError | ContractError):
            message = str(error)
        else:
            log.error("http: %s failed", _quoted(exchange.target), exc_info=error)
            message = "internal error, the agent's log has more"
        self.count(status)
        connection.respond(exchange, status, codec.encode_error(message), extra=extra)

    # -- inference -----------------------------------------------------------------------------------------

    def _infer(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        request = codec.decode_infer(
            exchange.body(),
            _json_size(exchange.json_size),
            lambda: self._service.manifest(route.model, route.version),
        )
        future = self._service.submit(route.model, route.version, request.inputs, deadline=request.deadline)
        self._promise(exchange, connection, future, lambda answer: codec.encode_infer(answer, request))

    def _predict(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        request = codec.decode_predict(exchange.body(), self._service.manifest)
        future = self._service.submit(
            request.model, request.version, request.inputs, deadline=request.deadline
        )
        self._promise(exchange, connection, future, lambda answer: codec.encode_predict(answer, request))

    def _promise(
        self,
        exchange: _Exchange,
        connection: _Connection,
        future: asyncio.Future[Answer],
        encode: Callable[[Answer], codec.Body],
    ) -> None:
        exchange.parts = []  # the tensors hold what is still needed of it
        exchange.future = future
        if future.done():
            self._answered(exchange, connection, encode, future)
        else:
            future.add_done_callback(functools.partial(self._answered, exchange, connection, encode))

    def _answered(
        self,
        exchange: _Exchange,
        connection: _Connection,
        encode: Callable[[Answer], codec.Body],
        future: asyncio.Future[Answer],
    ) -> None:
        if future.cancelled():  # the client went away
            return
        try:
            body = encode(future.result())
        except Exception as error:
            self._fail(exchange, connection, error)
            return
        self._ok()
        if body.json_size is None:
            connection.respond(exchange, 200, body.data)
        else:
            connection.respond(
                exchange,
                200,
                body.data,
                codec.BINARY,
                f"Inference-Header-Content-Length: {body.json_size}\r\n".encode(),
            )

    # -- the rest of the Open Inference Protocol -----------------------------------------------------------

    def _live(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        connection.respond(exchange, 200, b'{"live":true}')

    def _ready(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        ready = self._service.ready() and not self.stopping
        connection.respond(exchange, 200 if ready else 503, codec.encode_json({"ready": ready}))

    def _server_metadata(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        body = codec.encode_json(codec.server_metadata(edge_agent.__version__))
        connection.respond(exchange, 200, body)

    def _model_metadata(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        manifest = self._service.manifest(route.model, route.version)
        connection.respond(exchange, 200, codec.encode_json(codec.model_metadata(manifest)))

    def _model_ready(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        try:
            self._service.manifest(route.model, route.version)
            ready = True
        except Unavailable:
            ready = False
        body = codec.encode_json({"name": route.model, "ready": ready})
        connection.respond(exchange, 200 if ready else 503, body)

    def _index(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        only_ready = bool(exchange.size) and _object(exchange.body()).get("ready") is True
        index = codec.repository_index(self._service.statuses(), only_ready=only_ready)
        connection.respond(exchange, 200, codec.encode_json(index))

    def _exposition(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        connection.respond(exchange, 200, self._metrics.exposition(), EXPOSITION)

    def _page(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        connection.respond(exchange, 200, PAGE, HTML, _PAGE_HEADERS)

    # -- admin: the Unix socket only -----------------------------------------------------------------------

    def _status(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        self._run(exchange, connection, self._offered().status())

    def _install(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        path = _object(exchange.body()).get("path")
        if not isinstance(path, str) or not path:
            raise InvalidInput("path: expected the path of a bundle")
        self._run(exchange, connection, self._offered().install(path))

    def _rollback(self, exchange: _Exchange, connection: _Connection, _: _Route) -> None:
        model = _object(exchange.body()).get("model") if exchange.size else None
        if model is not None and not isinstance(model, str):
            raise InvalidInput("model: expected a model's name or null")
        self._run(exchange, connection, self._offered().rollback(model))

    def _load(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        assert route.model is not None
        self._run(exchange, connection, self._offered().load(route.model))

    def _unload(self, exchange: _Exchange, connection: _Connection, route: _Route) -> None:
        assert route.model is not None
        self._run(exchange, connection, self._offered().unload(route.model))

    def _offered(self) -> Admin:
        if self._admin is None:
            raise Unavailable("this agent was started without a store to administer")
        return self._admin

    def _run(self, exchange: _Exchange, connection: _Connection, work: Awaitable[Any]) -> None:
        """Admin work takes seconds and files: the one place where a request is a task."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

        def done(finished: asyncio.Task[Any]) -> None:
            self._tasks.discard(finished)
            if finished.cancelled():
                connection.respond(exchange, 503, codec.encode_error("the agent is stopping"))
            elif (error := finished.exception()) is not None:
                self._fail(exchange, connection, error)
            else:
                connection.respond(exchange, 200, codec.encode_json(finished.result() or {}))

        task.add_done_callback(done)


class _Connection(asyncio.Protocol):
    """One client. The parser calls the ``on_`` methods; responses leave in the order of ``_queue``."""

    def __init__(self, server: HttpServer, *, admin: bool) -> None:
        self.admin = admin
        self.deadline = float("inf")
        self._server = server
        self._config = server.config
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[_Exchange] = deque()
        self._reading: _Exchange | None = None
        self._in_header = False
        self._deaf = False  # nothing more is parsed; what comes is thrown away
        self._closing = False  # closed once the queue is written
        self._lingering = False  # ... and then only our half, for a moment
        self._write_full = False
        self._paused = False

    # -- asyncio -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        server = self._server
        others = len(server.connections)
        server.connections.add(self)
        if others >= 2 * self._config.max_connections:  # not even the refusals may pile up
            self._deaf = True
            self._transport.abort()
        elif others >= self._config.max_connections:
            self._close_with(503, f"{others} connections are open, the limit; try again")
        elif server.stopping:
            self._close_with(503, "the agent is stopping")
        else:
            self._expect_within(self._config.idle_timeout_seconds)

    def connection_lost(self, _: Exception | None) -> None:
        self._deaf = True
        self._forget_reading()
        for exchange in self._queue:
            if exchange.future is not None:
                exchange.future.cancel()
        self._queue.clear()
        self._server.left(self)

    def eof_received(self) -> bool:
        # Half-closed: what was asked is still answered.
        if self._deaf or not self._queue:
            return False
        self._closing = self._deaf = True
        return True

    def pause_writing(self) -> None:
        self._write_full = True
        self._throttle()
        self._expect_within(self._config.header_timeout_seconds)  # to read its answers

    def resume_writing(self) -> None:
        self._write_full = False
        self._throttle()
        self._rest()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        before, in_header = self._reading, self._in_header
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No other protocol is spoken here: the request was answered as if it had not asked.
            self._deaf = self._closing = True
            self._write()
        except httptools.HttpParserError as error:
            refusal = error.__context__
            if isinstance(refusal, _Closing):
                self._close_with(refusal.status, str(refusal))
            else:
                self._close_with(400, f"not an HTTP request: {' '.join(str(error).split())[:200]}")
        else:
            if in_header and self._in_header and before is self._reading and before is not None:
                # The parser hands out whole fields only: this is one that does not end.
                before.header_bytes += len(data)
                if before.header_bytes > MAX_HEADER_BYTES:
                    self._close_with(431, f"header: more than {MAX_HEADER_BYTES} bytes")
            self._throttle()

    # -- the parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._reading = _Exchange()
        self._in_header = True
        self._expect_within(self._config.header_timeout_seconds)

    def on_url(self, target: bytes) -> None:
        exchange = self._request()
        exchange.target += target
        if len(exchange.target) > MAX_TARGET_BYTES:
            raise _Closing(414, f"path: more than {MAX_TARGET_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._request()
        exchange.headers += 1
        exchange.header_bytes += len(name) + len(value)
        if exchange.headers > MAX_HEADERS:
            raise _Closing(431, f"header: more than {MAX_HEADERS} fields")
        if exchange.header_bytes > MAX_HEADER_BYTES:
            raise _Closing(431, f"header: more than {MAX_HEADER_BYTES} bytes")
        # Few names matter, and their lengths tell most of the others apart.
        match len(name):
            case 4:
                if name.lower() == b"host":
                    exchange.host = True
            case 6:
                if name.lower() == b"expect":
                    exchange.expect = value.lower()
            case 14:
                if name.lower() == b"content-length" and int(value) > self._config.max_body_bytes:
                    self._too_large(exchange)
            case 16:
                if name.lower() == b"content-encoding":
                    exchange.encoding = value.lower()
            case 31:
                if name.lower() == b"inference-header-content-length":
                    exchange.json_size = value

    def on_headers_complete(self) -> None:
        exchange = self._request()
        self._in_header = False
        exchange.method = self._parser.get_method()
        exchange.keep_alive = self._parser.should_keep_alive()
        version = self._parser.get_http_version()
        exchange.old = version == "1.0"
        if version not in ("1.0", "1.1"):
            raise _Closing(505, f"HTTP/{version} is not spoken here, use HTTP/1.1")
        if not exchange.host and not exchange.old:
            raise _Closing(400, "header: Host is absent")
        if exchange.encoding not in (None, b"identity"):
            exchange.refusal = (415, f"Content-Encoding {_quoted(exchange.encoding)}: send the body as it is")
        if exchange.expect is not None:
            if exchange.expect != b"100-continue":
                raise _Closing(417, f"Expect {_quoted(exchange.expect)}: only 100-continue is known")
            if exchange.refusal is not None:  # the client waits for leave to send: it never gets it
                raise _Closing(*exchange.refusal)
            # In its place in the queue: answers to earlier requests go before it.
            self._queue.append(_Exchange(response=_CONTINUE))
            self._write()

    def on_body(self, data: bytes) -> None:
        exchange = self._request()
        exchange.size += len(data)
        if exchange.refusal is None:
            if exchange.size > self._config.max_body_bytes:
                self._too_large(exchange)
            elif self._server.body_bytes + len(data) > BODIES_FACTOR * self._config.max_body_bytes:
                self._drop_body(exchange)
                exchange.refusal = (503, "body: too many large bodies at once, try again")
            else:
                self._server.body_bytes += len(data)
                exchange.parts.append(data)
        elif exchange.size > DRAIN_FACTOR * self._config.max_body_bytes:
            raise _Closing(*exchange.refusal)

    def on_message_complete(self) -> None:
        exchange = self._request()
        self._reading = None
        self._queue.append(exchange)
        self._server.body_bytes -= sum(map(len, exchange.parts))
        if self._server.stopping:
            exchange.keep_alive = False
        if not exchange.keep_alive:
            self._deaf = True
        self._server.dispatch(exchange, self)
        self._rest()

    def _request(self) -> _Exchange:
        if self._reading is None:  # llhttp calls in order; this only tells the type checker
            self._reading = _Exchange()
        return self._reading

    def _too_large(self, exchange: _Exchange) -> None:
        self._drop_body(exchange)
        exchange.refusal = (413, f"body: more than {self._config.max_body_bytes} bytes")

    def _drop_body(self, exchange: _Exchange) -> None:
        self._server.body_bytes -= sum(map(len, exchange.parts))
        exchange.parts = []

    def _forget_reading(self) -> None:
        if self._reading is not None:
            self._drop_body(self._reading)
            self._reading = None

    # -- answering -----------------------------------------------------------------------------------------

    def respond(
        self,
        exchange: _Exchange,
        status: int,
        body: bytes,
        content_type: str = codec.JSON,
        extra: bytes = b"",
    ) -> None:
        """Give an exchange its response; it is written when its turn comes."""
        if not exchange.keep_alive:
            extra += b"Connection: close\r\n"
        elif exchange.old:
            extra += b"Connection: keep-alive\r\n"
        head = _head(status, content_type)
        if status == 204:
            exchange.response = b"%b%b\r\n" % (head, extra)
        elif exchange.method == b"HEAD":
            exchange.response = b"%bContent-Length: %d\r\n%b\r\n" % (head, len(body), extra)
        else:
            exchange.response = b"%bContent-Length: %d\r\n%b\r\n%b" % (head, len(body), extra, body)
        self._write()

    def _write(self) -> None:
        """Write what is ready at the head of the queue; close if that was the last."""
        queue = self._queue
        while queue and queue[0].response is not None:
            exchange = queue.popleft()
            self._transport.write(cast("bytes", exchange.response))
            if not exchange.keep_alive:
                self._closing = True
                queue.clear()
        if self._closing and not queue:
            self._close()
        else:
            self._throttle()
            self._rest()

    def _close(self) -> None:
        """Close after the last response has left.

        Closing at once would reset the connection under a refusal while the client still sends: then only our
        half is closed, and what comes is thrown away for a moment.
        """
        if self._transport.is_closing():
            return
        if self._lingering and self._transport.can_write_eof():
            self._transport.write_eof()
            self._expect_within(LINGER_SECONDS)
        else:
            self._transport.close()
            self._expect_within(self._config.header_timeout_seconds)  # to read what is left

    def _close_with(self, status: int, message: str) -> None:
        """Answer what cannot be read on from, after everything before it, and close."""
        self._server.count(status)
        self._deaf = self._lingering = True
        self._forget_reading()
        refusal = _Exchange(keep_alive=False)
        self._queue.append(refusal)
        self.respond(refusal, status, codec.encode_error(message))

    def _throttle(self) -> None:
        """Read no further while the client does not read its answers, or has asked too much at once."""
        full = self._write_full or len(self._queue) > MAX_PIPELINED
        if full != self._paused and not self._transport.is_closing():
            self._paused = full
            if full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _expect_within(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds

    def _rest(self) -> None:
        """Nothing is expected of a client that waits for us; an idle one may stay for a while."""
        if self._reading is None and not self._closing and not self._write_full:
            if self._queue:
                self.deadline = float("inf")
            else:
                self._expect_within(self._config.idle_timeout_seconds)

    def time_out(self) -> None:
        """The client was too slow, or idle for too long."""
        if self._reading is None or self._write_full or self._closing:
            self._transport.abort()
        else:
            self._close_with(408, f"request: not complete after {self._config.header_timeout_seconds:g} s")

    def close_when_idle(self) -> None:
        """The server stops: answer what is under way, then close."""
        if self._queue:
            self._queue[-1].keep_alive = False
            if self._reading is None:
                self._deaf = True
        elif self._reading is None and not self._lingering:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()


def outcome(status: int) -> str:
    """The label of ``edge_requests_total`` for an HTTP-like status."""
    if status < 400:
        return "ok"
    if status in (429, 503, 504):
        return "unavailable"
    return "client_error" if status < 500 else "error"


@functools.cache
def _head(status: int, content_type: str) -> bytes:
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return (line if status == 204 else f"{line}Content-Type: {content_type}\r\n").encode()


def _quoted(data: bytes) -> str:
    """Bytes of a stranger, fit for an error message."""
    return repr(data[:80].decode("ascii", "backslashreplace"))


def _json_size(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12:
        raise InvalidInput(
            f"Inference-Header-Content-Length: expected a number of bytes, got {_quoted(value)}"
        )
    return int(value)


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"body: expected a JSON object: {error}") from None


def _bind_unix(path: Path) -> socket.socket:
    """A listening-to-be socket file that only its owner can connect to.

    The store's lock says that nobody else serves this path: a socket found there is left over from a crash.
    """
    if path.is_socket():
        path.unlink()
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # sockaddr_un holds 107 bytes; a path through an open folder is short, however deep the store lies.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        unix.bind(f"/proc/self/fd/{folder}/{path.name}")
        path.chmod(0o600)  # before it listens: nobody can have connected in between
    except OSError:
        unix.close()
        raise
    finally:
        os.close(folder)
    return unix

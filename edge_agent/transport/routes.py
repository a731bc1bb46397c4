"""What a path means: every HTTP route and its handler, over the service.

Invariants:

- an inference request costs no task: it is submitted here and answered when the service calls back;
- a caller's mistake gets a 4xx with one ``{"error": ...}`` sentence and is not logged; only a bug of ours is;
- admin routes are answered on the control socket only;
- on a guarded port everything wants a token or certificate but ``OPEN``: what says nothing about this device.

``openapi.py`` describes the same routes; a test holds the two together.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote

import httptools
import msgspec

import edge_agent
from edge_agent.contract.errors import ContractError
from edge_agent.errors import EdgeError, InvalidInput, Unavailable
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport import codec, statistics
from edge_agent.transport.openapi import openapi_document
from edge_agent.transport.page import DOCS_PAGE, PAGE
from edge_agent.transport.status import OUTCOMES, outcome, status_of

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS: Final = 1
EXPOSITION: Final = "text/plain; version=0.0.4; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"
_PAGE_HEADERS: Final = (
    b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"connect-src 'self'; frame-ancestors 'none'\r\nX-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"
)


class Admin(Protocol):
    """What the control socket can ask of the agent. Answers are JSON objects."""

    async def status(self) -> dict[str, Any]: ...  # noqa: D102
    async def install(self, path: str) -> dict[str, Any]: ...  # noqa: D102
    async def rollback(self, model: str | None) -> dict[str, Any]: ...  # noqa: D102
    async def hold(self, until: str | None, reason: str, *, release: bool) -> dict[str, Any]: ...  # noqa: D102
    async def load(self, model: str) -> None: ...  # noqa: D102
    async def unload(self, model: str) -> None: ...  # noqa: D102


class Connection(Protocol):
    """What a handler may know of a connection."""

    admin: bool  # it came over the control socket

    def respond(  # noqa: D102
        self, exchange: Exchange, status: int, body: bytes, content_type: str = ..., extra: bytes = ...
    ) -> None: ...


class Refusal(NamedTuple):
    """Why a request is not looked at."""

    status: int
    message: str
    retry_after: float = RETRY_AFTER_SECONDS  # seconds; for 429 and 503


class Exchange(msgspec.Struct, eq=False):
    """One request and, in time, its response. Lives in its connection's queue until it is written."""

    connection: Connection
    target: bytes = b""
    method: bytes = b""
    keep_alive: bool = True
    old: bool = False  # HTTP/1.0: keeping the connection must be said
    json_size: bytes | None = None
    content_type: bytes | None = None
    encoding: bytes | None = None
    expect: bytes | None = None
    host: bool = False
    headers: int = 0
    header_bytes: int = 0
    parts: list[bytes] = []  # of its own: msgspec copies it
    size: int = 0
    authorization: bytes | None = None
    route: Route | None = None
    refusal: Refusal | None = None  # known before the body ended; the body is thrown away
    gone: bool = False  # the client is: nobody waits for the answer
    response: bytes | None = None

    def body(self) -> bytes:
        """The whole body."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def reply(self, status: int, body: bytes, content_type: str = codec.JSON, extra: bytes = b"") -> None:
        """Give it its response; it is written when its turn comes."""
        self.connection.respond(self, status, body, content_type, extra)


Handler = Callable[["Exchange", "Route"], None]


class Route(NamedTuple):
    """What a path means: its methods, and the names in it."""

    methods: dict[bytes, Handler]
    model: str | None = None
    version: str | None = None
    admin: bool = False  # on the control socket only
    open: bool = False  # to whoever knocks, also on a guarded port
    free: bool = False  # not counted against a client's rate: probes ask this


class Routes:
    """The routes and their handlers. Lives on one event loop."""

    def __init__(self, service: Service, metrics: AgentMetrics, admin: Admin | None) -> None:
        self.stopping = False
        self._service = service
        self._metrics = metrics
        self._admin = admin
        self._tasks: set[asyncio.Task[Any]] = set()
        self._count = {status: metrics.request("http", status) for status in OUTCOMES}
        self._ok = self._count["ok"]
        self._routes: dict[bytes, Route] = {}

    def count(self, status: int) -> None:
        """Count a request by its outcome: every inference, and whatever else is refused."""
        self._count[outcome(status)]()

    async def cancel(self) -> None:
        """Give up admin work under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def dispatch(self, exchange: Exchange) -> None:
        """A request is complete: answer it. Never raises."""
        route = exchange.route
        try:
            if exchange.refusal is not None:
                self._refuse(exchange, exchange.refusal)
            elif route is None:
                self._refuse(
                    exchange,
                    Refusal(404, f"no such path: {quoted(exchange.target)}; /docs has those there are"),
                )
            elif route.admin and not exchange.connection.admin:
                message = f"{quoted(exchange.target)} is answered only on the control socket of the store"
                self._refuse(exchange, Refusal(403, message))
            else:
                method = b"GET" if exchange.method == b"HEAD" else exchange.method
                if method in route.methods:
                    route.methods[method](exchange, route)
                else:
                    self._other_method(exchange, route)
        except Exception as error:
            self._fail(exchange, error)

    def find(self, target: bytes) -> Route | None:
        """The route of a request target; None if there is no such path."""
        try:
            return self._routes[target]
        except KeyError:
            pass
        try:
            route = self._resolve(target)
        except (ValueError, httptools.HttpParserError):
            return None
        # Paths come from strangers: the cache is emptied rather than grown.
        if len(self._routes) >= 256:
            self._routes.clear()
        if route is not None:
            self._routes[target] = route
        return route

    def _resolve(self, target: bytes) -> Route | None:
        path = target.partition(b"?")[0]
        if not path.startswith(b"/"):  # absolute form, as a proxy sends it
            path = httptools.parse_url(target).path or b"/" if b"://" in path else b"/"
        parts = [unquote(part) for part in path.decode("ascii").split("/")[1:]]
        version: str | None = None
        match parts:
            case [""]:
                return Route({b"GET": self._page}, open=True)
            case ["docs"]:
                return Route({b"GET": self._docs}, open=True)
            case ["openapi.json"]:
                return Route({b"GET": self._openapi}, open=True)
            case ["status"]:
                return Route({b"GET": self._public_status})
            case ["predict"]:
                return Route({b"POST": self._predict})
            case ["metrics"]:
                return Route({b"GET": self._exposition})
            case ["v2"] | ["v2", ""]:
                return Route({b"GET": self._server_metadata})
            case ["v2", "health", "live"]:
                return Route({b"GET": self._live}, open=True, free=True)
            case ["v2", "health", "ready"]:
                return Route({b"GET": self._ready}, open=True, free=True)
            case ["v2", "repository", "index"]:
                return Route({b"POST": self._index})
            case ["v2", "repository", "models", model, "load"]:
                return Route({b"POST": self._load}, model, admin=True)
            case ["v2", "repository", "models", model, "unload"]:
                return Route({b"POST": self._unload}, model, admin=True)
            case ["admin", "status"]:
                return Route({b"GET": self._status}, admin=True)
            case ["admin", "install"]:
                return Route({b"POST": self._install}, admin=True)
            case ["admin", "rollback"]:
                return Route({b"POST": self._rollback}, admin=True)
            case ["admin", "hold"]:
                return Route({b"POST": self._hold}, admin=True)
            case ["v2", "models", "stats"]:
                return Route({b"GET": self._statistics})
            case ["v2", "models", model, "versions", named, *rest]:
                version = named
            case ["v2", "models", model, *rest]:
                pass
            case _:
                return None
        match rest:
            case []:
                return Route({b"GET": self._model_metadata}, model, version)
            case ["ready"]:
                return Route({b"GET": self._model_ready}, model, version)
            case ["infer"]:
                return Route({b"POST": self._infer}, model, version)
            case ["stats"]:
                return Route({b"GET": self._statistics}, model, version)
        return None

    def _other_method(self, exchange: Exchange, route: Route) -> None:
        offered = [method.decode() for method in route.methods]
        allow = ", ".join([*offered, *(["HEAD"] if "GET" in offered else []), "OPTIONS"])
        header = f"Allow: {allow}\r\n".encode()
        if exchange.method == b"OPTIONS":
            exchange.reply(204, b"", extra=header)
            return
        message = f"method {quoted(exchange.method)} is not answered here, use {allow}"
        self.count(405)
        exchange.reply(405, codec.encode_error(message), extra=header)

    def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        self.count(refusal.status)
        extra = b""
        if refusal.status in (429, 503):
            extra = b"Retry-After: %d\r\n" % max(1, math.ceil(refusal.retry_after))
        elif refusal.status == 401:
            extra = b'WWW-Authenticate: Bearer realm="edge-agent"\r\n'
        exchange.reply(refusal.status, codec.encode_error(refusal.message), extra=extra)

    def _fail(self, exchange: Exchange, error: BaseException) -> None:
        if isinstance(error, EdgeError | ContractError):
            message = str(error)
        else:
            log.error("http: %s failed", quoted(exchange.target), exc_info=error)
            message = "internal error, the agent's log has more"
        self._refuse(exchange, Refusal(status_of(error), message))

    # -- inference -----------------------------------------------------------------------------------------

    def _infer(self, exchange: Exchange, route: Route) -> None:
        manifest = functools.partial(self._service.manifest, route.model, route.version)
        try:
            request = codec.decode_infer(exchange.body(), _json_size(exchange), manifest)
        except InvalidInput:
            manifest()  # whoever asks an unknown model is told so, not what else is wrong
            raise
        self._ask(exchange, route.model, route.version, request, codec.encode_infer)

    def _predict(self, exchange: Exchange, _: Route) -> None:
        request = codec.decode_predict(exchange.body(), self._service.manifest)
        self._ask(exchange, request.model, request.version, request, codec.encode_predict)

    def _ask(
        self,
        exchange: Exchange,
        model: str | None,
        version: str | None,
        request: codec.InferRequest | codec.PredictRequest,
        encode: Callable[[Answer, Any], codec.Body],
    ) -> None:
        exchange.parts = []  # the tensors hold what is still needed of it
        self._service.ask(
            model,
            version,
            request.inputs,
            functools.partial(self._answered, exchange, encode, request),
            deadline=request.deadline,
            source=request.source,
            key=request.id or "",
        )

    def _answered(
        self,
        exchange: Exchange,
        encode: Callable[[Answer, Any], codec.Body],
        request: codec.InferRequest | codec.PredictRequest,
        answer: Answer | Exception,
    ) -> None:
        if exchange.gone:
            return
        try:
            if isinstance(answer, Exception):
                raise answer
            body = encode(answer, request)
        except Exception as error:
            self._fail(exchange, error)
            return
        self._ok()
        if body.json_size is None:
            exchange.reply(200, body.data)
        else:
            exchange.reply(
                200,
                body.data,
                codec.BINARY,
                f"Inference-Header-Content-Length: {body.json_size}\r\n".encode(),
            )

    # -- the rest of the Open Inference Protocol -----------------------------------------------------------

    def _live(self, exchange: Exchange, _: Route) -> None:
        exchange.reply(200, b'{"live":true}')

    def _ready(self, exchange: Exchange, _: Route) -> None:
        ready = self._service.ready() and not self.stopping
        exchange.reply(200 if ready else 503, codec.encode_json({"ready": ready}))

    def _server_metadata(self, exchange: Exchange, _: Route) -> None:
        body = codec.encode_json(codec.server_metadata(edge_agent.__version__))
        exchange.reply(200, body)

    def _model_metadata(self, exchange: Exchange, route: Route) -> None:
        manifest = self._service.manifest(route.model, route.version)
        exchange.reply(200, codec.encode_json(codec.model_metadata(manifest)))

    def _model_ready(self, exchange: Exchange, route: Route) -> None:
        try:
            self._service.manifest(route.model, route.version)
            ready = True
        except Unavailable:
            ready = False
        body = codec.encode_json({"name": route.model, "ready": ready})
        exchange.reply(200 if ready else 503, body)

    def _index(self, exchange: Exchange, _: Route) -> None:
        only_ready = _object(exchange.body()).get("ready", False) if exchange.size else False
        if not isinstance(only_ready, bool):
            raise InvalidInput(f"ready: expected true or false, got {str(only_ready)[:80]}")
        index = codec.repository_index(self._service.statuses(), only_ready=only_ready)
        exchange.reply(200, codec.encode_json(index))

    def _statistics(self, exchange: Exchange, route: Route) -> None:
        report = statistics.of_models(self._service, self._metrics, route.model, route.version)
        exchange.reply(200, codec.encode_json(report))

    def _exposition(self, exchange: Exchange, _: Route) -> None:
        self._run(
            exchange,
            self._metrics.exposition_in_turns(),
            lambda text: exchange.reply(200, text, EXPOSITION),
        )

    def _page(self, exchange: Exchange, _: Route) -> None:
        exchange.reply(200, PAGE, HTML, _PAGE_HEADERS)

    def _docs(self, exchange: Exchange, _: Route) -> None:
        exchange.reply(200, DOCS_PAGE, HTML, _PAGE_HEADERS)

    def _openapi(self, exchange: Exchange, _: Route) -> None:
        exchange.reply(200, openapi_document(edge_agent.__version__))

    def _public_status(self, exchange: Exchange, _: Route) -> None:
        """What the page shows: the status without what only an operator needs to know."""

        async def report() -> dict[str, Any]:
            status = await self._offered().status()
            return {key: value for key, value in status.items() if key != "store"}

        self._run(exchange, report())

    # -- admin: the Unix socket only -----------------------------------------------------------------------

    def _status(self, exchange: Exchange, _: Route) -> None:
        self._run(exchange, self._offered().status())

    def _install(self, exchange: Exchange, _: Route) -> None:
        path = _object(exchange.body()).get("path")
        if not isinstance(path, str) or not path:
            raise InvalidInput("path: expected the path of a bundle")
        self._run(exchange, self._offered().install(path))

    def _rollback(self, exchange: Exchange, _: Route) -> None:
        model = _object(exchange.body()).get("model") if exchange.size else None
        if model is not None and not isinstance(model, str):
            raise InvalidInput("model: expected a model's name or null")
        self._run(exchange, self._offered().rollback(model))

    def _hold(self, exchange: Exchange, _: Route) -> None:
        asked = _object(exchange.body()) if exchange.size else {}
        until, reason, release = asked.get("until"), asked.get("reason", ""), asked.get("release", False)
        if until is not None and not isinstance(until, str):
            raise InvalidInput("until: expected an ISO 8601 time or null")
        if not isinstance(reason, str) or not isinstance(release, bool):
            raise InvalidInput("reason, release: expected a text and true or false")
        self._run(exchange, self._offered().hold(until, reason, release=release))

    def _load(self, exchange: Exchange, route: Route) -> None:
        assert route.model is not None
        self._run(exchange, self._offered().load(route.model))

    def _unload(self, exchange: Exchange, route: Route) -> None:
        assert route.model is not None
        self._run(exchange, self._offered().unload(route.model))

    def _offered(self) -> Admin:
        if self._admin is None:
            raise Unavailable("this agent was started without a store to administer")
        return self._admin

    def _run(
        self, exchange: Exchange, work: Awaitable[Any], then: Callable[[Any], None] | None = None
    ) -> None:
        """What takes long, or gives way to others: the one place where a request is a task.

        ``then`` answers with the result; None: it is sent as JSON.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

        def done(finished: asyncio.Task[Any]) -> None:
            self._tasks.discard(finished)
            if finished.cancelled():
                exchange.reply(503, codec.encode_error("the agent is stopping"))
            elif (error := finished.exception()) is not None:
                self._fail(exchange, error)
            elif then is not None:
                then(finished.result())
            else:
                exchange.reply(200, codec.encode_json(finished.result() or {}))

        task.add_done_callback(done)


def quoted(data: bytes) -> str:
    """Bytes of a stranger, fit for an error message."""
    return repr(data[:80].decode("ascii", "backslashreplace"))


def _json_size(exchange: Exchange) -> int | None:
    value = exchange.json_size
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12:
        raise InvalidInput(
            f"Inference-Header-Content-Length: expected a number of bytes, got {quoted(value)}"
        )
    size = int(value)
    if size == 0 and exchange.content_type is not None and b"json" in exchange.content_type.lower():
        raise InvalidInput(
            "Inference-Header-Content-Length: 0 announces one raw tensor, Content-Type announces JSON; send "
            f"{codec.BINARY}, or leave the header out"
        )
    return size


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"body: expected a JSON object: {error}") from None

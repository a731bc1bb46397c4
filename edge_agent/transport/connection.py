"""One HTTP/1.1 connection, parsed by httptools and answered in the order of its requests.

Invariants:

- an inference request costs no task: it is parsed, submitted, and answered when the service calls back;
  so everything readable in one turn of the loop reaches the service in that turn, and goes through the model
  together;
- answers leave a connection in the order of its requests, however they were pipelined;
- a caller's mistake gets a 4xx with one ``{"error": ...}`` sentence, and the connection stays usable; only
  what breaks the framing itself (a garbage request line, an oversized header) is answered and closed;
- a head that was parsed once is known by its bytes: the next request that begins with the same ones, and is
  there as a whole, skips the parser and means the same;
- every resource is bounded: header, body, bodies in memory together, pipelined requests, connections, time.

Who listens is ``http.py``; ``Shared`` is what it has in common with its connections.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import deque
from http import HTTPStatus
from typing import Final, NamedTuple, cast

import httptools

from edge_agent.config import HttpConfig
from edge_agent.transport import codec
from edge_agent.transport.doors import CERTIFICATE, Doors, Rates
from edge_agent.transport.routes import Exchange, Refusal, Route, Routes, quoted

MAX_HEADER_BYTES: Final = 32 << 10  # request line and headers together
MAX_HEADERS: Final = 100
MAX_TARGET_BYTES: Final = 8 << 10
MAX_PIPELINED: Final = 32  # requests of one connection under way; beyond it the socket is not read
DRAIN_FACTOR: Final = 8  # a refused body is read and thrown away up to this many times the limit, then cut
BODIES_FACTOR: Final = 4  # all bodies in memory together, in units of the limit for one
LINGER_SECONDS: Final = 2.0  # after a refusal that closes, so that the client can still read the answer
MAX_KNOWN_HEADS: Final = 256  # of all connections together, each of at most ...
MAX_KNOWN_HEAD_BYTES: Final = 1 << 10
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Closing(Exception):
    """Raised inside a parser callback: answer with ``status`` and close, the framing is lost."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Head(NamedTuple):
    """What the bytes of a request line and its headers mean, as the parser has read them."""

    target: bytes
    method: bytes
    json_size: bytes | None
    content_type: bytes | None
    route: Route | None
    body_bytes: int


class Shared:
    """What the connections of one server have in common. Lives on one event loop.

    Attributes:
        config: the limits that a connection begins with.
        routes: who answers.
        doors: who may ask.
        rates: how often; None: as often as they like.
        body_bytes: of unfinished requests, all connections together.
        connections: those that are open.
        heads: those that were parsed before, by their bytes.
    """

    def __init__(self, config: HttpConfig, routes: Routes) -> None:
        self.config = config
        self.routes = routes
        self.doors = Doors.shut()
        self.rates: Rates | None = None
        self.body_bytes = 0
        self.connections: set[HttpConnection] = set()
        self.heads: dict[bytes, _Head] = {}
        self._idle = asyncio.Event()

    @property
    def stopping(self) -> bool:
        """Whether nothing new is accepted any more."""
        return self.routes.stopping

    def left(self, connection: HttpConnection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if not self.connections:
            self._idle.set()


class HttpConnection(asyncio.Protocol):
    """One client. The parser calls the ``on_`` methods; responses leave in the order of ``_queue``."""

    def __init__(self, server: Shared, *, admin: bool) -> None:
        self.admin = admin
        self.deadline = float("inf")
        self._server = server
        self._config = server.config
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()
        self._reading: Exchange | None = None
        self._last: Exchange | None = None  # the last complete one of what is being parsed
        self._in_header = False
        self._deaf = False  # nothing more is parsed; what comes is thrown away
        self._closing = False  # closed once the queue is written
        self._lingering = False  # ... and then only our half, for a moment
        self._write_full = False
        self._paused = False
        self._tls = False
        self._certified = False
        self._client = ""

    # -- asyncio -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find a place for it, or none."""
        self._transport = cast("asyncio.Transport", transport)
        server = self._server
        if not self.admin:
            self._recognise()
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

    def _recognise(self) -> None:
        """Note where it comes from, and whether it showed a certificate; the handshake has verified it."""
        tls = self._transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        self._tls = tls is not None
        self._certified = certificate is not None
        if certificate is not None:
            self._client = hashlib.sha256(certificate).hexdigest()
        else:
            peer = self._transport.get_extra_info("peername")
            self._client = str(peer[0]) if peer else ""

    def connection_lost(self, _: Exception | None) -> None:
        """Nobody is there to be answered any more."""
        self._deaf = True
        self._forget_reading()
        for exchange in self._queue:
            exchange.gone = True
        self._queue.clear()
        self._server.left(self)

    def eof_received(self) -> bool:
        """The client has said everything."""
        # Half-closed: what was asked is still answered.
        if self._deaf or not self._queue:
            return False
        self._closing = self._deaf = True
        return not self._tls  # TLS knows no half: the close is ours to make, after the answers

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        self._write_full = True
        self._throttle()
        self._expect_within(self._config.header_timeout_seconds)  # to read its answers

    def resume_writing(self) -> None:
        """It does again."""
        self._write_full = False
        self._throttle()
        self._rest()

    def data_received(self, data: bytes) -> None:
        """Take up a request whose head is known, or let the parser see the bytes."""
        if self._deaf:
            return
        before, in_header = self._reading, self._in_header
        end = 0  # of the head, where a request begins with these bytes
        if before is None:
            end = data.find(b"\r\n\r\n", 0, MAX_KNOWN_HEAD_BYTES) + 4
            head = self._server.heads.get(data[:end])
            if head is not None and len(data) == end + head.body_bytes and self._take_up(head, data[end:]):
                return
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
            elif end > 3 and self._reading is None:
                self._learn(data[:end], len(data) - end)
            self._last = None
            self._throttle()

    def _learn(self, data: bytes, body_bytes: int) -> None:
        """Remember what the head of the last request means, if that was all that came.

        Its body was as long as what followed the head, so it was not chunked, and the same head is followed
        by as many bytes again. A head with a token is forgotten: secrets do not lie around.
        """
        exchange = self._last
        if (
            exchange is None
            or exchange.size != body_bytes
            or exchange.authorization is not None
            or exchange.expect is not None
            or exchange.old
            or not exchange.keep_alive
            or exchange.refusal is not None
        ):
            return
        heads = self._server.heads
        # Heads come from strangers: the cache is emptied rather than grown.
        if len(heads) >= MAX_KNOWN_HEADS:
            heads.clear()
        heads[data] = _Head(
            exchange.target,
            exchange.method,
            exchange.json_size,
            exchange.content_type,
            exchange.route,
            body_bytes,
        )

    def _take_up(self, head: _Head, body: bytes) -> bool:
        """A whole request whose head is known; False if the parser should see it all the same."""
        server = self._server
        if head.body_bytes > self._config.max_body_bytes or server.stopping:
            return False
        exchange = Exchange(
            self,
            head.target,
            head.method,
            json_size=head.json_size,
            content_type=head.content_type,
            route=head.route,
            parts=[body],
            size=head.body_bytes,
        )
        if not self.admin and (server.doors.guarded or server.rates is not None):
            self._let_in(exchange)
        self._queue.append(exchange)
        server.routes.dispatch(exchange)
        self._throttle()
        self._rest()
        return True

    # -- the parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reading = Exchange(self)
        self._in_header = True
        self._expect_within(self._config.header_timeout_seconds)

    def on_url(self, target: bytes) -> None:
        """A part of its target."""
        exchange = self._request()
        exchange.target += target
        if len(exchange.target) > MAX_TARGET_BYTES:
            raise _Closing(414, f"path: more than {MAX_TARGET_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole field."""
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
            case 12:
                if name.lower() == b"content-type":
                    exchange.content_type = value
            case 13:
                if name.lower() == b"authorization":
                    exchange.authorization = value
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
        """Everything but the body is known: who may not ask is refused here."""
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
            exchange.refusal = Refusal(
                415, f"Content-Encoding {quoted(exchange.encoding)}: send the body as it is"
            )
        exchange.route = self._server.routes.find(exchange.target)
        if not self.admin and (self._server.doors.guarded or self._server.rates is not None):
            self._let_in(exchange)
        if exchange.expect is not None:
            if exchange.expect != b"100-continue":
                raise _Closing(417, f"Expect {quoted(exchange.expect)}: only 100-continue is known")
            if exchange.refusal is not None:  # the client waits for leave to send: it never gets it
                raise _Closing(*exchange.refusal[:2])
            # In its place in the queue: answers to earlier requests go before it.
            self._queue.append(Exchange(self, response=_CONTINUE))
            self._write()

    def on_body(self, data: bytes) -> None:
        """A part of its body."""
        exchange = self._request()
        exchange.size += len(data)
        if exchange.refusal is None:
            if exchange.size > self._config.max_body_bytes:
                self._too_large(exchange)
            elif self._server.body_bytes + len(data) > BODIES_FACTOR * self._config.max_body_bytes:
                self._drop_body(exchange)
                exchange.refusal = Refusal(503, "body: too many large bodies at once, try again")
            else:
                self._server.body_bytes += len(data)
                exchange.parts.append(data)
        elif exchange.size > DRAIN_FACTOR * self._config.max_body_bytes:
            raise _Closing(*exchange.refusal[:2])

    def on_message_complete(self) -> None:
        """The whole request is there."""
        exchange = self._request()
        self._reading, self._last = None, exchange
        self._queue.append(exchange)
        self._server.body_bytes -= sum(map(len, exchange.parts))
        if self._server.stopping:
            exchange.keep_alive = False
        if not exchange.keep_alive:
            self._deaf = True
        self._server.routes.dispatch(exchange)
        self._rest()

    def _let_in(self, exchange: Exchange) -> None:
        """Refuse who may not ask, or asks too often, before a byte of the body is kept."""
        server, route = self._server, exchange.route
        client = self._client
        if server.doors.guarded and not (route is not None and route.open):
            who = server.doors.identify(exchange.authorization, certified=self._certified)
            if who is None:
                exchange.refusal = Refusal(401, server.doors.what_is_wanted(exchange.authorization))
            elif who != CERTIFICATE:
                client = who
        if server.rates is not None and not (route is not None and route.free):
            wait = server.rates.wait(client)
            if wait > 0:
                limit = server.config.requests_per_second
                exchange.refusal = Refusal(
                    429, f"more than {limit:g} requests per second from this client, try again later", wait
                )
        if exchange.refusal is not None:
            self._drop_body(exchange)

    def _request(self) -> Exchange:
        if self._reading is None:  # llhttp calls in order; this only tells the type checker
            self._reading = Exchange(self)
        return self._reading

    def _too_large(self, exchange: Exchange) -> None:
        self._drop_body(exchange)
        exchange.refusal = Refusal(413, f"body: more than {self._config.max_body_bytes} bytes")

    def _drop_body(self, exchange: Exchange) -> None:
        self._server.body_bytes -= sum(map(len, exchange.parts))
        exchange.parts = []

    def _forget_reading(self) -> None:
        if self._reading is not None:
            self._drop_body(self._reading)
            self._reading = None

    # -- answering -----------------------------------------------------------------------------------------

    def respond(
        self,
        exchange: Exchange,
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
        if len(queue) == 1 and not self._closing and not self._paused:  # nearly always
            exchange = queue[0]
            if exchange.response is None:
                return
            if exchange.keep_alive:
                queue.clear()
                self._transport.write(exchange.response)
                if not self._write_full:
                    self._rest()
                    return
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
        self._server.routes.count(status)
        self._deaf = self._lingering = True
        self._forget_reading()
        refusal = Exchange(self, keep_alive=False)
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


@functools.cache
def _head(status: int, content_type: str) -> bytes:
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return (line if status == 204 else f"{line}Content-Type: {content_type}\r\n").encode()

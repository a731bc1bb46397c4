"""One connection to an MQTT broker: a client of QoS 0 and 1 as an asyncio protocol.

Invariants:

- a message is handed over, and a confirmation acted on, in the turn of the loop that read it, by a plain
  call: no task, no future, no queue in between;
- memory is bounded whatever the broker does: one packet (``mqtt_wire.py``), no more messages on their way
  than the broker takes at once, and no reading on while the broker does not read;
- what is on its way when the connection ends is told so, once;
- a broker that is silent, refuses, or breaks the protocol ends the connection, at once where it says so.

Why not a library: docs/adr/0032-own-mqtt-client.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from edge_agent.transport import mqtt_wire as wire
from edge_agent.transport.mqtt_wire import Malformed, Message, Packet, Will

log = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 10.0  # for a connection, and for an answer to a subscription
CLOSE_SECONDS: Final = 1.0  # to send what is written at a clean end
_IDENTIFIERS: Final = 65535  # of packets
_WINDOW: Final = _IDENTIFIERS - 16  # messages on their way; the rest is for subscriptions

Then = Callable[[Exception | None], None]
"""Called once: the broker has the message (None), or it is lost. Must not raise."""


class BrokerError(ConnectionError):
    """The broker refused, broke the protocol, or is gone."""


class Unanswered(BrokerError):
    """There is a connection, and the broker did not say whether it takes it."""


class TooLarge(ValueError):
    """More bytes than this broker takes in one packet."""


@dataclass(frozen=True, slots=True)
class Login:
    """Whom to connect to, and as whom."""

    host: str
    port: int
    v5: bool
    identifier: str
    will: Will
    username: str | None
    password: str | None
    tls: ssl.SSLContext | None
    keepalive: int  # seconds
    clean: bool  # begin a new session
    session_expiry: int  # seconds; MQTT 5
    receive_maximum: int  # messages of QoS 1 before the first is acknowledged
    max_payload: int  # bytes


async def connect(
    login: Login,
    receive: Callable[[Connection, Message], None],
    opened: Callable[[Connection, bool], None],
) -> Connection:
    """A connection that the broker has accepted.

    Args:
        login: whom to connect to, and as whom.
        receive: what is called with each message. Must not raise.
        opened: what is called first, before any message, with whether the broker has kept the session.

    Raises:
        BrokerError: the broker refused, or said nothing (``Unanswered``).
        OSError: there is no connection, or no trust in it.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(login, receive, opened)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await loop.create_connection(
                lambda: connection,
                login.host,
                login.port,
                ssl=login.tls,
                server_hostname=login.host if login.tls is not None else None,
            )
            await connection.accepted()
    except TimeoutError:
        await connection.close()
        silent = Unanswered if connection.reached else BrokerError
        raise silent(f"no answer in {PATIENCE_SECONDS:g} s") from None
    except BaseException:
        await connection.close()
        raise
    return connection


class Connection(asyncio.Protocol):
    """See ``connect``. ``window`` is how many messages of QoS 1 may be on their way."""

    def __init__(
        self,
        login: Login,
        receive: Callable[[Connection, Message], None],
        opened: Callable[[Connection, bool], None],
    ) -> None:
        self.congested = False  # the broker does not read
        self._loop = asyncio.get_running_loop()
        self._login = login
        self._v5 = login.v5
        self._receive = receive
        self._opened = opened
        self._parser = wire.Parser(login.max_payload + (64 << 10))  # and its properties
        self._transport: asyncio.Transport | None = None
        self._accepted = self._loop.create_future()
        self._open = False
        self._over = asyncio.Event()
        self._reason: Exception | None = None
        self._window = min(login.receive_maximum, _WINDOW)
        self._their_most = wire.LONGEST
        self._qos = 1
        self._retain = True
        self._on_its_way: dict[int, Then] = {}
        self._waiting: deque[tuple[str, bytes, bool, bytes, Then]] = deque()
        self._subscriptions: dict[int, asyncio.Future[bytes]] = {}
        self._last_id = 0
        self._heard = True
        self._pulse: asyncio.TimerHandle | None = None
        self._complained = False

    @property
    def reached(self) -> bool:
        """Whether there ever was somebody at the other end."""
        return self._transport is not None

    # -- for those who use it ------------------------------------------------------------------------------

    async def accepted(self) -> None:
        """Wait for the broker's answer to the connection.

        Raises:
            BrokerError: it refused.
        """
        await self._accepted

    async def lost(self) -> None:
        """Wait for the end of the connection, and raise why.

        Raises:
            OSError: always.
        """
        await self._over.wait()
        raise self._reason or BrokerError("the connection ended")

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe at QoS 1; what the broker refuses is logged.

        Raises:
            BrokerError: no answer.
        """
        self._insist()
        packet_id = self._next_id()
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._subscriptions[packet_id] = answer
        self._write(wire.subscribe(packet_id, topics, self._v5))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                codes = await answer
        except TimeoutError:
            raise BrokerError(f"no answer to a subscription in {PATIENCE_SECONDS:g} s") from None
        finally:
            self._subscriptions.pop(packet_id, None)
        for topic, code in zip(topics, codes, strict=False):
            if code >= 0x80:
                log.warning(
                    "mqtt: the broker refuses the subscription to %s: %s", topic, wire.reason_of(code)
                )

    def publish(
        self,
        topic: str,
        payload: bytes,
        then: Then,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: bytes = b"",
    ) -> None:
        """Send a message, or queue it until the broker takes more; ``properties`` are left out in 3.1.1.

        Raises:
            BrokerError: there is no connection any more.
            TooLarge: the broker takes no packet of this size.
            ValueError: the topic is too long.
        """
        self._insist()
        size = len(topic.encode()) + len(payload) + len(properties) + 16  # headers, at their longest
        if size > self._their_most:
            raise TooLarge(f"{size} bytes, the broker takes {self._their_most}")
        retain = retain and self._retain
        if not qos or not self._qos:
            self._send(topic, payload, 0, retain, properties)
            then(None)
        elif self._waiting or len(self._on_its_way) >= self._window:
            self._waiting.append((topic, payload, retain, properties, then))
        else:
            packet_id = self._next_id()
            self._send(topic, payload, packet_id, retain, properties)
            self._on_its_way[packet_id] = then

    async def published(
        self, topic: str, payload: bytes, *, retain: bool = False, properties: bytes = b""
    ) -> None:
        """Send a message at QoS 1 and wait until the broker has it.

        Raises:
            BrokerError, TooLarge, ValueError: as ``publish``.
        """
        done: asyncio.Future[None] = self._loop.create_future()

        def then(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self.publish(topic, payload, then, retain=retain, properties=properties)
        await done

    def acknowledge(self, packet_id: int) -> None:
        """Tell the broker that a message of QoS 1 is taken; nothing for one of QoS 0."""
        if packet_id and self._reason is None:
            self._write(wire.puback(packet_id))

    async def disconnect(self) -> None:
        """End the connection in good order: the broker forgets the will."""
        if self._reason is None and self._transport is not None:
            self._write(wire.DISCONNECT_PACKET)
            self._reason = BrokerError("the connection was ended here")
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._over.wait()
        await self.close()

    async def close(self) -> None:
        """End the connection at once, without a word. Harmless when repeated."""
        self._fail(BrokerError("the connection was ended here"))
        if self._transport is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._over.wait()
        if not self._over.is_set():  # uvloop tells nobody of a connection that is given up while it is made
            self.connection_lost(None)

    # -- asyncio.Protocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce ourselves."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not one by descent
        if self._reason is not None:  # it was given up meanwhile
            self._transport.abort()
            return
        login = self._login
        properties = wire.number_property(wire.RECEIVE_MAXIMUM, self._window)
        # No Maximum Packet Size: the broker would drop what is longer, and nobody would tell who asked.
        if not login.clean:
            properties += wire.number_property(wire.SESSION_EXPIRY, login.session_expiry)
        self._write(
            wire.connect(
                login.identifier,
                self._v5,
                keepalive=login.keepalive,
                clean=login.clean,
                username=login.username,
                password=login.password,
                will=login.will,
                properties=properties,
            )
        )

    def data_received(self, data: bytes) -> None:
        """Act on whole packets."""
        self._heard = True
        if self._reason is not None:
            return
        try:
            for packet in self._parser.feed(data):
                self._take(packet)
                if self._reason is not None:
                    return
        except Malformed as error:
            self._fail(BrokerError(f"the broker does not keep to the protocol: {error}"))

    def pause_writing(self) -> None:
        """The broker does not read: nor do we, or answers would pile up here."""
        self.congested = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        self.congested = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._pulse is not None:
            self._pulse.cancel()
        hung_up = BrokerError if self._open else Unanswered
        reason = self._reason = self._reason or exc or hung_up("the broker closed the connection")
        if not self._accepted.done():
            self._accepted.set_exception(reason)
            self._accepted.exception()  # whoever waited may have gone
        for answer in self._subscriptions.values():
            if not answer.done():
                answer.set_exception(reason)
        pending = [*self._on_its_way.values(), *(waiting[-1] for waiting in self._waiting)]
        self._on_its_way.clear()
        self._waiting.clear()
        for then in pending:
            then(reason)
        self._over.set()

    # -- packets -------------------------------------------------------------------------------------------

    def _take(self, packet: Packet) -> None:
        kind = packet.first & 0xF0
        if not self._open:
            if kind != wire.CONNACK:
                raise Malformed(f"packet type {kind >> 4} before the connection is accepted")
            self._introduced(wire.read_connack(packet.body, self._v5))
        elif kind == wire.PUBLISH:
            self._receive(self, wire.read_message(packet, self._v5))
        elif kind == wire.PUBACK:
            self._confirmed(*wire.read_puback(packet.body))
        elif kind == wire.PINGRESP:
            pass
        elif kind == wire.SUBACK:
            packet_id, codes = wire.read_suback(packet.body, self._v5)
            answer = self._subscriptions.get(packet_id)
            if answer is not None and not answer.done():
                answer.set_result(codes)
        elif kind == wire.DISCONNECT and self._v5:
            self._fail(BrokerError(f"the broker ended the connection: {wire.read_disconnect(packet.body)}"))
        else:
            raise Malformed(f"packet type {kind >> 4}, which no broker sends here")

    def _introduced(self, answer: wire.Connack) -> None:
        if answer.code:
            said = answer.properties.get(wire.REASON_STRING)
            more = f" ({said.decode(errors='replace')})" if isinstance(said, bytes) else ""
            self._fail(BrokerError(f"the broker refuses: {wire.reason_of(answer.code)}{more}"))
            return
        self._open = True

        def told(identifier: int, otherwise: int) -> int:
            value = answer.properties.get(identifier, otherwise)
            assert isinstance(value, int)
            return value

        self._window = max(1, min(self._window, told(wire.RECEIVE_MAXIMUM, _WINDOW)))
        self._their_most = told(wire.MAXIMUM_PACKET_SIZE, 0) or wire.LONGEST
        self._qos = told(wire.MAXIMUM_QOS, 1)
        self._retain = bool(told(wire.RETAIN_AVAILABLE, 1))
        keepalive = told(wire.SERVER_KEEP_ALIVE, 0) or self._login.keepalive
        self._pulse = self._loop.call_later(keepalive / 2, self._beat, keepalive / 2)
        self._opened(self, answer.session_present)
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _confirmed(self, packet_id: int, code: int) -> None:
        then = self._on_its_way.pop(packet_id, None)
        if then is None:
            return  # of a connection before this one
        if code >= 0x80 and not self._complained:
            self._complained = True  # not for each
            log.warning("mqtt: the broker does not pass a message on: %s", wire.reason_of(code))
        then(None)
        while self._waiting and len(self._on_its_way) < self._window and self._reason is None:
            topic, payload, retain, properties, then = self._waiting.popleft()
            packet_id = self._next_id()
            self._send(topic, payload, packet_id, retain, properties)
            self._on_its_way[packet_id] = then

    def _beat(self, interval: float) -> None:
        """Every half of the keep-alive: a broker that did not say anything since the last one is gone."""
        if not self._heard:
            self._fail(BrokerError(f"nothing came from the broker for {interval:g} s"))
            return
        self._heard = False
        self._write(wire.PINGREQ_PACKET)
        self._pulse = self._loop.call_later(interval, self._beat, interval)

    def _send(self, topic: str, payload: bytes, packet_id: int, retain: bool, properties: bytes) -> None:
        self._write(
            wire.publish(
                topic,
                payload,
                packet_id=packet_id,
                retain=retain,
                properties=properties if self._v5 else None,
            )
        )

    def _next_id(self) -> int:
        while True:
            self._last_id = self._last_id % _IDENTIFIERS + 1
            if self._last_id not in self._on_its_way and self._last_id not in self._subscriptions:
                return self._last_id

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def _insist(self) -> None:
        if self._reason is not None:
            raise BrokerError(str(self._reason))

    def _fail(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()
        elif not self._accepted.done():
            self._accepted.cancel()

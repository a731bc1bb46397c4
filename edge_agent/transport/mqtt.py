"""Inference over MQTT: the same bodies as over HTTP, as MQTT 5 request/response.

Invariants:

- the agent publishes to its own topics and, for MQTT 5 requests, to response topics inside the allowed
  prefixes without wildcards: nobody can make it write anywhere else, least of all where an agent reads;
- every request gets an answer or an error with a status, and once: a request that is delivered again (QoS 1)
  is known by its Correlation Data until it expires; requests being answered are bounded;
- every input of a stream gets a decision, in order, through any loss of broker or agent (``stream.py``);
- the retained status is ``online`` while a connection lives, and ``offline`` by the broker's hand if it dies;
- a broker that is away or refuses is tried again for ever, with backoff and full jitter.

Topics, all below ``{prefix}/{device}/``::

    v2/models/{model}[/versions/{v}]/infer    request: Open Inference Protocol body
    v2/models/{model}/response                its answer where the request names no response topic
    v2/models/{model}[/versions/{v}]/input    telemetry, one way: either body; the decision goes to .../output
    predict, predict/response                 the same for the decision API
    status                                    retained: online, offline
    models                                    retained: the repository index, as JSON
    events                                    what changed: a model, its state, drift, fallback, holds
    hold                                      with ``mqtt.holds``: hold updates until a time, or release them

MQTT 5 (https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html section 4.10): the answer goes to the
request's Response Topic with its Correlation Data; Message Expiry is the deadline; user properties ``status``
(an HTTP status), ``source``, ``reason`` and ``model_version``. Clients of 3.1.1 recognise their answer by the
``id`` in the body. Decisions of a stream carry a user property ``sequence`` that counts up without a gap,
also over restarts.

The session outlives the connection: what is published while the device is away waits at the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import re
import ssl
import time
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_agent.config import MqttConfig
from edge_agent.errors import ConfigError, EdgeError, InvalidInput, Overloaded, Unavailable
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport import broker, codec
from edge_agent.transport import mqtt_wire as wire
from edge_agent.transport.broker import BrokerError, Connection, TooLarge, Unanswered
from edge_agent.transport.mqtt_wire import Message, Will
from edge_agent.transport.outbox import Decision, Outbox
from edge_agent.transport.status import OUTCOMES, outcome, status_of
from edge_agent.transport.stream import Input, Stream, names_of

log = logging.getLogger(__name__)

ONLINE: Final = b"online"
OFFLINE: Final = b"offline"
HEADER_LENGTH: Final = b"inference-header-content-length"  # user property, as the HTTP header
FIRST_BACKOFF_SECONDS: Final = 0.5
STEADY_SECONDS: Final = 10.0  # a connection that lived so long was one: the backoff begins anew
MODELS_INTERVAL_SECONDS: Final = 1.0  # how soon a change of the model list is published
GOODBYE_SECONDS: Final = 2.0  # to say offline at a clean end
REMEMBER_SECONDS: Final = 60.0  # how long a request without expiry is known; a broker redelivers sooner
REMEMBER_REQUESTS: Final = 4096
CALM_SECONDS: Final = 10.0  # without a fallback before its end is announced
_MAX_TOPIC: Final = 1024  # bytes; the protocol allows 65,535, no topic of ours is near
_NOT_IN_A_TOPIC: Final = re.compile(r"[+#\0]")
_READ_BY_AGENTS: Final = ("/infer", "/input", "/predict", "/status", "/models", "/events", "/hold")
_MAX_HOLDING: Final = 8  # messages about holds at a time; one is done in milliseconds
_KEPT_PROPERTIES: Final = 256  # encoded properties of answers; there are as many as kinds of answers

_Key = tuple[str, str, bytes, int]
_Encode = Callable[[Answer], codec.Body]
Hold = Callable[[bytes], Awaitable[dict[str, Any]]]
"""Does what a message about holds says, and returns the hold in force; raises EdgeError where it cannot."""


@dataclass(slots=True, eq=False)
class _Reply:
    """Where and how a request wants its answer; ``key`` tells it from every other."""

    connection: Connection
    topic: str
    correlation: bytes | None
    key: _Key | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was last said about a model."""

    version: str | None
    state: str
    drifting: bool | None
    fallback_rows: int
    falling_back: bool
    calm_since: float  # time.monotonic()


@dataclass(slots=True, eq=False)
class _Response:
    """What goes back."""

    body: codec.Body
    status: int
    answer: Answer | None = None


class MqttTransport:
    """One connection to one broker, made again whenever it is lost. ``connected`` is set while it lives.

    ``spool`` is the folder where decisions of streams wait; without it there are no streams, and the broker
    keeps no session. ``hold`` is told what comes on the topic of holds, where ``mqtt.holds`` is on.

    Raises:
        ConfigError: the password file or a file of ``mqtt.tls`` cannot be read.
    """

    def __init__(
        self,
        config: MqttConfig,
        device: str,
        service: Service,
        metrics: AgentMetrics,
        *,
        spool: Path | None = None,
        hold: Hold | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.connected = asyncio.Event()
        self._config = config
        self._device = device
        self._root = f"{config.prefix}/{device}"
        self._service = service
        self._count = {status: metrics.request("mqtt", status) for status in OUTCOMES}
        self._rng = rng or random.Random()
        self._v5 = config.protocol == "5"
        self._reply_prefixes = config.reply_prefixes or (f"{config.prefix}/",)
        self._connection: Connection | None = None
        self._spool = spool
        self._stream: Stream | None = None
        self._hold = hold if config.holds else None
        self._holding: set[asyncio.Task[None]] = set()  # messages about holds that are being done
        self._requests: OrderedDict[_Key, float] = OrderedDict()  # until when they are known
        self._said: dict[str, _Seen] = {}
        self._under_way = 0  # requests taken up whose answer the broker does not have yet
        self._idle: asyncio.Event | None = None  # somebody waits until there are none
        self._password()
        self._tls()

    async def run(self) -> None:
        """Serve until cancelled, through every loss of the broker; without a spool, requests only."""
        async with contextlib.AsyncExitStack() as stack:
            opening = asyncio.ensure_future(asyncio.to_thread(self._open_outbox))
            stack.push_async_callback(_closed, opening)
            outbox = await asyncio.shield(opening)  # ended meanwhile, what it opened is still closed
            if outbox is not None:
                self._stream = Stream(outbox, self._service, self._root, self._config.max_pending)
                keep = asyncio.create_task(self._stream.keep(), name="mqtt decisions")
                stack.push_async_callback(_ended, keep)
            await self._connect_for_ever()

    def _open_outbox(self) -> Outbox | None:
        if self._spool is None:
            return None
        try:
            return Outbox(self._spool, self._config.max_queue_bytes, 2 * self._config.max_pending)
        except OSError as error:
            log.error("mqtt: no streams until the next start, %s: %s", self._spool, error.strerror or error)
            return None

    async def _connect_for_ever(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        complained = False
        while True:
            began = time.monotonic()
            try:
                await self._session()
            except ConfigError as error:  # files may be renewed under us
                log.warning("mqtt: %s", error)
            except OSError as error:
                if time.monotonic() - began > STEADY_SECONDS and self.connected.is_set():
                    backoff, complained = FIRST_BACKOFF_SECONDS, False
                if not complained:
                    complained = True
                    log.warning("mqtt: %s:%d: %s", self._config.host, self._config.port, self._why(error))
            except Exception:  # whatever it is, it must not take the HTTP side along
                log.exception("mqtt: the connection failed unexpectedly")
            finally:
                self.connected.clear()
                self._connection = None
            await asyncio.sleep(self._rng.uniform(0, backoff))
            backoff = min(backoff * 2, self._config.reconnect_max_seconds)

    def _why(self, error: OSError) -> str:
        text = str(error) if isinstance(error, BrokerError) else error.strerror or str(error)
        if "protocol version" in text:
            return f"{text}: this broker does not speak the version asked; set mqtt.protocol to '3.1.1'"
        if isinstance(error, Unanswered) and self._v5:  # some that do not speak MQTT 5 do not say so
            return f"{text}; trying again; if it speaks 3.1.1 only, set mqtt.protocol to '3.1.1'"
        return f"{text}; trying again"

    async def _session(self) -> None:
        """One connection, from connect to its loss."""
        password = await asyncio.to_thread(self._password)
        tls = await asyncio.to_thread(self._tls)
        connection = await broker.connect(self._login(password, tls), self._receive, self._opened)
        try:
            await connection.subscribe(self._subscriptions())
            await connection.published(f"{self._root}/status", ONLINE, retain=True)
            self.connected.set()
            log.info("mqtt: connected to %s:%d", self._config.host, self._config.port)
            tasks = [asyncio.create_task(self._announce(connection), name="mqtt models")]
            if self._stream is not None:
                tasks.append(asyncio.create_task(self._deliver(connection, self._stream), name="mqtt stream"))
            try:
                await connection.lost()
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):  # a time-out is one
                    async with asyncio.timeout(GOODBYE_SECONDS):
                        await self._say_goodbye(connection, tasks[1:])
                raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await connection.close()

    async def _say_goodbye(self, connection: Connection, deliveries: list[asyncio.Task[None]]) -> None:
        if self._stream is not None:
            self._stream.leave()
            await asyncio.wait(deliveries)
        if self._under_way:  # what was accepted is still answered
            self._idle = asyncio.Event()
            await self._idle.wait()
        await connection.published(f"{self._root}/status", OFFLINE, retain=True)
        await connection.disconnect()

    def _subscriptions(self) -> list[str]:
        kinds = ("infer",) if self._stream is None else ("infer", "input")
        models = [f"v2/models/{some}/{kind}" for kind in kinds for some in ("+", "+/versions/+")]
        holds = () if self._hold is None else ("hold",)
        return [f"{self._root}/{topic}" for topic in ("predict", *holds, *models)]

    def _login(self, password: str | None, tls: ssl.SSLContext | None) -> broker.Login:
        config = self._config
        return broker.Login(
            host=config.host,
            port=config.port,
            v5=self._v5,
            identifier=f"{config.prefix}-{self._device}",
            will=Will(f"{self._root}/status", OFFLINE),
            username=config.username,
            password=password,
            tls=tls,
            keepalive=min(config.keepalive_seconds, 65535),
            clean=self._spool is None,
            session_expiry=min(config.session_expiry_seconds, (1 << 32) - 1),
            receive_maximum=config.max_pending,  # the broker keeps back what we cannot take
            max_payload=config.max_payload_bytes,
        )

    def _opened(self, connection: Connection, session_kept: bool) -> None:
        """The broker accepted: what it kept for us comes in this very turn."""
        self._connection = connection
        if self._stream is not None and not session_kept:
            self._stream.forget_inputs()

    def _tls(self) -> ssl.SSLContext | None:
        """Read anew at every connection, so that renewed certificates are taken up.

        Raises:
            ConfigError: a file is missing or is not what it should be.
        """
        tls = self._config.tls
        if tls is None:
            return None
        try:
            context = ssl.create_default_context(cafile=tls.ca or None)
            if tls.certificate:
                context.load_cert_chain(tls.certificate, tls.key or None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(path for path in (tls.ca, tls.certificate, tls.key) if path)
            raise ConfigError(f"mqtt.tls {files}: {error.strerror or error}; correct the files") from error
        return context

    def _password(self) -> str | None:
        path = self._config.password_file
        if path is None:
            return None
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"mqtt.password_file {path}: {error.strerror}; correct the path") from error

    async def _announce(self, connection: Connection) -> None:
        """Keep the retained model list true, and say what changed, also while the broker was away."""
        said = b""
        while True:
            for event in self._events():
                await connection.published(f"{self._root}/events", codec.encode_json(event))
            now = codec.encode_json(codec.repository_index(self._service.statuses()))
            if now != said:
                await connection.published(f"{self._root}/models", now, retain=True)
                said = now
            await asyncio.sleep(MODELS_INTERVAL_SECONDS)

    def _events(self) -> list[dict[str, Any]]:
        """What is different from what was last said."""
        events: list[dict[str, Any]] = []
        now = time.monotonic()
        for status in self._service.statuses():
            name, before = status.name, self._said.get(status.name)
            rows = self._service.served(name).fallback_rows
            fell = status.state != "ready" or (before is not None and rows > before.fallback_rows)
            calm = now if fell or before is None else before.calm_since
            falling = fell or (before is not None and before.falling_back and now - calm < CALM_SECONDS)
            self._said[name] = _Seen(status.version, status.state, status.drifting, rows, falling, calm)
            if before is None:
                continue
            about = {"model": name, "version": status.version, "time": round(time.time(), 3)}
            if status.version != before.version:
                events.append({"event": "update", **about, "previous": before.version})
            if status.state != before.state:
                events.append({"event": "state", **about, "state": status.state, "reason": status.reason})
            if status.drifting is not None and status.drifting != before.drifting:
                events.append({"event": "drift", **about, "drifting": status.drifting})
            if falling != before.falling_back:
                events.append({"event": "fallback", **about, "active": falling})
        return events

    async def _deliver(self, connection: Connection, stream: Stream) -> None:
        """Publish the decisions that wait; ends with the connection, or when the disk refuses."""

        async def publish(decision: Decision, sequence: int) -> None:
            try:
                properties = _decision_properties(decision, sequence)
                await connection.published(decision.topic, decision.body, properties=properties)
            except TooLarge as error:  # its place in the order is kept
                refused = _refused_decision(decision, error)
                properties = _decision_properties(refused, sequence)
                await connection.published(refused.topic, refused.body, properties=properties)

        while True:
            try:
                await stream.deliver(publish)
            except BrokerError:
                return  # the connection is gone: the next one goes on from here
            except OSError as error:
                log.error("mqtt: decisions that wait cannot be read: %s", error)
                await asyncio.sleep(MODELS_INTERVAL_SECONDS)
            else:
                return

    # -- one request ---------------------------------------------------------------------------------------

    def _receive(self, connection: Connection, message: Message) -> None:
        """Take up, accept or refuse a message at once; whoever answers it calls ``_answered``."""
        topic = message.topic.removeprefix(f"{self._root}/")
        if not _is_ours(topic):  # the broker should not have sent it
            connection.acknowledge(message.packet_id)
            return
        if self._stream is not None and topic.endswith("/input"):
            self._take_up(connection, topic, message, self._stream)
            return
        connection.acknowledge(message.packet_id)
        if message.retain:
            log.warning("mqtt: a retained request on %s is not answered at every connect; clear it", topic)
            return
        if topic == "hold":
            self._heed(connection, message)
            return
        reply = _Reply(connection, f"{self._root}/{_fixed_response(topic)}", message.correlation)
        busy = self._under_way
        self._under_way += 1
        try:
            self._direct(reply, message)
            if reply.correlation is not None:
                reply.key = (topic, reply.topic, reply.correlation, zlib.crc32(message.payload))
            if self._is_known(topic, message, reply):
                reply.key = None  # it belongs to the one that is known
                self._settled(reply, None)
                return
            if busy >= self._config.max_pending:
                raise Overloaded(f"{busy} requests are being answered, the limit; try again")
            self._ask(topic, message, reply)
        except Exception as error:
            if isinstance(error, Overloaded | Unavailable):
                self._forget(reply)  # asked again, it is tried again
            self._respond(reply, _refused(error))

    def _heed(self, connection: Connection, message: Message) -> None:
        """Do what a message about holds says, one after the other, and say on ``events`` what came of it."""
        if self._hold is None or len(self._holding) >= _MAX_HOLDING:
            return
        task = asyncio.create_task(self._heeded(connection, self._hold, message), name="mqtt hold")
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)

    async def _heeded(self, connection: Connection, hold: Hold, message: Message) -> None:
        event: dict[str, Any] = {"event": "hold", "time": round(time.time(), 3)}
        try:
            if (problem := message.problem or self._too_long(message)) is not None:
                raise InvalidInput(problem)
            event |= await hold(message.payload)
        except EdgeError as error:
            log.warning("mqtt: a message on %s was not understood: %s", message.topic, error)
            event["error"] = str(error)
        with contextlib.suppress(OSError):  # the connection is gone: what was said is in force all the same
            await connection.published(f"{self._root}/events", codec.encode_json(event))

    def _take_up(self, connection: Connection, topic: str, message: Message, stream: Stream) -> None:
        """An input of a stream: acknowledged when its decision is safe."""
        packet_id = message.packet_id

        def accepted() -> None:
            if self._connection is connection:  # else the broker delivers it again, and is told then
                connection.acknowledge(packet_id)

        if message.retain:
            log.warning("mqtt: a retained input on %s is not decided at every connect; clear it", topic)
            accepted()
            return
        size = None
        problem = message.problem or self._too_long(message)
        try:
            size = _header_length(message)
        except InvalidInput as error:
            problem = problem or str(error)
        stream.accept(
            Input(
                topic,
                message.payload,
                (packet_id or -1, zlib.crc32(message.payload, zlib.crc32(topic.encode()))),
                message.again and packet_id > 0,
                size,
                message.correlation,
                problem,
            ),
            accepted,
        )

    def _is_known(self, topic: str, message: Message, reply: _Reply) -> bool:
        """Whether a request is being answered, or was, under the same key; notes it otherwise."""
        if reply.key is None:
            return False
        now = time.monotonic()
        if self._requests.get(reply.key, 0.0) > now:
            log.info("mqtt: a request on %s came again, it is answered once", topic)
            return True
        self._requests.pop(reply.key, None)
        self._requests[reply.key] = now + (REMEMBER_SECONDS if message.expiry is None else message.expiry)
        while self._requests:
            if len(self._requests) <= REMEMBER_REQUESTS and next(iter(self._requests.values())) > now:
                break
            self._requests.popitem(last=False)
        return False

    def _ask(self, topic: str, message: Message, reply: _Reply) -> None:
        body = message.payload
        problem = message.problem or self._too_long(message)
        if problem is not None:
            raise InvalidInput(problem)
        if not body:
            raise InvalidInput("payload: empty, expected a request")
        encode: _Encode
        request: codec.InferRequest | codec.PredictRequest
        if topic == "predict":
            request = predict = codec.decode_predict(body, self._service.manifest)
            model, version = predict.model, predict.version
            encode = functools.partial(_encode_predict, predict)
        else:
            model, version = names_of(topic)
            request = infer = codec.decode_infer(
                body, _header_length(message), lambda: self._service.manifest(model, version)
            )
            encode = functools.partial(_encode_infer, infer)
        then = functools.partial(self._answered, reply, encode)
        self._service.ask(
            model,
            version,
            request.inputs,
            then,
            deadline=_soonest(request.deadline, message.expiry),
            source=request.source,
            key=request.id or "",
        )

    def _too_long(self, message: Message) -> str | None:
        if message.length <= self._config.max_payload_bytes:
            return None
        return f"payload: {message.length} bytes, the limit is {self._config.max_payload_bytes}"

    def _answered(self, reply: _Reply, encode: _Encode, answer: Answer | Exception) -> None:
        try:
            if isinstance(answer, Exception):
                raise answer
            response = _Response(encode(answer), 200, answer)
        except Exception as error:
            response = _refused(error)
        self._respond(reply, response)

    def _respond(self, reply: _Reply, response: _Response) -> None:
        """Send what there is to say. Never raises."""
        self._count[outcome(response.status)]()
        connection = reply.connection
        # Refused for being too many: a refusal must not wait for its acknowledgement as well, nor pile up.
        refused_for_load = response.status == 429
        if refused_for_load and connection.congested:
            self._settled(reply, None)
            return
        settled = functools.partial(self._settled, reply)
        try:
            properties = _response_properties(reply, response) if self._v5 else b""
            connection.publish(
                reply.topic, response.body.data, settled, qos=not refused_for_load, properties=properties
            )
        except TooLarge as error:
            if response.status == 413:
                self._settled(reply, error)
            else:
                self._respond(reply, _Response(codec.Body(codec.encode_error(f"the answer: {error}")), 413))
        except (OSError, ValueError) as error:
            self._settled(reply, error)

    def _settled(self, reply: _Reply, error: Exception | None) -> None:
        """The broker has the answer, or nobody will."""
        self._under_way -= 1
        if error is not None:  # delivered again, the request is answered again
            self._forget(reply)
            log.info("mqtt: an answer on %s was lost: %s", reply.topic, error)
        if self._idle is not None and not self._under_way:
            self._idle.set()

    def _forget(self, reply: _Reply) -> None:
        if reply.key is not None:
            self._requests.pop(reply.key, None)

    def _direct(self, reply: _Reply, message: Message) -> None:
        """Where the answer goes.

        Raises:
            InvalidInput: the response topic is not one that this agent may write to.
        """
        topic = message.response_topic
        if topic is None:
            return
        if not topic or _NOT_IN_A_TOPIC.search(topic) is not None or len(topic.encode()) > _MAX_TOPIC:
            raise InvalidInput(f"response topic {topic[:80]!r}: expected a topic name without wildcards")
        if not topic.startswith(self._reply_prefixes):
            allowed = ", ".join(self._reply_prefixes)
            raise InvalidInput(f"response topic {topic[:80]!r}: expected one below {allowed}")
        # Whatever device it belongs to: an answer must never be read as a request, or as a state.
        if topic.endswith(_READ_BY_AGENTS):
            raise InvalidInput(f"response topic {topic[:80]!r}: that is a topic of an agent, choose another")
        reply.topic = topic


async def _closed(opening: asyncio.Future[Outbox | None]) -> None:
    outbox = await opening
    if outbox is not None:
        await asyncio.to_thread(outbox.close)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _is_ours(topic: str) -> bool:
    """Whether a topic below the device's root is one that was subscribed to."""
    if topic in ("predict", "hold"):
        return True
    if _NOT_IN_A_TOPIC.search(topic) is not None:
        return False
    match topic.split("/"):
        case ["v2", "models", _, "infer" | "input"] | ["v2", "models", _, "versions", _, "infer" | "input"]:
            return True
    return False


def _encode_predict(request: codec.PredictRequest, answer: Answer) -> codec.Body:
    return codec.encode_predict(answer, request)


def _encode_infer(request: codec.InferRequest, answer: Answer) -> codec.Body:
    return codec.encode_infer(answer, request)


def _refused(error: Exception) -> _Response:
    status = status_of(error)
    if isinstance(error, EdgeError):
        return _Response(codec.Body(codec.encode_error(error)), status)
    log.error("mqtt: a request failed", exc_info=error)
    return _Response(codec.Body(codec.encode_error("internal error, the agent's log has more")), 500)


def _fixed_response(topic: str) -> str:
    """``v2/models/m[/versions/v]/infer`` -> ``v2/models/m/response``; ``predict`` -> ``predict/response``."""
    if topic == "predict":
        return "predict/response"
    return "/".join([*topic.split("/")[:3], "response"])


def _header_length(message: Message) -> int | None:
    for name, value in message.user:
        if name == HEADER_LENGTH:
            if not value.isdigit() or len(value) > 12:
                said = value[:80].decode(errors="replace")
                raise InvalidInput(f"user property {name.decode()}: expected bytes, got {said!r}")
            return int(value)
    return None


def _soonest(*seconds: float | None) -> float | None:
    return min((value for value in seconds if value is not None), default=None)


def _refused_decision(decision: Decision, error: Exception) -> Decision:
    body = codec.encode_error(f"the answer: {error}")
    return Decision(decision.topic, body, None, decision.correlation, (("status", "413"),))


def _decision_properties(decision: Decision, sequence: int) -> bytes:
    return (
        _correlation(decision.correlation)
        + _content(decision.json_size)
        + b"".join(wire.user_property(name, value) for name, value in decision.user)
        + wire.user_property("sequence", str(sequence))
    )


def _response_properties(reply: _Reply, response: _Response) -> bytes:
    answer = response.answer
    if answer is None:
        fixed = _fixed_properties(response.status, None, None, None)
    else:
        fixed = _fixed_properties(response.status, answer.source, answer.reason, str(answer.version))
    return _correlation(reply.correlation) + _content(response.body.json_size) + fixed


@functools.lru_cache(_KEPT_PROPERTIES)
def _fixed_properties(status: int, source: str | None, reason: str | None, version: str | None) -> bytes:
    said = {"status": str(status), "source": source, "reason": reason, "model_version": version}
    return b"".join(wire.user_property(name, value) for name, value in said.items() if value is not None)


def _correlation(value: bytes | None) -> bytes:
    return b"" if value is None else wire.bytes_property(wire.CORRELATION, value)


def _content(json_size: int | None) -> bytes:
    if json_size is None:
        return _JSON_CONTENT
    return _BINARY_CONTENT + wire.user_property(HEADER_LENGTH.decode(), str(json_size))


_JSON_CONTENT: Final = wire.number_property(wire.PAYLOAD_FORMAT, 1) + wire.bytes_property(  # UTF-8
    wire.CONTENT_TYPE, codec.JSON.encode()
)
_BINARY_CONTENT: Final = wire.number_property(wire.PAYLOAD_FORMAT, 0) + wire.bytes_property(
    wire.CONTENT_TYPE, codec.BINARY.encode()
)

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
    events                                    what changed: a model, its state, drift, fallback

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
import logging
import random
import socket
import ssl
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.config import MqttConfig
from edge_agent.errors import ConfigError, EdgeError, InvalidInput, Overloaded, Unavailable
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport import codec
from edge_agent.transport.outbox import Decision, Outbox
from edge_agent.transport.status import OUTCOMES, outcome, status_of
from edge_agent.transport.stream import Input, Stream, names_of

log = logging.getLogger(__name__)

ONLINE: Final = "online"
OFFLINE: Final = "offline"
HEADER_LENGTH: Final = "inference-header-content-length"  # user property, as the HTTP header
FIRST_BACKOFF_SECONDS: Final = 0.5
MODELS_INTERVAL_SECONDS: Final = 1.0  # how soon a change of the model list is published
REFUSALS_FACTOR: Final = 16  # refusals on their way, in units of max_pending; each is a few hundred bytes
GOODBYE_SECONDS: Final = 2.0  # to say offline at a clean end
REMEMBER_SECONDS: Final = 60.0  # how long a request without expiry is known; a broker redelivers sooner
REMEMBER_REQUESTS: Final = 4096
CALM_SECONDS: Final = 10.0  # without a fallback before its end is announced
_QOS: Final = 1
_MAX_TOPIC: Final = 1024  # bytes; the protocol allows 65,535, no topic of ours is near


_Key = tuple[str, str, bytes, int]


@dataclass(frozen=True, slots=True)
class _Reply:
    """Where and how a request wants its answer; ``key`` tells it from every other."""

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


@dataclass(frozen=True, slots=True)
class _Response:
    """What goes back."""

    body: codec.Body
    status: int
    answer: Answer | None = None


class MqttTransport:
    """One connection to one broker, made again whenever it is lost. ``connected`` is set while it lives.

    ``spool`` is the folder where decisions of streams wait; without it there are no streams, and the broker
    keeps no session.

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
        self._connection: aiomqtt.Client | None = None
        self._spool = spool
        self._stream: Stream | None = None
        self._requests: OrderedDict[_Key, float] = OrderedDict()  # until when they are known
        self._window = config.max_pending
        self._said: dict[str, _Seen] = {}
        self._password()
        self._tls()
        self._answering: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled, through every loss of the broker; without a spool, requests only."""
        async with contextlib.AsyncExitStack() as stack:
            outbox = await asyncio.to_thread(self._open_outbox)
            if outbox is not None:
                stack.callback(outbox.close)
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
            try:
                await self._session()
            except ConfigError as error:  # files may be renewed under us
                log.warning("mqtt: %s", error)
            except aiomqtt.MqttError as error:
                if self.connected.is_set() or not complained:
                    complained = True
                    log.warning("mqtt: %s:%d: %s", self._config.host, self._config.port, _why(error))
                if self.connected.is_set():
                    backoff = FIRST_BACKOFF_SECONDS
            except Exception:  # whatever it is, it must not take the HTTP side along
                log.exception("mqtt: the connection failed unexpectedly")
            finally:
                self.connected.clear()
                self._connection = None
                await self._abandon()
            await asyncio.sleep(self._rng.uniform(0, backoff))
            backoff = min(backoff * 2, self._config.reconnect_max_seconds)

    async def _session(self) -> None:
        """One connection, from connect to its loss."""
        password = await asyncio.to_thread(self._password)
        tls = await asyncio.to_thread(self._tls)
        client = self._connection = self._client(password, tls)  # a kept session delivers from the first turn
        async with client:
            client.pending_calls_threshold = 1 << 20  # ours to bound, not to warn about
            await client.subscribe(
                [
                    (f"{self._root}/v2/models/+/infer", _QOS),
                    (f"{self._root}/v2/models/+/versions/+/infer", _QOS),
                    (f"{self._root}/predict", _QOS),
                    *(
                        (
                            (f"{self._root}/v2/models/+/input", _QOS),
                            (f"{self._root}/v2/models/+/versions/+/input", _QOS),
                        )
                        if self._stream is not None
                        else ()
                    ),
                ]
            )
            await client.publish(f"{self._root}/status", ONLINE, qos=_QOS, retain=True)
            self.connected.set()
            log.info("mqtt: connected to %s:%d", self._config.host, self._config.port)
            tasks = [asyncio.create_task(self._announce(client), name="mqtt models")]
            if self._stream is not None:
                tasks.append(asyncio.create_task(self._deliver(client, self._stream), name="mqtt stream"))
            try:
                async for _ in client.messages:  # ends when the connection does; the inbox is never filled
                    pass
            except asyncio.CancelledError:
                with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
                    async with asyncio.timeout(GOODBYE_SECONDS):
                        if self._stream is not None:
                            self._stream.leave()
                            await asyncio.wait(tasks[1:])
                        if self._answering:  # what was accepted is still answered
                            await asyncio.wait(self._answering)
                        await client.publish(f"{self._root}/status", OFFLINE, qos=_QOS, retain=True)
                raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _client(self, password: str | None, tls: ssl.SSLContext | None) -> aiomqtt.Client:
        config = self._config
        kept = self._spool is not None
        limits = None
        if self._v5:
            limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            limits.MaximumPacketSize = config.max_payload_bytes + (64 << 10)  # and its properties
            limits.ReceiveMaximum = min(
                config.max_pending, 65535
            )  # the broker keeps back what we cannot take
            if kept:
                limits.SessionExpiryInterval = config.session_expiry_seconds
        client = aiomqtt.Client(
            config.host,
            config.port,
            username=config.username,
            password=password,
            identifier=f"{config.prefix}-{self._device}",
            protocol=aiomqtt.ProtocolVersion.V5 if self._v5 else aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(f"{self._root}/status", OFFLINE, qos=_QOS, retain=True),
            clean_session=None if self._v5 else not kept,
            clean_start=not kept if self._v5 else MQTT_CLEAN_START_FIRST_ONLY,
            keepalive=config.keepalive_seconds,
            tls_context=tls,
            max_inflight_messages=self._window,
            properties=limits,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=log,
        )
        # aiomqtt hands over one message per task and several turns of the loop, without the duplicate flag or
        # the acknowledgement: a burst would be lost though the broker was told that it arrived. What it is
        # built on gives a message in the very turn that read it.
        paho: Any = client._client
        paho.manual_ack_set(True)
        paho.on_message = lambda _client, _data, message: self._receive(client, paho, message)
        connected = paho.on_connect

        def on_connect(who: Any, data: Any, flags: Any, code: Any, properties: Any) -> None:
            if self._stream is not None and not flags.session_present:
                self._stream.forget_inputs()
            most = _property(properties, "ReceiveMaximum")
            if (
                most
            ):  # what the broker takes at once; paho does not look, and learns it at the next connection
                self._window = min(most, config.max_pending)
            connected(who, data, flags, code, properties)

        paho.on_connect = on_connect
        return client

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

    async def _announce(self, client: aiomqtt.Client) -> None:
        """Keep the retained model list true, and say what changed, also while the broker was away."""
        said = b""
        while True:
            for event in self._events():
                await client.publish(f"{self._root}/events", codec.encode_json(event), qos=_QOS)
            now = codec.encode_json(codec.repository_index(self._service.statuses()))
            if now != said:
                await client.publish(f"{self._root}/models", now, qos=_QOS, retain=True)
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

    async def _deliver(self, client: aiomqtt.Client, stream: Stream) -> None:
        """Publish the decisions that wait; ends with the connection, or when the disk refuses."""

        async def publish(decision: Decision, sequence: int) -> None:
            properties = _decision_properties(decision, sequence) if self._v5 else None
            await client.publish(
                decision.topic, decision.body, qos=_QOS, properties=properties, timeout=float("inf")
            )

        while True:
            try:
                await stream.deliver(publish)
            except aiomqtt.MqttError:
                return  # the connection is gone: the next one goes on from here
            except OSError as error:
                log.error("mqtt: decisions that wait cannot be read: %s", error)
                await asyncio.sleep(MODELS_INTERVAL_SECONDS)
            else:
                return

    async def _abandon(self) -> None:
        """Answers that can reach nobody any more."""
        tasks = self._answering | self._refusing
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one request ---------------------------------------------------------------------------------------

    def _receive(self, client: aiomqtt.Client, paho: Any, message: MQTTMessage) -> None:
        """Take up, accept or refuse a message at once; an answer is published by a task of its own."""
        try:
            topic = message.topic.removeprefix(f"{self._root}/")
        except UnicodeDecodeError:  # the broker should not have let it through
            paho.ack(message.mid, message.qos)
            return
        if self._stream is not None and topic.endswith("/input"):
            self._take_up(client, paho, topic, message)
            return
        paho.ack(message.mid, message.qos)
        if message.retain:
            log.warning("mqtt: a retained request on %s is not answered at every connect; clear it", topic)
            return
        reply = _Reply(f"{self._root}/{_fixed_response(topic)}", _correlation(message.properties))
        try:
            reply = self._reply(message.properties, reply)
            if reply.correlation is not None:
                key = (topic, reply.topic, reply.correlation, zlib.crc32(message.payload))
                reply = replace(reply, key=key)
            if self._is_known(topic, message, reply):
                return
            if len(self._answering) >= self._config.max_pending:
                raise Overloaded(f"{len(self._answering)} requests are being answered, the limit; try again")
            promise = self._submit(topic, message)
        except Exception as error:
            if len(self._refusing) < REFUSALS_FACTOR * self._config.max_pending:
                _spawn(self._refusing, self._publish(client, reply, _refused(error)))
            else:  # not even the refusals may pile up without end
                self._count["unavailable"]()
            if isinstance(error, Overloaded | Unavailable):
                self._forget(reply)  # asked again, it is tried again
        else:
            _spawn(self._answering, self._answer(client, reply, *promise))

    def _take_up(self, client: aiomqtt.Client, paho: Any, topic: str, message: MQTTMessage) -> None:
        """An input of a stream: acknowledged when its decision is safe."""
        assert self._stream is not None
        mid, qos = message.mid, message.qos

        def accepted() -> None:
            if self._connection is client:  # else the broker delivers it again, and is told then
                paho.ack(mid, qos)

        if message.retain:
            log.warning("mqtt: a retained input on %s is not decided at every connect; clear it", topic)
            accepted()
            return
        body = bytes(message.payload)
        size = None
        with contextlib.suppress(InvalidInput):  # then it is decoded as JSON, and refused with its reason
            size = _header_length(message.properties)
        self._stream.accept(
            Input(
                topic,
                body,
                (mid if qos else -1, zlib.crc32(body, zlib.crc32(topic.encode()))),
                bool(message.dup) and qos > 0,
                size,
                _correlation(message.properties),
            ),
            accepted,
        )

    def _is_known(self, topic: str, message: MQTTMessage, reply: _Reply) -> bool:
        """Whether a request is being answered, or was, under the same key; notes it otherwise."""
        if reply.key is None:
            return False
        now = time.monotonic()
        if self._requests.get(reply.key, 0.0) > now:
            log.info("mqtt: a request on %s came again, it is answered once", topic)
            return True
        expiry = _property(message.properties, "MessageExpiryInterval")
        self._requests.pop(reply.key, None)
        self._requests[reply.key] = now + (REMEMBER_SECONDS if expiry is None else float(expiry))
        while len(self._requests) > REMEMBER_REQUESTS or next(iter(self._requests.values())) <= now:
            self._requests.popitem(last=False)
        return False

    def _submit(
        self, topic: str, message: MQTTMessage
    ) -> tuple[asyncio.Future[Answer], Callable[[Answer], codec.Body]]:
        body = bytes(message.payload)
        if not body:
            raise InvalidInput("payload: empty, expected a request")
        if len(body) > self._config.max_payload_bytes:
            raise InvalidInput(f"payload: {len(body)} bytes, the limit is {self._config.max_payload_bytes}")
        expiry = _property(message.properties, "MessageExpiryInterval")
        if topic == "predict":
            predict = codec.decode_predict(body, self._service.manifest)
            deadline = _soonest(predict.deadline, expiry)
            future = self._service.submit(predict.model, predict.version, predict.inputs, deadline=deadline)
            return future, lambda answer: codec.encode_predict(answer, predict)
        model, version = names_of(topic)
        infer = codec.decode_infer(
            body, _header_length(message.properties), lambda: self._service.manifest(model, version)
        )
        deadline = _soonest(infer.deadline, expiry)
        future = self._service.submit(model, version, infer.inputs, deadline=deadline)
        return future, lambda answer: codec.encode_infer(answer, infer)

    async def _answer(
        self,
        client: aiomqtt.Client,
        reply: _Reply,
        future: asyncio.Future[Answer],
        encode: Callable[[Answer], codec.Body],
    ) -> None:
        try:
            answer = await future
            response = _Response(encode(answer), 200, answer)
        except Exception as error:
            response = _refused(error)
        except asyncio.CancelledError:
            self._forget(reply)  # the connection is gone: delivered again, it is answered again
            raise
        await self._publish(client, reply, response)

    async def _publish(self, client: aiomqtt.Client, reply: _Reply, response: _Response) -> None:
        self._count[outcome(response.status)]()
        try:
            await client.publish(
                reply.topic,
                response.body.data,
                # Refused for being too many: a refusal must not wait for its acknowledgement as well.
                qos=0 if response.status == 429 else _QOS,
                properties=_response_properties(reply, response) if self._v5 else None,
            )
        except asyncio.CancelledError:
            self._forget(reply)
            raise
        except (aiomqtt.MqttError, ValueError) as error:
            self._forget(reply)
            log.info("mqtt: an answer on %s was lost: %s", reply.topic, error)

    def _forget(self, reply: _Reply) -> None:
        if reply.key is not None:
            self._requests.pop(reply.key, None)

    def _reply(self, properties: Properties | None, fixed: _Reply) -> _Reply:
        """Where the answer goes.

        Raises:
            InvalidInput: the response topic is not one that this agent may write to.
        """
        topic = _property(properties, "ResponseTopic")
        if not isinstance(topic, str):
            return fixed
        if any(character in topic for character in "+#\0") or len(topic.encode()) > _MAX_TOPIC or not topic:
            raise InvalidInput(f"response topic {topic[:80]!r}: expected a topic name without wildcards")
        prefixes = self._config.reply_prefixes or (f"{self._config.prefix}/",)
        if not topic.startswith(prefixes):
            allowed = ", ".join(prefixes)
            raise InvalidInput(f"response topic {topic[:80]!r}: expected one below {allowed}")
        # Whatever device it belongs to: an answer must never be read as a request, or as a state.
        if topic.endswith(("/infer", "/predict", "/status", "/models")):
            raise InvalidInput(f"response topic {topic[:80]!r}: that is a topic of an agent, choose another")
        return _Reply(topic, fixed.correlation)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _spawn(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work, name="mqtt answer")
    tasks.add(task)
    task.add_done_callback(tasks.discard)


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


def _property(properties: Properties | None, name: str) -> Any:
    return getattr(properties, name, None)


def _correlation(properties: Properties | None) -> bytes | None:
    value = _property(properties, "CorrelationData")
    return value if isinstance(value, bytes) else None


def _header_length(properties: Properties | None) -> int | None:
    for name, value in _property(properties, "UserProperty") or ():
        if name == HEADER_LENGTH:
            if not value.isascii() or not value.isdigit() or len(value) > 12:
                raise InvalidInput(f"user property {name}: expected bytes, got {value[:80]!r}")
            return int(value)
    return None


def _soonest(*seconds: float | None) -> float | None:
    return min((value for value in seconds if value is not None), default=None)


def _decision_properties(decision: Decision, sequence: int) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if decision.correlation is not None:
        properties.CorrelationData = decision.correlation
    user = [*decision.user, ("sequence", str(sequence))]
    _say_content(properties, decision.json_size, user)
    properties.UserProperty = user
    return properties


def _say_content(properties: Properties, json_size: int | None, user: list[tuple[str, str]]) -> None:
    if json_size is None:
        properties.ContentType = codec.JSON
        properties.PayloadFormatIndicator = 1  # UTF-8
    else:
        properties.ContentType = codec.BINARY
        properties.PayloadFormatIndicator = 0
        user.append((HEADER_LENGTH, str(json_size)))


def _response_properties(reply: _Reply, response: _Response) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if reply.correlation is not None:
        properties.CorrelationData = reply.correlation
    user = [("status", str(response.status))]
    if response.answer is not None:
        user.append(("source", response.answer.source))
        user.append(("reason", response.answer.reason))
        user.append(("model_version", response.answer.version))
    _say_content(properties, response.body.json_size, user)
    properties.UserProperty = user
    return properties


def _why(error: aiomqtt.MqttError) -> str:
    text = str(error)
    if "rotocol version" in text:
        return f"{text}: this broker does not speak the version asked; set mqtt.protocol to '3.1.1'"
    return f"{text}; trying again"

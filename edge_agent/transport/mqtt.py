"""Inference over MQTT: the same bodies as over HTTP, as MQTT 5 request/response.

Invariants:

- the agent publishes to its own topics and, for MQTT 5 requests, to response topics inside the allowed
  prefixes without wildcards: nobody can make it write anywhere else, least of all where an agent reads;
- every request gets an answer or an error with a status; requests being answered are bounded;
- the retained status is ``online`` while a connection lives, and ``offline`` by the broker's hand if it dies;
- a broker that is away or refuses is tried again for ever, with backoff and full jitter.

Topics, all below ``{prefix}/{device}/``::

    v2/models/{model}[/versions/{v}]/infer    request: Open Inference Protocol body
    v2/models/{model}/response                its answer where the request names no response topic
    predict, predict/response                 the same for the decision API
    status                                    retained: online, offline
    models                                    retained: the repository index, as JSON

MQTT 5 (https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html section 4.10): the answer goes to the
request's Response Topic with its Correlation Data; Message Expiry is the deadline; user properties ``status``
(an HTTP status), ``source``, ``reason`` and ``model_version``. Clients of 3.1.1 recognise their answer by the
``id`` in the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.config import MqttConfig
from edge_agent.errors import ConfigError, EdgeError, InvalidInput, Overloaded
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport import codec
from edge_agent.transport.http import OUTCOMES, outcome, status_of

log = logging.getLogger(__name__)

ONLINE: Final = "online"
OFFLINE: Final = "offline"
HEADER_LENGTH: Final = "inference-header-content-length"  # user property, as the HTTP header
FIRST_BACKOFF_SECONDS: Final = 0.5
MODELS_INTERVAL_SECONDS: Final = 1.0  # how soon a change of the model list is published
REFUSALS_FACTOR: Final = 16  # refusals on their way, in units of max_pending; each is a few hundred bytes
GOODBYE_SECONDS: Final = 2.0  # to say offline at a clean end
_QOS: Final = 1
_MAX_TOPIC: Final = 1024  # bytes; the protocol allows 65,535, no topic of ours is near


@dataclass(frozen=True, slots=True)
class _Reply:
    """Where and how a request wants its answer."""

    topic: str
    correlation: bytes | None


@dataclass(frozen=True, slots=True)
class _Response:
    """What goes back."""

    body: codec.Body
    status: int
    answer: Answer | None = None


class MqttTransport:
    """One connection to one broker, made again whenever it is lost. ``connected`` is set while it lives."""

    def __init__(
        self,
        config: MqttConfig,
        device: str,
        service: Service,
        metrics: AgentMetrics,
        *,
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
        self._answering: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled, through every loss of the broker.

        Raises:
            ConfigError: the password file cannot be read.
        """
        password = await asyncio.to_thread(self._password)
        backoff = FIRST_BACKOFF_SECONDS
        complained = False
        while True:
            try:
                await self._session(password)
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
                await self._abandon()
            await asyncio.sleep(self._rng.uniform(0, backoff))
            backoff = min(backoff * 2, self._config.reconnect_max_seconds)

    async def _session(self, password: str | None) -> None:
        """One connection, from connect to its loss."""
        async with self._client(password) as client:
            self._connection = client
            client.pending_calls_threshold = 1 << 20  # ours to bound, not to warn about
            await client.publish(f"{self._root}/status", ONLINE, qos=_QOS, retain=True)
            await client.subscribe(
                [
                    (f"{self._root}/v2/models/+/infer", _QOS),
                    (f"{self._root}/v2/models/+/versions/+/infer", _QOS),
                    (f"{self._root}/predict", _QOS),
                ]
            )
            self.connected.set()
            log.info("mqtt: connected to %s:%d", self._config.host, self._config.port)
            models = asyncio.create_task(self._announce_models(client), name="mqtt models")
            try:
                async for _ in client.messages:  # ends when the connection does; the inbox is never filled
                    pass
            except asyncio.CancelledError:
                with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
                    async with asyncio.timeout(GOODBYE_SECONDS):
                        if self._answering:  # what was accepted is still answered
                            await asyncio.wait(self._answering)
                        await client.publish(f"{self._root}/status", OFFLINE, qos=_QOS, retain=True)
                raise
            finally:
                models.cancel()
                await asyncio.gather(models, return_exceptions=True)

    def _client(self, password: str | None) -> aiomqtt.Client:
        config = self._config
        receive = self._receive

        class Inbox(asyncio.Queue[aiomqtt.Message]):
            """Takes a message in the very turn of the loop that read it.

            The stock queue hands over one message per task and several turns: a burst that arrives faster
            than that is lost, though the broker was told that it arrived.
            """

            def put_nowait(self, item: aiomqtt.Message) -> None:
                receive(item)

        limits = None
        if self._v5:
            limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            limits.MaximumPacketSize = config.max_payload_bytes + (64 << 10)  # and its properties
        return aiomqtt.Client(
            config.host,
            config.port,
            username=config.username,
            password=password,
            identifier=f"{config.prefix}-{self._device}",
            protocol=aiomqtt.ProtocolVersion.V5 if self._v5 else aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(f"{self._root}/status", OFFLINE, qos=_QOS, retain=True),
            clean_session=None if self._v5 else True,
            clean_start=True if self._v5 else MQTT_CLEAN_START_FIRST_ONLY,
            keepalive=config.keepalive_seconds,
            queue_type=Inbox,
            max_inflight_messages=config.max_pending,
            properties=limits,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=log,
        )

    def _password(self) -> str | None:
        path = self._config.password_file
        if path is None:
            return None
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"mqtt.password_file {path}: {error.strerror}; correct the path") from error

    async def _announce_models(self, client: aiomqtt.Client) -> None:
        """Keep the retained model list true."""
        said = b""
        while True:
            now = codec.encode_json(codec.repository_index(self._service.statuses()))
            if now != said:
                await client.publish(f"{self._root}/models", now, qos=_QOS, retain=True)
                said = now
            await asyncio.sleep(MODELS_INTERVAL_SECONDS)

    async def _abandon(self) -> None:
        """Answers that can reach nobody any more."""
        tasks = self._answering | self._refusing
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one request ---------------------------------------------------------------------------------------

    def _receive(self, message: aiomqtt.Message) -> None:
        """Accept or refuse a request at once; its answer is published by a task of its own."""
        client = self._connection
        if client is None:
            return
        topic = str(message.topic).removeprefix(f"{self._root}/")
        if message.retain:
            log.warning("mqtt: a retained request on %s is not answered at every connect; clear it", topic)
            return
        reply = _Reply(f"{self._root}/{_fixed_response(topic)}", _correlation(message.properties))
        try:
            reply = self._reply(message.properties, reply)
            if len(self._answering) >= self._config.max_pending:
                raise Overloaded(f"{len(self._answering)} requests are being answered, the limit; try again")
            promise = self._submit(topic, message)
        except Exception as error:
            if len(self._refusing) < REFUSALS_FACTOR * self._config.max_pending:
                _spawn(self._refusing, self._publish(client, reply, _refused(error)))
            else:  # not even the refusals may pile up without end
                self._count["unavailable"]()
        else:
            _spawn(self._answering, self._answer(client, reply, *promise))

    def _submit(
        self, topic: str, message: aiomqtt.Message
    ) -> tuple[asyncio.Future[Answer], Callable[[Answer], codec.Body]]:
        body = message.payload
        if not isinstance(body, bytes | bytearray):
            raise InvalidInput("payload: empty, expected a request")
        body = bytes(body)
        if len(body) > self._config.max_payload_bytes:
            raise InvalidInput(f"payload: {len(body)} bytes, the limit is {self._config.max_payload_bytes}")
        expiry = _property(message.properties, "MessageExpiryInterval")
        if topic == "predict":
            predict = codec.decode_predict(body, self._service.manifest)
            deadline = _soonest(predict.deadline, expiry)
            future = self._service.submit(predict.model, predict.version, predict.inputs, deadline=deadline)
            return future, lambda answer: codec.encode_predict(answer, predict)
        model, version = _names(topic)
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
        except (aiomqtt.MqttError, ValueError) as error:
            log.info("mqtt: an answer on %s was lost: %s", reply.topic, error)

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


def _names(topic: str) -> tuple[str, str | None]:
    """Model and version of ``v2/models/{model}[/versions/{v}]/infer``; the subscription fixed its form."""
    parts = topic.split("/")
    return parts[2], parts[4] if len(parts) == 6 else None


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


def _response_properties(reply: _Reply, response: _Response) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if reply.correlation is not None:
        properties.CorrelationData = reply.correlation
    user = [("status", str(response.status))]
    if response.answer is not None:
        user.append(("source", response.answer.source))
        user.append(("reason", response.answer.reason))
        user.append(("model_version", response.answer.version))
    if response.body.json_size is None:
        properties.ContentType = codec.JSON
        properties.PayloadFormatIndicator = 1  # UTF-8
    else:
        properties.ContentType = codec.BINARY
        properties.PayloadFormatIndicator = 0
        user.append((HEADER_LENGTH, str(response.body.json_size)))
    properties.UserProperty = user
    return properties


def _why(error: aiomqtt.MqttError) -> str:
    text = str(error)
    if "rotocol version" in text:
        return f"{text}: this broker does not speak the version asked; set mqtt.protocol to '3.1.1'"
    return f"{text}; trying again"

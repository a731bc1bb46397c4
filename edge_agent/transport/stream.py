"""Telemetry in, decisions out: an accepted input gets one decision, in order, whatever happens to the broker.

Invariants:

- an input is acknowledged when its decision is on disk (``outbox.py``), not before: until then it is the
  broker's to hand over again;
- decisions are kept and delivered in the order in which the inputs came, also where the model took longer for
  one of them, or refused it: a refusal is a decision with a status, too;
- what a broker hands over again is recognised, and not decided again.

Knows no MQTT client: who brings inputs says how to acknowledge one and how to publish a decision.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.errors import EdgeError, InvalidInput, Overloaded
from edge_agent.serving.service import Answer, Service
from edge_agent.transport import codec
from edge_agent.transport.outbox import Decision, Identity, Outbox
from edge_agent.transport.status import status_of

log = logging.getLogger(__name__)

MOST_AT_ONCE: Final = 64  # decisions kept by one write; few enough that a lost connection repeats little
MOST_BYTES: Final = 1 << 20  # of bodies in one write
DISK_PATIENCE_SECONDS: Final = 1.0  # between attempts while the disk refuses


@dataclass(frozen=True, slots=True)
class Input:
    """One message of telemetry, as it came."""

    topic: str  # below the device's root: v2/models/{model}[/versions/{v}]/input
    body: bytes
    identity: Identity
    again: bool  # the broker says that it may have delivered it before
    json_size: int | None
    correlation: bytes | None
    problem: str | None = None  # why it is refused whatever the body says


@dataclass(slots=True, eq=False)
class _Slot:
    """An input's place in the order, until its decision is on disk."""

    identity: Identity
    topic: str  # of the decision
    correlation: bytes | None
    accepted: Callable[[], None]
    decision: Decision | None = None


class Stream:
    """The inputs under way and the decisions that wait. Lives on one event loop."""

    def __init__(self, outbox: Outbox, service: Service, root: str, max_pending: int) -> None:
        self._outbox = outbox
        self._service = service
        self._root = root
        self._max_pending = max_pending
        self._pipeline: deque[_Slot] = deque()
        self._decided = asyncio.Event()
        self._waiting = asyncio.Event()
        self._waiting.set()  # of the last run, perhaps
        self._progress = (0, 0)  # a record's number, and how many of its decisions the broker has
        self._leaving = False

    def forget_inputs(self) -> None:
        """The broker has a new session: nothing it delivers was delivered before."""
        self._outbox.forget_inputs()

    def accept(self, message: Input, accepted: Callable[[], None]) -> None:
        """Take an input up; ``accepted`` is called once its decision is safe. Never raises."""
        if message.again:
            if self._outbox.knows(message.identity):
                accepted()
                return
            for slot in self._pipeline:
                if slot.identity == message.identity:
                    slot.accepted = accepted  # the connection it came by at first is gone
                    return
        topic = f"{self._root}/{message.topic.removesuffix('input')}output"
        slot = _Slot(message.identity, topic, message.correlation, accepted)
        self._pipeline.append(slot)
        try:
            if len(self._pipeline) > 4 * self._max_pending:  # a broker that ignores what we asked for
                raise Overloaded(f"{len(self._pipeline)} inputs are under way, the limit; send less")
            if message.problem is not None:
                raise InvalidInput(message.problem)
            self._ask(message, slot)
        except Exception as error:
            self._answered(slot, lambda _: codec.Body(b""), error)

    def _ask(self, message: Input, slot: _Slot) -> None:
        model, version = names_of(message.topic)
        request: codec.InferRequest | codec.PredictRequest
        if message.json_size is not None or b'"inputs"' in message.body:
            request = infer = codec.decode_infer(
                message.body, message.json_size, lambda: self._service.manifest(model, version)
            )
            encode: Callable[[Answer], codec.Body] = lambda answer: codec.encode_infer(answer, infer)  # noqa: E731
        else:
            request = predict = codec.decode_predict(
                message.body, lambda _, wanted: self._service.manifest(model, wanted or version)
            )
            if predict.model not in (None, model):
                raise InvalidInput(f"model: {predict.model!r} in the body, {model!r} in the topic")
            version = predict.version or version
            encode = lambda answer: codec.encode_predict(answer, predict)  # noqa: E731
        then = functools.partial(self._answered, slot, encode)
        self._service.ask(
            model,
            version,
            request.inputs,
            then,
            deadline=request.deadline,
            source=request.source,
            key=request.id or "",
        )

    def _answered(
        self, slot: _Slot, encode: Callable[[Answer], codec.Body], answer: Answer | Exception
    ) -> None:
        try:
            if isinstance(answer, Exception):
                raise answer
            body = encode(answer)
            user: tuple[tuple[str, str], ...] = (
                ("status", "200"),
                ("source", answer.source),
                ("reason", answer.reason),
                ("model_version", str(answer.version)),
            )
        except Exception as error:
            if not isinstance(error, EdgeError):
                log.exception("an input was not decided", exc_info=error)
            text = error if isinstance(error, EdgeError) else "internal error, the agent's log has more"
            body = codec.Body(codec.encode_error(text))
            user = (("status", str(status_of(error))),)
        slot.decision = Decision(slot.topic, body.data, body.json_size, slot.correlation, user)
        if self._pipeline[0].decision is not None:
            self._decided.set()

    async def keep(self) -> None:
        """Put decisions on disk as they are made, in order, for ever."""
        complained = False
        while True:
            await self._decided.wait()
            slots = self._decided_prefix()
            if not slots:
                self._decided.clear()
                continue
            decisions = [slot.decision for slot in slots if slot.decision is not None]
            try:
                lost = await asyncio.to_thread(
                    self._outbox.append, decisions, [slot.identity for slot in slots]
                )
            except Exception as error:  # the disk's, or a bug of ours: either way they are not acknowledged
                if not complained:
                    log.error(
                        "decisions cannot be kept, inputs are not acknowledged: %s", error,
                        exc_info=None if isinstance(error, OSError) else error,
                    )  # fmt: skip
                complained = True
                await asyncio.sleep(DISK_PATIENCE_SECONDS)
                continue
            complained = False
            if lost:
                log.warning("%d decisions were given up: mqtt.max_queue_bytes is full", lost)
            for slot in slots:
                self._pipeline.popleft()
                slot.accepted()
            self._waiting.set()

    def _decided_prefix(self) -> list[_Slot]:
        slots: list[_Slot] = []
        size = 0
        for slot in self._pipeline:
            if slot.decision is None or len(slots) == MOST_AT_ONCE or size > MOST_BYTES:
                break
            if len(slot.decision.body) > MOST_BYTES:
                text = f"the answer has {len(slot.decision.body)} bytes, at most {MOST_BYTES} are kept"
                body = codec.encode_error(text)
                slot.decision = Decision(slot.topic, body, None, slot.correlation, (("status", "413"),))
            size += len(slot.decision.body)
            slots.append(slot)
        return slots

    async def deliver(self, publish: Callable[[Decision, int], Awaitable[None]]) -> None:
        """Publish what waits, in order, until ``leave`` or until ``publish`` raises."""
        self._leaving = False
        while not self._leaving:
            self._waiting.clear()
            oldest = await asyncio.to_thread(self._outbox.oldest)
            if oldest is None:
                await self._waiting.wait()
                continue
            number, record = oldest
            begin = self._progress[1] if self._progress[0] == number else 0
            received: set[int] = set()

            async def one(index: int, decision: Decision, first: int, received: set[int]) -> None:
                await publish(decision, first + index)
                received.add(index)

            try:
                await asyncio.gather(
                    *(
                        one(index, decision, record.first, received)
                        for index, decision in enumerate(record.decisions)
                        if index >= begin
                    )
                )
            finally:
                while begin in received:
                    begin += 1
                self._progress = (number, begin)
            await asyncio.to_thread(self._outbox.delivered, number)

    def leave(self) -> None:
        """Let ``deliver`` end after what it is publishing."""
        self._leaving = True
        self._waiting.set()


def names_of(topic: str) -> tuple[str, str | None]:
    """Model and version of ``v2/models/{model}[/versions/{v}]/...``; the subscription fixed its form."""
    parts = topic.split("/")
    return parts[2], parts[4] if len(parts) == 6 else None

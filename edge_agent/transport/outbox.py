"""Decisions on their way to the broker, kept on disk until it has them.

Invariants:

- a decision is durable before its input is acknowledged to the broker: what was accepted is answered, through
  any loss of the broker, ``kill -9`` and a power cut;
- decisions leave in the order in which their inputs came, numbered without a gap (``sequence``);
- an input that the broker hands over again is recognised, also after a restart: the newest record holds the
  identities of the inputs before it;
- the folder is bounded: beyond it the oldest decisions are given up, and counted.

A decision can reach the broker twice only if the agent dies between the broker's receipt and the note of it;
it then carries the same ``sequence``.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.telemetry.queue import Queue, newest_on_disk

log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""Packet identifier, and checksum of topic and payload, of an input as the broker delivered it."""

_RECORD_BYTES: Final = 1 << 20  # a record is closed at this size


class Decision(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message to publish."""

    topic: str
    body: bytes
    json_size: int | None
    correlation: bytes | None
    user: tuple[tuple[str, str], ...]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What is kept, delivered and noted as one: decisions of consecutive inputs."""

    first: int  # sequence of the first decision
    decisions: tuple[Decision, ...]
    inputs: tuple[Identity, ...]  # of these and of those before them, oldest first


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Record)


def _read(data: bytes) -> Record | None:
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        log.error("decisions that another agent version kept cannot be read: %s", error)
        return None


class Outbox:
    """The queue in one folder, of one process. Its methods block and may be called from any thread.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, folder: Path, max_bytes: int, remembered: int) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._queue = Queue(folder, max_bytes, keep_newest=True)
        self._remembered = remembered
        self._next = 1
        self._inputs: OrderedDict[Identity, None] = OrderedDict()
        newest = newest_on_disk(folder)
        last = None if newest is None else _read(newest)
        if last is not None:
            self._next = last.first + len(last.decisions)
            self._inputs = OrderedDict.fromkeys(last.inputs)

    def close(self) -> None:
        """Close the files; what waits, waits. A thread that writes is waited for, a later one is refused."""
        with self._lock:
            self._closed = True
            self._queue.close()

    def __len__(self) -> int:
        """Records that wait."""
        return len(self._queue)

    def knows(self, identity: Identity) -> bool:
        """Whether the decision on this input was kept, not long ago."""
        return identity in self._inputs

    def forget_inputs(self) -> None:
        """The broker has a new session: its packet identifiers begin anew."""
        self._inputs.clear()

    def append(self, decisions: Sequence[Decision], inputs: Sequence[Identity]) -> int:
        """Keep decisions durably; how many older ones had to be given up for it.

        Raises:
            OSError: they could not be kept; nothing has changed.
        """
        remembered = OrderedDict(self._inputs)
        for identity in inputs:
            remembered.pop(identity, None)
            remembered[identity] = None
        while len(remembered) > self._remembered:
            remembered.popitem(last=False)
        with self._lock:
            self._insist()
            record = Record(self._next, tuple(decisions), tuple(remembered))
            self._queue.append(_ENCODER.encode(record), len(decisions))
            self._next += len(decisions)
            self._inputs = remembered
            return sum(self._queue.take_losses().values())

    def oldest(self) -> tuple[int, Record] | None:
        """The record that waits longest, and its number to acknowledge it by."""
        while (waiting := self._queue.oldest()) is not None:
            record = _read(waiting.data)
            if record is not None:
                return waiting.sequence, record
            self.delivered(waiting.sequence)  # of an agent that wrote them otherwise
        return None

    def delivered(self, number: int) -> None:
        """The broker has every decision of a record."""
        with self._lock:
            self._insist()
            self._queue.acknowledge(number)

    def _insist(self) -> None:
        if self._closed:  # its descriptor may be another file's by now
            raise OSError(errno.EBADF, "the decisions are closed")

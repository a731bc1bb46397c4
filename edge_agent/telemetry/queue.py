"""A durable first-in first-out queue of records on disk, for samples that wait for the network.

Invariants:

- what ``append`` has returned for survives ``kill -9`` and a power cut (one fdatasync per batch);
- a record is delivered until it is acknowledged; an acknowledgement is durable with the next append, so
  after a power cut at most the records acknowledged since then come again;
- the folder never holds more than ``max_bytes``: the oldest segment goes first, and what it held is counted;
- a torn tail, a flipped bit or a lost segment costs the records it hit and is counted, and nothing else.

Segments ``<number>.segment`` are only ever appended to and deleted whole, oldest first. Each holds records:

    length u32 | kind u8 | sequence u64 | samples u32 | crc32 of data u32 | crc32 of these fields u32 | data

of kind 1 (data) or 2 (the data record of this sequence is acknowledged; no data). So the persisted send
position is part of the log: nothing is ever rewritten in place. All integers are little-endian.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

MAX_RECORD_BYTES: Final = 4 << 20
_FIELDS: Final = struct.Struct("<IBQII")
_HEADER: Final = _FIELDS.size + 4
_DATA, _ACKNOWLEDGED = 1, 2
_SUFFIX: Final = ".segment"

Loss = Literal["full", "corrupt"]


@dataclass(frozen=True, slots=True)
class Record:
    """One record that waits. ``samples`` is what it counts for in metrics."""

    sequence: int
    samples: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Place:
    segment: int
    offset: int  # of the data
    length: int
    samples: int
    crc: int


class Queue:
    """The queue in one folder, of one process. Its methods may be called from any thread; all of them block.

    With ``keep_newest`` the last record stays readable by ``newest_on_disk`` also when it is acknowledged.

    Raises:
        OSError: the folder or a file cannot be created, read or written.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        segment_bytes: int | None = None,
        *,
        keep_newest: bool = False,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        # Small enough that dropping one segment loses little, large enough that there are few.
        self._segment_bytes = segment_bytes or max(min(max_bytes // 16, 1 << 20), 4096)
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}  # records that wait, by sequence, oldest first
        self._sizes: dict[int, int] = {}  # bytes of each segment, oldest first
        self._next = 1
        self._lost: dict[Loss, int] = {"full": 0, "corrupt": 0}
        self._waiting_samples = 0
        self._keep_newest = keep_newest
        self._newest = 0  # segment of the newest record
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._recover()
        number = max(self._sizes, default=0)
        self._number = number or 1
        self._file = self._begin(self._number) if not number else os.open(self._path(number), os.O_RDWR)
        self._drop_beyond_limit(0)

    def close(self) -> None:
        """Make acknowledgements durable and close."""
        with self._lock:
            os.fdatasync(self._file)
            os.close(self._file)

    def __len__(self) -> int:
        """Records that wait."""
        return len(self._places)

    @property
    def waiting_samples(self) -> int:
        """Samples that wait."""
        return self._waiting_samples

    @property
    def newest_sequence(self) -> int:
        """Sequence of the record that came last and still waits; 0 if none waits."""
        with self._lock:
            return next(reversed(self._places), 0)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self._sizes.values())

    def take_losses(self) -> dict[Loss, int]:
        """Samples lost since the last call, by reason; of a damaged record of unknown content, one."""
        with self._lock:
            losses = dict(self._lost)
            self._lost = {"full": 0, "corrupt": 0}
            return losses

    def append(self, data: bytes, samples: int) -> int:
        """Keep a record durably; its sequence.

        Raises:
            OSError: it could not be kept (disk full, I/O error); the queue is as it was before.
            ValueError: larger than the queue or than ``MAX_RECORD_BYTES``.
        """
        most = min(MAX_RECORD_BYTES, self._max_bytes - 2 * _HEADER)
        if len(data) > most:
            raise ValueError(f"a record of {len(data)} bytes, at most {most} are kept")
        with self._lock:
            sequence = self._next
            place = self._write(_DATA, sequence, samples, data, durable=True)
            self._next += 1
            self._places[sequence] = place
            self._newest = place.segment
            self._waiting_samples += samples
            return sequence

    def oldest(self) -> Record | None:
        """The record that waits longest, if any."""
        return self._read(first=True)

    def newest(self) -> Record | None:
        """The record that came last, if it still waits."""
        return self._read(first=False)

    def acknowledge(self, sequence: int) -> None:
        """The record was delivered, or is given up: it does not wait any more."""
        with self._lock:
            place = self._places.pop(sequence, None)
            if place is None:
                return  # dropped meanwhile: the queue was full
            self._waiting_samples -= place.samples
            try:
                self._write(_ACKNOWLEDGED, sequence, 0, b"", durable=False)
            finally:
                self._delete_finished()

    def _read(self, *, first: bool) -> Record | None:
        with self._lock:
            while self._places:
                sequence = next(iter(self._places)) if first else next(reversed(self._places))
                place = self._places[sequence]
                try:
                    with self._path(place.segment).open("rb") as file:
                        file.seek(place.offset)
                        data = file.read(place.length)
                except FileNotFoundError:
                    data = b""
                if len(data) == place.length and zlib.crc32(data) == place.crc:
                    return Record(sequence, place.samples, data)
                self._forget(sequence, "corrupt")
            return None

    def _write(self, kind: int, sequence: int, samples: int, data: bytes, *, durable: bool) -> _Place:
        crc = zlib.crc32(data)
        record = _header(kind, sequence, samples, len(data), crc) + data
        if self._sizes[self._number] and self._sizes[self._number] + len(record) > self._segment_bytes:
            os.fdatasync(self._file)
            file = self._begin(self._number + 1)
            os.close(self._file)
            self._file, self._number = file, self._number + 1
        if kind == _DATA:
            self._drop_beyond_limit(len(record) + _HEADER)
        at = self._sizes[self._number]
        try:
            written = 0
            while written < len(record):
                written += os.pwrite(self._file, record[written:], at + written)
            if durable:
                os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, at)
            raise
        self._sizes[self._number] = at + len(record)
        return _Place(self._number, at + _HEADER, len(data), samples, crc)

    def _begin(self, number: int) -> int:
        file = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._sizes[number] = 0
        self._sync_folder()
        return file

    def _drop_beyond_limit(self, coming: int) -> None:
        """Make room, also for the acknowledgements of all that waits: those must never cost a record."""
        while len(self._sizes) > 1 and (
            self.size_bytes + len(self._places) * _HEADER + coming > self._max_bytes
        ):
            self._delete(next(iter(self._sizes)))

    def _delete_finished(self) -> None:
        """Delete the oldest segments that nothing waits in; the one being written stays."""
        needed = next(iter(self._places.values())).segment if self._places else self._number
        if self._keep_newest:
            needed = min(needed, self._newest)
        for number in [number for number in self._sizes if number < min(needed, self._number)]:
            self._delete(number)

    def _delete(self, number: int) -> None:
        for sequence in [key for key, place in self._places.items() if place.segment == number]:
            self._forget(sequence, "full")
        self._path(number).unlink(missing_ok=True)
        del self._sizes[number]

    def _forget(self, sequence: int, loss: Loss) -> None:
        place = self._places.pop(sequence)
        self._waiting_samples -= place.samples
        self._lost[loss] += place.samples

    def _recover(self) -> None:
        paths = {int(p.stem): p for p in self._folder.glob(f"*{_SUFFIX}") if p.stem.isdecimal()}
        for number in sorted(paths):
            content = paths[number].read_bytes()
            end = self._scan(number, content, last=number == max(paths))
            if end < len(content):
                os.truncate(paths[number], end)
            self._sizes[number] = end

    def _scan(self, number: int, content: bytes, *, last: bool) -> int:
        """Take up the records of a segment; the length to keep.

        The unreadable end of the last segment is what was being written when the power failed: nobody was
        told that it is kept, so it is cut off and not counted. Anything else that is unreadable is a loss.
        """
        at = 0
        while at < len(content):
            header = _header_at(content, at)
            if header is None:
                following = _next_header(content, at + 1)
                if following is None and last:
                    return at
                self._lost["corrupt"] += 1
                at = len(content) if following is None else following
                continue
            kind, sequence, samples, length, crc = header
            start = at + _HEADER
            if zlib.crc32(content[start : start + length]) != crc:
                if last and start + length == len(content):
                    return at
                self._lost["corrupt"] += samples
            elif kind == _DATA:
                self._places[sequence] = _Place(number, start, length, samples, crc)
                self._newest = number
                self._waiting_samples += samples
            elif acknowledged := self._places.pop(sequence, None):
                self._waiting_samples -= acknowledged.samples
            self._next = max(self._next, sequence + 1)
            at = start + length
        return at

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:016d}{_SUFFIX}"

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def newest_on_disk(folder: Path) -> bytes | None:
    """The data of the last record that was kept, also if it is acknowledged already; None if none is left."""
    for path in sorted(folder.glob(f"*{_SUFFIX}"), reverse=True):
        content, at, newest = path.read_bytes(), 0, None
        while at < len(content):
            header = _header_at(content, at)
            if header is None:
                at = _next_header(content, at + 1) or len(content)
                continue
            kind, _, _, length, crc = header
            data = content[at + _HEADER : at + _HEADER + length]
            if kind == _DATA and zlib.crc32(data) == crc:
                newest = data
            at += _HEADER + length
        if newest is not None:
            return newest
    return None


def _header_at(content: bytes, at: int) -> tuple[int, int, int, int, int] | None:
    """Kind, sequence, samples, length and crc of a record that is whole and whose header is sound."""
    if at + _HEADER > len(content):
        return None
    length, kind, sequence, samples, crc = _FIELDS.unpack_from(content, at)
    if at + _HEADER + length > len(content):
        return None
    (check,) = struct.unpack_from("<I", content, at + _FIELDS.size)
    if zlib.crc32(content[at : at + _FIELDS.size]) != check:
        return None
    return kind, sequence, samples, length, crc


def _next_header(content: bytes, start: int) -> int | None:
    return next((at for at in range(start, len(content) - _HEADER + 1) if _header_at(content, at)), None)


def _header(kind: int, sequence: int, samples: int, length: int, crc: int) -> bytes:
    fields = _FIELDS.pack(length, kind, sequence, samples, crc)
    return fields + struct.pack("<I", zlib.crc32(fields))

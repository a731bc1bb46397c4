"""Prometheus remote write 1.0 on the wire: a registry as samples, samples as protobuf, protobuf in snappy.

Written by hand: the message has four fields, and the protobuf and snappy libraries cost more memory than the
rest of this package.

Invariants (https://prometheus.io/docs/specs/prw/remote_write_spec/): labels are sorted by name, none is
empty; all samples of a request have one timestamp; a series that is gone gets one stale marker.

    WriteRequest { repeated TimeSeries timeseries = 1; }
    TimeSeries   { repeated Label labels = 1; repeated Sample samples = 2; }
    Label        { string name = 1; string value = 2; }
    Sample       { double value = 1; int64 timestamp = 2; }   // milliseconds
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry

HEADERS: Final = {
    "Content-Encoding": "snappy",
    "Content-Type": "application/x-protobuf",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}
STALE: Final = struct.pack("<Q", 0x7FF0000000000002)  # this NaN and no other; as bytes, no CPU may quieten it

_LITERAL_BYTES: Final = (
    1 << 16
)  # snappy compresses blocks of 64 kB; a literal of that size has a 2 byte length


class Request(NamedTuple):
    """An encoded WriteRequest, not yet compressed."""

    body: bytes
    samples: int


class Snapshots:
    """Takes snapshots of a registry; remembers the series of the last one, to mark those that are gone.

    Args:
        registry: what to read.
        labels: added to every series, such as ``device``.
    """

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = labels
        self._series: set[bytes] = set()

    def take(self, now: float) -> Request:
        """All samples of the registry, with timestamp ``now`` (seconds since 1970)."""
        present: dict[bytes, bytes] = {}
        for family in self._registry.collect():
            for sample in family.samples:
                # What client_python adds for OpenMetrics; /metrics and docs/metrics.md do not count it in.
                if not sample.name.endswith("_created"):
                    labels = {**self._labels, **sample.labels, "__name__": sample.name}
                    present[encode_labels(labels)] = struct.pack("<d", sample.value)
        gone = dict.fromkeys(self._series - present.keys(), STALE)
        self._series = set(present)
        return encode([*present.items(), *gone.items()], round(now * 1000))


def encode(series: Iterable[tuple[bytes, bytes]], milliseconds: int) -> Request:
    """Encode a WriteRequest with one sample per series.

    Args:
        series: labels as ``encode_labels`` gives them, and the value as a little-endian double.
        milliseconds: the timestamp of all samples, since 1970.
    """
    at = b"\x10" + _varint(milliseconds)
    parts = []
    for labels, value in series:
        sample = b"\x09" + value + at
        parts.append(_field(1, labels + _field(2, sample)))
    return Request(b"".join(parts), len(parts))


def encode_labels(labels: Mapping[str, str]) -> bytes:
    """The labels of a TimeSeries: sorted, without the empty ones."""
    return b"".join(
        _field(1, _field(1, name.encode()) + _field(2, value.encode()))
        for name, value in sorted(labels.items())
        if value
    )


def snappy(data: bytes) -> bytes:
    """Data in snappy's block format, as literals: valid, fast and not smaller.

    https://github.com/google/snappy/blob/main/format_description.txt
    """
    parts = [_varint(len(data))]
    for start in range(0, len(data), _LITERAL_BYTES):
        literal = data[start : start + _LITERAL_BYTES]
        length = len(literal) - 1
        if length < 60:
            parts.append(bytes([length << 2]))
        elif length < 1 << 8:
            parts.append(bytes([60 << 2, length]))
        else:
            parts.append(bytes([61 << 2]) + length.to_bytes(2, "little"))
        parts.append(literal)
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field (wire type 2) with a number below 16."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    if value < 0:
        value += 1 << 64  # as protobuf writes a negative int64: a clock before 1970 is wrong, not fatal
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

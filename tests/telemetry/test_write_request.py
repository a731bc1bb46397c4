"""The bytes of remote write, read back by decoders written from the specifications."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edge_agent.telemetry.write_request import HEADERS, STALE, Snapshots, encode, encode_labels, snappy


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        value: bytes | int
        match key & 7:
            case 0:
                value, at = varint(data, at)
            case 1:
                value, at = data[at : at + 8], at + 8
            case 2:
                length, at = varint(data, at)
                value, at = data[at : at + length], at + length
            case wire_type:
                raise AssertionError(wire_type)
        yield key >> 3, value


def series(body: bytes) -> list[tuple[dict[str, str], bytes, int]]:
    """(labels, value as 8 bytes, milliseconds) of each TimeSeries, of exactly one sample."""
    found = []
    for number, content in fields(body):
        assert number == 1
        assert isinstance(content, bytes)
        parts = list(fields(content))
        assert [part for part, _ in parts] == [1] * (len(parts) - 1) + [2]
        pairs = [dict(fields(label)) for _, label in parts[:-1]]  # type: ignore[arg-type]
        names = [bytes(pair[1]).decode() for pair in pairs]
        assert names == sorted(set(names))
        sample = dict(fields(parts[-1][1]))  # type: ignore[arg-type]
        values = [bytes(pair[2]).decode() for pair in pairs]
        assert all(values)
        found.append((dict(zip(names, values, strict=True)), bytes(sample[1]), int(sample[2])))
    return found


def decompressed(block: bytes) -> bytes:
    """Snappy's block format, of which only literals are expected."""
    length, at = varint(block, 0)
    out = b""
    while at < len(block):
        tag = block[at]
        at += 1
        assert tag & 3 == 0, "a literal"
        size = tag >> 2
        if size >= 60:
            extra = size - 59
            size = int.from_bytes(block[at : at + extra], "little")
            at += extra
        out += block[at : at + size + 1]
        at += size + 1
    assert len(out) == length
    return out


@pytest.mark.parametrize("size", [0, 1, 59, 60, 61, 255, 256, 257, 65535, 65536, 65537, 200_001])
def test_snappy_gives_back_what_went_in(size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(size))
    assert decompressed(snappy(data)) == data


def test_snappy_agrees_with_the_format_description() -> None:
    assert snappy(b"") == b"\x00"
    assert snappy(b"abc") == b"\x03\x08abc"
    assert snappy(bytes(100))[:3] == bytes([100, 60 << 2, 99])


@given(st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), st.text(max_size=300), max_size=6))
def test_labels_are_sorted_and_empty_ones_left_out(labels: dict[str, str]) -> None:
    body = encode([(encode_labels(labels), struct.pack("<d", 1.5))], 1_700_000_000_123).body
    assert series(body) == [
        ({name: value for name, value in labels.items() if value}, struct.pack("<d", 1.5), 1_700_000_000_123)
    ]


@given(st.floats(), st.integers(-(2**62), 2**62))
def test_every_value_and_timestamp_arrives(value: float, milliseconds: int) -> None:
    ((_, raw, at),) = series(
        encode([(encode_labels({"a": "b"}), struct.pack("<d", value))], milliseconds).body
    )
    (got,) = struct.unpack("<d", raw)
    assert got == value or (math.isnan(got) and math.isnan(value))
    assert at == milliseconds % 2**64


def test_the_headers_are_those_of_the_specification() -> None:
    assert HEADERS == {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }


def test_a_snapshot_has_every_series_once_with_the_device_and_one_timestamp() -> None:
    registry = CollectorRegistry()
    Counter("answers_total", "h", ["source"], registry=registry).labels("model").inc(3)
    Histogram("seconds", "h", registry=registry, buckets=(0.1,)).observe(0.05)
    request = Snapshots(registry, {"device": "unit-1"}).take(1_700_000_000.5)
    found = series(request.body)
    assert request.samples == len(found)
    assert {at for _, _, at in found} == {1_700_000_000_500}
    assert {labels["device"] for labels, _, _ in found} == {"unit-1"}
    by_name = {
        (labels["__name__"], labels.get("le")): struct.unpack("<d", raw)[0] for labels, raw, _ in found
    }
    assert by_name == {
        ("answers_total", None): 3.0,
        ("seconds_bucket", "0.1"): 1.0,
        ("seconds_bucket", "+Inf"): 1.0,
        ("seconds_count", None): 1.0,
        ("seconds_sum", None): 0.05,
    }


def test_a_series_that_is_gone_gets_one_stale_marker() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("model_info", "h", ["version"], registry=registry)
    gauge.labels("1").set(1)
    snapshots = Snapshots(registry, {"device": "d"})
    snapshots.take(1.0)
    gauge.remove("1")
    gauge.labels("2").set(1)
    values = {labels["version"]: raw for labels, raw, _ in series(snapshots.take(2.0).body)}
    assert values == {"1": STALE, "2": struct.pack("<d", 1.0)}
    assert STALE.hex() == "020000000000f07f"
    assert [labels["version"] for labels, _, _ in series(snapshots.take(3.0).body)] == ["2"]

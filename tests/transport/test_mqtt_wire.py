"""Bytes of MQTT: whatever comes, there are packets or one kind of refusal, and memory stays bounded."""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.transport import mqtt_wire as wire
from edge_agent.transport.mqtt_wire import Malformed, Packet, Parser

MOST = 1 << 20
STRINGS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)


def packets(parser: Parser, pieces: list[bytes]) -> list[Packet]:
    return [packet for piece in pieces for packet in parser.feed(piece)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(
    topic=STRINGS,
    payload=st.binary(max_size=300),
    packet_id=st.integers(0, 65535),
    retain=st.booleans(),
    response=STRINGS,
    correlation=st.binary(max_size=300),
    expiry=st.integers(0, (1 << 32) - 1),
    user=st.lists(st.tuples(STRINGS, STRINGS), max_size=3),
    v5=st.booleans(),
    places=st.lists(st.integers(0, 1000), max_size=6),
)
def test_a_message_is_read_as_it_was_written_however_it_is_cut(
    topic: str,
    payload: bytes,
    packet_id: int,
    retain: bool,
    response: str,
    correlation: bytes,
    expiry: int,
    user: list[tuple[str, str]],
    v5: bool,
    places: list[int],
) -> None:
    properties = wire.bytes_property(wire.RESPONSE_TOPIC, response.encode())
    properties += wire.bytes_property(wire.CORRELATION, correlation)
    properties += wire.number_property(wire.EXPIRY, expiry)
    properties += b"".join(wire.user_property(*pair) for pair in user)
    data = wire.publish(
        topic, payload, packet_id=packet_id, retain=retain, properties=properties if v5 else None
    )
    one, other = packets(Parser(MOST), cut(data + data, places))
    assert one == other
    message = wire.read_message(one, v5)
    assert (message.topic, message.payload, message.length) == (topic, payload, len(payload))
    assert (message.packet_id, message.qos, message.retain) == (packet_id, int(packet_id > 0), retain)
    assert message.problem is None
    if v5:
        assert (message.response_topic, message.correlation) == (response, correlation)
        assert message.expiry == expiry
        assert [(name.decode(), value.decode()) for name, value in message.user] == user


def test_every_packet_comes_with_its_last_byte_wherever_it_is_cut() -> None:
    messages = [
        wire.publish("a", b"x" * size, packet_id=0, retain=False, properties=None) for size in (30, 0, 9)
    ]
    ends = list(itertools.accumulate(map(len, messages)))
    data = b"".join(messages)
    for places in itertools.combinations(range(1, len(data)), 3):
        parser, fed, seen = Parser(MOST), 0, 0
        for piece in cut(data, list(places)):
            fed += len(piece)
            seen += len(parser.feed(piece))
            assert seen == sum(end <= fed for end in ends), places


@given(data=st.binary(max_size=400), places=st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_give_the_same_however_they_are_cut(data: bytes, places: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[Packet], bool]:
        parser, found = Parser(MOST), []
        try:
            for piece in pieces:
                found += parser.feed(piece)
        except Malformed:
            return [], True
        return found, False

    assert outcome([data]) == outcome(cut(data, places))


@given(first=st.integers(0, 255), body=st.binary(max_size=200), more=st.integers(0, 9), v5=st.booleans())
def test_any_packet_is_read_or_malformed(first: int, body: bytes, more: int, v5: bool) -> None:
    for read in (
        lambda: wire.read_message(Packet(first, body, len(body) + more), v5),
        lambda: wire.read_connack(body, v5),
        lambda: wire.read_puback(body),
        lambda: wire.read_suback(body, v5),
        lambda: wire.read_disconnect(body),
    ):
        with contextlib.suppress(Malformed):
            read()


def test_of_a_message_over_the_limit_only_the_beginning_is_kept() -> None:
    properties = wire.bytes_property(wire.RESPONSE_TOPIC, b"edge/a")
    size = 40 << 20
    begin = wire.publish("edge/b", b"x" * (1 << 21), packet_id=7, retain=False, properties=properties)
    head = begin[5:]  # after its own length, of four bytes
    data = bytes((0x32,)) + wire.variable(len(head) - (1 << 21) + size) + head
    parser, found, fed = Parser(MOST), [], 1 << 21
    tracemalloc.start()
    try:
        found += parser.feed(data)
        while fed < size:
            found += parser.feed(b"y" * (1 << 18))
            fed += 1 << 18
        found += parser.feed(wire.PINGREQ_PACKET)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    long, after = found
    message = wire.read_message(long, True)
    assert (message.packet_id, message.response_topic) == (7, "edge/a")
    assert (message.length, message.payload) == (size, b"")
    assert after == Packet(0xC0, b"", 0)
    assert peak < 8 << 20


def test_a_packet_over_the_limit_that_is_no_message_is_malformed() -> None:
    with pytest.raises(Malformed, match="a packet of 268435455 bytes"):
        Parser(MOST).feed(b"\x90\xff\xff\xff\x7f")


def test_a_length_that_does_not_end_is_malformed() -> None:
    parser = Parser(MOST)
    assert parser.feed(b"\x30\xff\xff") == []
    with pytest.raises(Malformed, match="more than four bytes"):
        parser.feed(b"\xff\xff")


@pytest.mark.parametrize("topic", [b"\xff\xfe", b"edge/\xed\xa0\x80"])
def test_text_that_is_not_utf8_is_a_problem_of_the_message(topic: bytes) -> None:
    properties = wire.bytes_property(wire.RESPONSE_TOPIC, topic)
    data = wire.publish("edge/b", b"", packet_id=1, retain=False, properties=properties)
    (packet,) = Parser(MOST).feed(data)
    message = wire.read_message(packet, True)
    assert (message.problem, message.response_topic) == ("response topic: not UTF-8", None)
    body = wire.counted(topic) + b"\0\1\0"
    assert wire.read_message(Packet(0x32, body, len(body)), True).problem == "topic: not UTF-8"

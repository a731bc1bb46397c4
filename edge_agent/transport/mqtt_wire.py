"""MQTT 5 and 3.1.1 on the wire: packets to bytes and back, as far as a client of QoS 0 and 1 goes.

Invariants:

- reading is total: any bytes give packets, a wish for more bytes, or ``Malformed``, and nothing else;
- of one packet no more than ``most`` bytes are ever kept. What follows in a longer message is counted and
  dropped, so that it can be acknowledged and refused; any other longer packet is ``Malformed``;
- what is wrong inside a message, and not with the packet around it, is told in ``problem``: to end the
  connection for it would bring it again, for ever.

Sources: https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html sections 2 and 3, and the same of 3.1.1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
SUBACK: Final = 0x90
PINGRESP: Final = 0xD0
DISCONNECT: Final = 0xE0
PINGREQ_PACKET: Final = b"\xc0\x00"
DISCONNECT_PACKET: Final = b"\xe0\x00"

# Identifiers of properties, section 2.2.2.2.
PAYLOAD_FORMAT: Final = 0x01
EXPIRY: Final = 0x02
CONTENT_TYPE: Final = 0x03
RESPONSE_TOPIC: Final = 0x08
CORRELATION: Final = 0x09
SESSION_EXPIRY: Final = 0x11
SERVER_KEEP_ALIVE: Final = 0x13
REASON_STRING: Final = 0x1F
RECEIVE_MAXIMUM: Final = 0x21
TOPIC_ALIAS: Final = 0x23
MAXIMUM_QOS: Final = 0x24
RETAIN_AVAILABLE: Final = 0x25
USER: Final = 0x26
MAXIMUM_PACKET_SIZE: Final = 0x27

_BYTES: Final = {  # of fixed-width properties
    0x01: 1, 0x02: 4, 0x11: 4, 0x13: 2, 0x17: 1, 0x18: 4, 0x19: 1, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1,
    0x25: 1, 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1,
}  # fmt: skip
_COUNTED: Final = frozenset({0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F})  # two bytes of length
_SUBSCRIPTION: Final = 0x0B  # a variable byte integer

_HEAD: Final = 132 << 10  # of an over-long message: two strings at their longest, and some
LONGEST: Final = 268_435_455  # four bytes of seven bits

REASONS: Final = {
    # What a broker of 3.1.1 answers to a connection.
    0x01: "unsupported protocol version",
    0x02: "client identifier rejected",
    0x03: "server unavailable",
    0x04: "bad user name or password",
    0x05: "not authorized",
    # MQTT 5, section 2.4.
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "session taken over by another client of this identifier",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x94: "topic alias invalid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "subscription identifiers not supported",
    0xA2: "wildcard subscriptions not supported",
}


class Malformed(Exception):
    """These bytes are not MQTT, or not what may come from a broker here."""


class Packet(NamedTuple):
    """One control packet; of an over-long message the body is only its beginning."""

    first: int  # type and flags
    body: bytes
    length: int  # of the body, as announced


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says, retained, when this client is gone."""

    topic: str
    payload: bytes


@dataclass(slots=True, eq=False)
class Message:
    """An application message as it came."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    again: bool  # the DUP flag
    packet_id: int  # 0 without QoS
    length: int  # of the payload, also where it was dropped for being too long
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry: int | None = None  # seconds
    user: Sequence[tuple[bytes, bytes]] = ()
    problem: str | None = None


class Connack(NamedTuple):
    """The broker's answer to a connection."""

    session_present: bool
    code: int
    properties: dict[int, int | bytes]


class Parser:
    """Cuts a stream of bytes into packets, of which it keeps at most ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self._most = max(most, _HEAD)
        self._buffer = bytearray()
        self._needed = 2  # bytes in the buffer before it is worth looking again
        self._long: Packet | None = None  # an over-long message, of which ``_rest`` bytes are to come
        self._rest = 0

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that these bytes complete.

        Raises:
            Malformed: there is no reading on.
        """
        packets: list[Packet] = []
        if self._long is not None:
            dropped = min(self._rest, len(data))
            self._rest -= dropped
            data = data[dropped:]
            if self._rest:
                return packets
            packets.append(self._long)
            self._long = None
        source: bytes | bytearray = data
        if self._buffer:
            source = self._buffer
            source += data
            if len(source) < self._needed:
                return packets
        self._needed = 2
        at, end = 0, len(source)
        while end - at >= 2:
            header = _length(source, at + 1, end)
            if header is None:
                self._needed = end - at + 1
                break
            length, start = header
            if length > self._most:
                if source[at] & 0xF0 != PUBLISH:
                    raise Malformed(
                        f"a packet of {length} bytes, none but a message may have more than {self._most}"
                    )
                if end - start < _HEAD:
                    self._needed = start - at + _HEAD
                    break
                packet = Packet(source[at], bytes(source[start : start + _HEAD]), length)
                at = min(start + length, end)
                self._rest = start + length - at
                if self._rest:
                    self._long = packet
                    break
                packets.append(packet)
                continue
            if end - start < length:
                self._needed = start - at + length
                break
            packets.append(Packet(source[at], bytes(source[start : start + length]), length))
            at = start + length
        if at or source is not self._buffer:
            self._buffer = bytearray(source[at:])
        return packets


def _length(source: bytes | bytearray, at: int, end: int) -> tuple[int, int] | None:
    """A variable byte integer and where it ends; None: more bytes are wanted."""
    value = shift = 0
    while at < end:
        byte = source[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 21:
            raise Malformed("a length of more than four bytes")
    return None


# -- reading -------------------------------------------------------------------------------------------------


def read_message(packet: Packet, v5: bool) -> Message:
    """A PUBLISH.

    Raises:
        Malformed: it cannot be one.
    """
    first, body, length = packet
    qos = first >> 1 & 3
    if qos > 1:
        raise Malformed(f"a message of QoS {qos}, at most 1 was asked for")
    name, at = _counted(body, 0)
    packet_id = 0
    if qos:
        packet_id, at = _number(body, at, 2), at + 2
        if not packet_id:
            raise Malformed("a message of QoS 1 without a packet identifier")
    message = Message("", b"", qos, bool(first & 1), bool(first & 8), packet_id, 0)
    cut = length > len(body)
    if v5:
        try:
            at = _take_properties(message, body, at)
        except Malformed:
            if not cut:
                raise
            at = len(body)  # they are longer than what was kept
    message.length = length - at
    if not cut:
        message.payload = body[at:]
    try:
        message.topic = name.decode()
    except UnicodeDecodeError:
        message.problem = "topic: not UTF-8"
    return message


def _take_properties(message: Message, body: bytes, at: int) -> int:
    if at < len(body) and body[at] == 0:
        return at + 1
    properties, user, at = read_properties(body, at)
    if TOPIC_ALIAS in properties:
        raise Malformed("a topic alias, though none is allowed")
    message.user = user
    expiry = properties.get(EXPIRY)
    if isinstance(expiry, int):
        message.expiry = expiry
    correlation = properties.get(CORRELATION)
    if isinstance(correlation, bytes):
        message.correlation = correlation
    response = properties.get(RESPONSE_TOPIC)
    if isinstance(response, bytes):
        try:
            message.response_topic = response.decode()
        except UnicodeDecodeError:
            message.problem = "response topic: not UTF-8"
    return at


def read_properties(body: bytes, at: int) -> tuple[dict[int, int | bytes], list[tuple[bytes, bytes]], int]:
    """Properties by identifier, user properties, and where they end.

    Raises:
        Malformed: an identifier that does not exist, or one that goes beyond the end.
    """
    header = _length(body, at, len(body))
    if header is None:
        raise Malformed("properties without a length")
    length, at = header
    end = at + length
    if end > len(body):
        raise Malformed("properties beyond the end of the packet")
    found: dict[int, int | bytes] = {}
    user: list[tuple[bytes, bytes]] = []
    while at < end:
        identifier = body[at]
        at += 1
        if identifier == USER:
            name, at = _counted(body, at)
            value, at = _counted(body, at)
            user.append((name, value))
        elif identifier in _COUNTED:
            found[identifier], at = _counted(body, at)
        elif identifier in _BYTES:
            found[identifier] = _number(body, at, _BYTES[identifier])
            at += _BYTES[identifier]
        elif identifier == _SUBSCRIPTION:
            number = _length(body, at, end)
            if number is None:
                raise Malformed("a subscription identifier beyond the end of the packet")
            at = number[1]
        else:
            raise Malformed(f"an unknown property 0x{identifier:02x}")
    if at != end:
        raise Malformed("a property beyond the end of the properties")
    return found, user, at


def read_connack(body: bytes, v5: bool) -> Connack:
    """The broker's answer to a connection.

    Raises:
        Malformed: it cannot be one.
    """
    if len(body) < 2:
        raise Malformed("an answer to the connection of less than two bytes")
    # A broker that does not speak MQTT 5 refuses it in two bytes.
    properties = read_properties(body, 2)[0] if v5 and len(body) > 2 else {}
    return Connack(bool(body[0] & 1), body[1], properties)


def read_puback(body: bytes) -> tuple[int, int]:
    """Packet identifier and reason code.

    Raises:
        Malformed: it cannot be one.
    """
    return _number(body, 0, 2), body[2] if len(body) > 2 else 0


def read_suback(body: bytes, v5: bool) -> tuple[int, bytes]:
    """Packet identifier and one reason code for each subscription.

    Raises:
        Malformed: it cannot be one.
    """
    at = read_properties(body, 2)[2] if v5 else 2
    return _number(body, 0, 2), body[at:]


def read_disconnect(body: bytes) -> str:
    """Why the broker ends the connection.

    Raises:
        Malformed: it cannot be one.
    """
    reason = reason_of(body[0]) if body else "normal disconnection"
    said = read_properties(body, 1)[0].get(REASON_STRING) if len(body) > 1 else None
    return f"{reason} ({said.decode(errors='replace')})" if isinstance(said, bytes) else reason


def reason_of(code: int) -> str:
    """A reason code in words."""
    return REASONS.get(code, f"reason 0x{code:02x}")


def _counted(body: bytes, at: int) -> tuple[bytes, int]:
    """Bytes after their length in two bytes, and where they end."""
    start = at + 2
    end = start + _number(body, at, 2)
    if end > len(body):
        raise Malformed("a string beyond the end of the packet")
    return body[start:end], end


def _number(body: bytes, at: int, width: int) -> int:
    value = body[at : at + width]
    if len(value) < width:
        raise Malformed("a number beyond the end of the packet")
    return int.from_bytes(value)


# -- writing -------------------------------------------------------------------------------------------------


def counted(data: bytes) -> bytes:
    """Bytes after their length in two bytes.

    Raises:
        ValueError: more than 65,535 of them.
    """
    if len(data) > 0xFFFF:
        raise ValueError(f"{len(data)} bytes where MQTT has room for 65535")
    return struct.pack("!H", len(data)) + data


def variable(value: int) -> bytes:
    """A variable byte integer."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while True:
        value, byte = value >> 7, value & 127
        out.append(byte | 0x80 if value else byte)
        if not value:
            return bytes(out)


def number_property(identifier: int, value: int) -> bytes:
    """A property of fixed width."""
    return bytes((identifier,)) + value.to_bytes(_BYTES[identifier])


def bytes_property(identifier: int, value: bytes) -> bytes:
    """A property that is text or binary data."""
    return bytes((identifier,)) + counted(value)


def user_property(name: str, value: str) -> bytes:
    """One user property."""
    return bytes((USER,)) + counted(name.encode()) + counted(value.encode())


def connect(
    identifier: str,
    v5: bool,
    *,
    keepalive: int,
    clean: bool,
    username: str | None,
    password: str | None,
    will: Will,
    properties: bytes,
) -> bytes:
    """A CONNECT; ``properties`` is left out for 3.1.1."""
    # Clean start; a will of QoS 1 that is retained.
    flags = 2 * clean | 0x04 | 0x08 | 0x20 | 0x80 * (username is not None) | 0x40 * (password is not None)
    body = [counted(b"MQTT"), bytes((5 if v5 else 4, flags)), struct.pack("!H", keepalive)]
    if v5:
        body += [variable(len(properties)), properties]
    body.append(counted(identifier.encode()))
    if v5:
        body.append(b"\0")  # no properties of the will
    body += [counted(will.topic.encode()), counted(will.payload)]
    body += [counted(text.encode()) for text in (username, password) if text is not None]
    return _packet(0x10, b"".join(body))


def subscribe(packet_id: int, topics: Sequence[str], v5: bool) -> bytes:
    """A SUBSCRIBE at QoS 1."""
    body = struct.pack("!H", packet_id) + (b"\0" if v5 else b"")
    return _packet(0x82, body + b"".join(counted(topic.encode()) + b"\1" for topic in topics))


def publish(topic: str, payload: bytes, *, packet_id: int, retain: bool, properties: bytes | None) -> bytes:
    """A PUBLISH, of QoS 1 with a packet identifier, else of QoS 0; ``properties`` is None for 3.1.1."""
    head = counted(topic.encode())
    first = PUBLISH | retain
    if packet_id:
        first |= 2
        head += struct.pack("!H", packet_id)
    if properties is not None:
        head += variable(len(properties)) + properties
    return bytes((first,)) + variable(len(head) + len(payload)) + head + payload


def puback(packet_id: int) -> bytes:
    """A PUBACK that says: taken."""
    return struct.pack("!BBH", PUBACK, 2, packet_id)


def _packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + variable(len(body)) + body

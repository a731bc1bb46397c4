"""How documents become bytes and back, the same way everywhere.

- *Documents that cross programs* (manifest, assignments, golden, baseline) keep going when they meet a
  field they do not know, and refuse a format version or an enum value they do not know.
- *JSON we write is canonical*: sorted keys, two-space indent, one newline at the end. The same value is
  always the same bytes, so its digest can be its identity.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version

T = TypeVar("T")


def _decode_ours(expected: type, value: Any) -> Any:
    if expected is Digest or expected is Version:
        if not isinstance(value, str):
            raise ValueError(f"expected a string, got {type(value).__name__}")
        return expected(value)
    raise NotImplementedError(expected)


def _encode_ours(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    raise NotImplementedError(type(value))


def from_json(data: bytes, expected: type[T]) -> T:
    """Decode a JSON document.

    Raises:
        ValueError: not JSON, or not of this type; the message holds the path to the field.
    """
    try:
        return msgspec.json.decode(data, type=expected, dec_hook=_decode_ours)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def to_json(value: Any) -> bytes:
    """Encode to canonical JSON bytes."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_encode_ours, order="sorted")) + b"\n"


def from_msgpack(data: bytes, expected: type[T]) -> T:
    """Decode a MessagePack document.

    Raises:
        ValueError: not MessagePack, or not of this type; the message holds the path to the field.
    """
    try:
        return msgspec.msgpack.decode(data, type=expected, dec_hook=_decode_ours)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def to_msgpack(value: Any) -> bytes:
    """Encode to MessagePack bytes with sorted keys, the same bytes for the same value."""
    return msgspec.msgpack.encode(value, enc_hook=_encode_ours, order="sorted")


def to_builtins(value: Any) -> Any:
    """Plain dicts, lists, strings and numbers of a document, for YAML and for ``--json``."""
    return msgspec.to_builtins(value, enc_hook=_encode_ours)

"""What a model file asks for beside itself, found out before onnxruntime opens it.

Two things in an ONNX file reach out of it: tensors whose data lie in another file (``external_data``), and
operators of a domain that only a custom library implements. The first may name members of its own bundle and
nothing else, by a plain name; the second is refused. Functions that the model itself defines are part of it,
and no custom operators.

A device has no ``onnx`` package, so this walks the protobuf wire format itself, along the few fields of
``onnx.proto`` that lead to tensors and operators (https://protobuf.dev/programming-guides/encoding/).
Whatever is not such a field is skipped by its length, so the weights are never read.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from edge_agent.errors import EngineError, UpdateRejected

DOMAINS: Final = frozenset(
    {
        "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training",
        "com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental", "com.ms.internal.nhwc",
    }
)  # fmt: skip
"""The operator sets that onnxruntime itself brings."""

_DEEPEST: Final = 64  # graphs in attributes of graphs; a model has two or three
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Message -> field -> message: the way to every tensor and every node (onnx/onnx.proto).
_WAYS: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Training": {1: "Graph", 2: "Graph"},
    "Tensor": {13: "Entry"},
}
_DOMAIN: Final = {"Node": 7, "Function": 10}
_KEY, _VALUE = 1, 2  # of an Entry

_Span = tuple[int, int]


def check_model(path: Path, members: Collection[str]) -> None:
    """Refuse a model that reaches out of its bundle.

    Args:
        path: the ONNX file, verified already.
        members: the names that external data may have.

    Raises:
        UpdateRejected: ``reason`` is ``external_data`` or ``custom_operators``.
        EngineError: it is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data)
            walk.message("Model", (0, len(data)), 0)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path.name} is no ONNX model, cannot load it: {error}") from error
    for location in walk.locations:
        if location not in members:
            raise UpdateRejected(
                f"{path.name} keeps weights in {location[:80]!r}, which is no member of its bundle",
                reason="external_data",
            )
    custom = walk.domains - DOMAINS - walk.functions
    if custom:
        raise UpdateRejected(
            f"{path.name} needs the operator set {min(custom)[:80]!r}, which is not a part of onnxruntime; "
            "custom operator libraries are not loaded",
            reason="custom_operators",
        )


class _Walk:
    """What was found on the way through the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.locations: set[str] = set()
        self.domains: set[str] = set()
        self.functions: set[str] = set()  # domains of functions that the model defines itself

    def message(self, kind: str, span: _Span, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        ways = _WAYS[kind]
        for number, place in self._fields(span):
            if number in ways and ways[number] == "Entry":
                self._entry(place)
            elif number in ways:
                self.message(ways[number], place, depth + 1)
            elif number == _DOMAIN.get(kind):
                (self.domains if kind == "Node" else self.functions).add(self._text(place))

    def _entry(self, span: _Span) -> None:
        """A key and its value; of a field that comes twice the last one counts, so every one is looked at."""
        fields = [(number, self._text(place)) for number, place in self._fields(span)]
        if (_KEY, "location") in fields:
            self.locations.update(text for number, text in fields if number == _VALUE)

    def _text(self, span: _Span) -> str:
        return self._data[span[0] : span[1]].decode("utf-8", "replace")

    def _fields(self, span: _Span) -> Iterator[tuple[int, _Span]]:
        """The length-delimited fields of a message; the others are skipped."""
        at, end = span
        while at < end:
            tag, at = self._varint(at, end)
            wire = tag & 7
            if wire == _BYTES:
                length, at = self._varint(at, end)
                if at + length > end:
                    raise ValueError("a field is longer than what holds it")
                yield tag >> 3, (at, at + length)
                at += length
            elif wire == _VARINT:
                _, at = self._varint(at, end)
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            else:
                raise ValueError(f"wire type {wire}")
        if at != end:
            raise ValueError("a field is longer than what holds it")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise ValueError("it ends in the middle of a number")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise ValueError("a number of more than ten bytes")

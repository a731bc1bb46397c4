"""JSON arrays of numbers, decoded straight into numpy.

Invariant: what comes out is what msgspec and ``numpy.array`` would have made of the same bytes; whatever is
not plainly a row of numbers, or a list of equal rows, is None, and the caller decodes it the long way, which
has the words for what is wrong, and takes ``null``.

pysimdjson (https://github.com/TkTech/pysimdjson) writes the numbers of an array into one buffer: no Python
float is ever made, and 512 of them take a quarter of the time. Without it everything goes the long way.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

_PARSER: Any
try:
    import simdjson

    _PARSER = simdjson.Parser()
except ImportError:  # no wheel for this machine: slower, not different
    _PARSER = None

Numbers = npt.NDArray[np.float64]

# Bytes. The parser keeps up to 14 times what it was ever given.
_MOST: Final = -1 if _PARSER is None else 256 << 10
_REFUSED: Final = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
)  # whatever it does not take


def only_field(body: bytes, name: str) -> Numbers | None:
    """The row (width,), or rows (n, width), of a JSON object that has this field and no other; else None."""
    if len(body) > _MOST:
        return None
    try:
        document = _PARSER.parse(body)
        return _rows(document[name], body) if len(document) == 1 else None
    except _REFUSED:
        return None


class Named(NamedTuple):
    """The one tensor of a request, its numbers flat."""

    name: str
    shape: list[int]
    datatype: str
    numbers: Numbers


def only_input(body: bytes) -> Named | None:
    """The tensor of ``{"inputs": [{"name", "shape", "datatype", "data"}]}``, data flat; else None.

    One pass over the body, where looking at it piece by piece takes two.
    """
    if len(body) > _MOST:
        return None
    try:
        document = _PARSER.parse(body)
        inputs = document["inputs"]
        tensor = inputs[0]
        # Four fields and these four: none is there twice.
        if len(document) != 1 or len(inputs) != 1 or len(tensor) != 4:
            return None
        name, datatype, shape = tensor["name"], tensor["datatype"], tensor["shape"].as_list()
        if type(name) is not str or type(datatype) is not str or any(type(size) is not int for size in shape):
            return None
        values: Numbers = np.frombuffer(tensor["data"].as_buffer(of_type="d"))
    except _REFUSED:
        return None
    # A bracket each of inputs, shape and data: more are names that look like data, or nested data.
    return Named(name, shape, datatype, values) if values.size and body.count(b"[") == 3 else None


def rows(data: bytes) -> Numbers | None:
    """The row (width,), or rows (n, width), of a JSON array; else None."""
    if len(data) > _MOST:
        return None
    try:
        return _rows(_PARSER.parse(data), data)
    except _REFUSED:
        return None


def _rows(array: Any, data: bytes) -> Numbers | None:
    values: Numbers = np.frombuffer(array.as_buffer(of_type="d"))
    if not values.size:
        return None
    # The buffer is flat whatever the form was: brackets and lengths tell.
    if data.find(b"[", data.find(b"[") + 1) < 0:
        return values
    height = len(array)
    if data.count(b"[") != height + 1:
        return None
    width = len(array[0])
    if len(values) != height * width or any(len(row) != width for row in array):
        return None
    return values.reshape(height, width)

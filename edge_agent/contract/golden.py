"""Golden vectors: inputs and the outputs that the model must give for them on every device.

A device runs them before it takes a model live (``edge_agent.update``). Static INT8 graphs give the same
bits on every CPU; everything with float arithmetic in it agrees within a tolerance only, so the bundle says
which class it is in.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.errors import BadMember
from edge_agent.contract.manifest import Datatype

FILE_NAME: Final = "golden.msgpack"
FORMAT: Final = 1


class Agreement(enum.Enum):
    """How closely the outputs must agree."""

    EXACT = "exact"
    TOLERANCE = "tolerance"


class Array(msgspec.Struct, frozen=True):
    """A tensor: row-major, little-endian elements."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: bytes


class Golden(msgspec.Struct, frozen=True):
    """The self-test of a bundle. The first dimension of every array is the vector.

    An output agrees if ``|got - expected| <= absolute + relative * |expected|`` (numpy.allclose).
    ``latency_budget`` is the longest median time of one row, in seconds; 0 means none.
    """

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    agreement: Agreement = Agreement.TOLERANCE
    absolute: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    relative: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    latency_budget: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    format: int = FORMAT


def parse(data: bytes) -> Golden:
    """Read ``golden.msgpack``.

    Raises:
        BadMember: unreadable, or of an unknown format version.
    """
    try:
        golden = wire.from_msgpack(data, Golden)
    except ValueError as error:
        raise BadMember(f"{FILE_NAME}: {error}") from error
    if golden.format != FORMAT:
        raise BadMember(f"{FILE_NAME}: format version {golden.format}, this program reads {FORMAT}")
    return golden


def encode(golden: Golden) -> bytes:
    """The bytes of ``golden.msgpack``."""
    return wire.to_msgpack(golden)

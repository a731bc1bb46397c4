"""Transfers: the shorter ways in which members of a release may travel. Signed, as the manifest is.

A *parcel* is a zstd frame (RFC 8878) among the blobs: a member compressed, or the difference to a member of
an earlier release, whose bytes are then the frame's raw-content dictionary (zstd's ``--patch-from``). A
device that does not understand parcels, or lacks the base, fetches the member as it is; in every case the
member is worth what its own digest in the manifest says, however it came.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadManifest
from edge_agent.contract.manifest import MAX_MEMBERS

FORMAT: Final = 1
MAX_BYTES: Final = 1 << 18
MAX_PARCELS: Final = 16  # of one member

MAX_MEMORY: Final = 64 << 20
"""Bytes of a difference's base and result together, which a device holds while it applies it."""


class Parcel(msgspec.Struct, frozen=True, omit_defaults=True):
    """One way for one member: a blob to fetch instead, and what it must be put together with."""

    digest: Digest  # of the frame
    size: Annotated[int, msgspec.Meta(ge=1)]  # bytes of the frame
    base: Digest | None = None  # the member that the difference is to; None: only compressed


class Transfers(msgspec.Struct, frozen=True):
    """The parcels of a release, by the name of the member."""

    members: dict[str, tuple[Parcel, ...]] = {}
    format: int = FORMAT


def parse(data: bytes) -> Transfers:
    """Read a transfers document.

    Raises:
        BadManifest: unreadable, of an unknown format version, or too large.
    """
    if len(data) > MAX_BYTES:
        raise BadManifest(f"transfers: {len(data)} bytes, expected at most {MAX_BYTES}")
    try:
        transfers = wire.from_json(data, Transfers)
    except ValueError as error:
        raise BadManifest(f"transfers: {error}") from error
    if transfers.format != FORMAT:
        raise BadManifest(
            f"transfers: format version {transfers.format}, this program reads {FORMAT}: update it"
        )
    if len(transfers.members) > MAX_MEMBERS or any(len(p) > MAX_PARCELS for p in transfers.members.values()):
        raise BadManifest(f"transfers: more than {MAX_MEMBERS} members or {MAX_PARCELS} parcels of one")
    return transfers


def encode(transfers: Transfers) -> bytes:
    """The document's canonical bytes."""
    return wire.to_json(transfers)

"""Parcels on the device: a zstd frame, and perhaps a member that is here already, back into a member.

Invariants:

- nothing larger than the member is ever written, whatever the frame says about itself;
- memory is bounded by base and result together (``transfers.MAX_MEMORY``), or by the window for a frame
  without a base;
- the caller compares the result with the member's digest: a wrong base costs a download, not more.

Where the ``zstandard`` package is not installed, members are fetched whole.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Final

from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Member
from edge_agent.contract.transfers import MAX_MEMORY
from edge_agent.store.fs import explained

_CHUNK: Final = 1 << 18  # bytes
_WINDOW: Final = 1 << 23  # bytes; what fleet/parcels.py compresses with


class BadParcel(Exception):
    """The frame and its base do not give the member."""


def can_open() -> bool:
    """Whether parcels can be opened on this machine."""
    return importlib.util.find_spec("zstandard") is not None


def fits(base: Path | None, member: Member) -> bool:
    """Whether the base is here, and both together are not too much for the memory."""
    if base is None:
        return True
    try:
        return base.stat().st_size + member.size <= MAX_MEMORY
    except OSError:
        return False


def open_parcel(frame: Path, base: Path | None, member: Member, target: Path) -> None:
    """Write the member that ``frame`` holds to ``target``, and prove it.

    Raises:
        BadParcel: the result is not the member; ``target`` holds nothing of use.
        StoreError: the disk refused.
    """
    import zstandard

    try:
        if base is None:
            tool = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        else:
            with explained("read", base):
                content = base.read_bytes()
            dictionary = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            del content  # the dictionary has a copy
            tool = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=2 * MAX_MEMORY)
        digest, size = hashlib.sha256(), 0
        with explained("write", target), frame.open("rb") as source, target.open("wb") as out:
            for chunk in tool.read_to_iter(source, read_size=_CHUNK, write_size=_CHUNK):
                size += len(chunk)
                if size > member.size:
                    break
                digest.update(chunk)
                out.write(chunk)
    except zstandard.ZstdError as error:
        raise BadParcel(str(error)) from error
    if size != member.size or Digest("sha256:" + digest.hexdigest()) != member.digest:
        raise BadParcel(f"it gives {size} bytes that are not {member.digest.short}")

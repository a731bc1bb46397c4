"""Fetching members: by digest, resumed where a run was cut off, never more bytes than the manifest says.

Where the release has a shorter way for a member (``contract.transfers``) that one is taken: compressed, or
the difference to a member that is on the device. Whatever is wrong with it, the member is then fetched whole.

A half download lies under its digest in a folder that survives restarts. It is hashed from the start again
before it is used: what lay on the disk is trusted no more than what comes from the network.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from edge_agent.contract.manifest import Manifest, Member
from edge_agent.contract.repository import blob_path
from edge_agent.contract.transfers import Parcel, Transfers
from edge_agent.store.fs import explained
from edge_agent.update.parcel import BadParcel, fits, open_parcel
from edge_agent.update.source import Source, SourceFailed

logger = logging.getLogger(__name__)

_CHUNK: Final = 1 << 20  # bytes


def fetch_members(
    source: Source,
    manifest: Manifest,
    names: Iterable[str],
    folder: Path,
    partial: Path,
    progress: Callable[[int], None],
    transfers: Transfers | None = None,
    blobs: Path | None = None,
    spare: int | None = None,
) -> int:
    """Put members into ``folder``, each proven by its digest; returns the bytes that were moved.

    Args:
        source: where blobs come from.
        manifest: names and digests.
        names: the members to bring.
        folder: where they go.
        partial: half downloads, kept between runs.
        progress: told the bytes of the member that is under way.
        transfers: shorter ways, if there are any.
        blobs: the members that are on the device, by digest.
        spare: bytes of the disk that a parcel may take while its member is put together; where that is too
            little, the member is fetched whole. None: no limit.

    Raises:
        SourceFailed: unreachable, or a member is truncated, too long or altered (``blob_mismatch``).
        StoreError: the disk refused.
    """
    moved = 0
    for name in names:
        member = manifest.members[name]
        half = partial / member.digest.hex
        parcel, base = _shortest(transfers, name, member, half, blobs, spare)
        if parcel is not None:
            frame, target = partial / parcel.digest.hex, folder / name
            try:
                moved += _bring(source, name, Member(parcel.digest, parcel.size), frame, progress)
                open_parcel(frame, base, member, target)
            except BadParcel as error:
                logger.warning("member %s: its parcel cannot be used (%s); it is fetched whole", name, error)
            except SourceFailed as failed:
                if failed.reason not in ("not_found", "blob_mismatch"):
                    raise
                logger.warning("member %s: its parcel is not there (%s); it is fetched whole", name, failed)
            else:
                _forget(frame)
                continue
            _forget(frame)
            _forget(target)  # half of it may be there, and the whole needs the room
        moved += _bring(source, name, member, half, progress)
        with explained("store", folder / name):
            half.replace(folder / name)
    return moved


def _forget(path: Path) -> None:
    with explained("remove", path):
        path.unlink(missing_ok=True)


def _shortest(
    transfers: Transfers | None,
    name: str,
    member: Member,
    half: Path,
    blobs: Path | None,
    spare: int | None,
) -> tuple[Parcel | None, Path | None]:
    """The smallest parcel that can be opened here and is less than what is left to fetch; and its base.

    Parcel and member are on the disk together for a moment: ``spare`` is what there is for the parcel.
    """
    left = member.size - (half.stat().st_size if half.exists() else 0)
    for parcel in sorted(transfers.members.get(name, ()) if transfers else (), key=lambda one: one.size):
        if parcel.size >= left or (spare is not None and parcel.size > spare):
            break
        base = blobs / parcel.base.hex if parcel.base and blobs else None
        if (parcel.base is None or base is not None) and fits(base, member):
            return parcel, base
    return None, None


def _bring(source: Source, name: str, member: Member, half: Path, progress: Callable[[int], None]) -> int:
    """Fetch a blob into ``half``; what was there from last time is used as far as it is right."""
    try:
        return _fetch(source, name, member, half, progress)
    except _Mismatch as mismatch:
        with explained("remove", half):
            half.unlink()
        if not mismatch.resumed:
            raise
        # The half from last time may have been the bad part: once more, from the start.
        return _fetch(source, name, member, half, progress)


class _Mismatch(SourceFailed):
    def __init__(self, message: str, resumed: bool) -> None:
        super().__init__(message, reason="blob_mismatch")
        self.resumed = resumed


def _fetch(source: Source, name: str, member: Member, half: Path, progress: Callable[[int], None]) -> int:
    digest = hashlib.sha256()
    moved = 0
    with explained("write", half), half.open("a+b") as file:
        file.seek(0)
        have = 0
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            have += len(chunk)
        resumed = 0 < have < member.size
        if have and not resumed and (have != member.size or digest.hexdigest() != member.digest.hex):
            file.truncate(0)
            have, digest = 0, hashlib.sha256()
        if have < member.size or member.size == 0:
            with source.stream(blob_path(member.digest), have) as stream:
                if stream.offset != have:
                    file.truncate(0)
                    have, digest, resumed = 0, hashlib.sha256(), False
                for chunk in stream.chunks:
                    have += len(chunk)
                    moved += len(chunk)
                    if have > member.size:
                        break
                    file.write(chunk)
                    digest.update(chunk)
                    progress(moved)
    if have < member.size:
        # Not a lie, only a cut: what came is kept for the next attempt.
        raise SourceFailed(
            f"member {name} ({member.digest.short}): {have} of {member.size} bytes came", reason="truncated"
        )
    if have > member.size or digest.hexdigest() != member.digest.hex:
        raise _Mismatch(f"member {name}: what the repository gave is not {member.digest.short}", resumed)
    return moved

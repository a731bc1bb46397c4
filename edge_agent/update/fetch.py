"""Fetching members: by digest, resumed where a run was cut off, never more bytes than the manifest says.

A half download lies under its digest in a folder that survives restarts. It is hashed from the start again
before it is used: what lay on the disk is trusted no more than what comes from the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from edge_agent.contract.manifest import Manifest, Member
from edge_agent.contract.repository import blob_path
from edge_agent.store.fs import explained
from edge_agent.update.source import Source, SourceFailed

_CHUNK: Final = 1 << 20  # bytes


def fetch_members(
    source: Source,
    manifest: Manifest,
    names: Iterable[str],
    folder: Path,
    partial: Path,
    progress: Callable[[int], None],
) -> int:
    """Put members into ``folder``, each proven by its digest; returns the bytes that were moved.

    Raises:
        SourceFailed: unreachable, or a member is truncated, too long or altered (``blob_mismatch``).
        StoreError: the disk refused.
    """
    moved = 0
    for name in names:
        member = manifest.members[name]
        half = partial / member.digest.hex
        try:
            moved += _fetch(source, name, member, half, progress)
        except _Mismatch as mismatch:
            with explained("remove", half):
                half.unlink()
            if not mismatch.resumed:
                raise
            # The half from last time may have been the bad part: once more, from the start.
            moved += _fetch(source, name, member, half, progress)
        with explained("store", folder / name):
            half.replace(folder / name)
    return moved


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

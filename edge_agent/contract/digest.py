"""Digests: the identity of every file and every bundle.

Holding a ``Digest`` means it is well formed. The text form is ``sha256:<hex>``, as OCI writes it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from edge_agent.contract.errors import BadDigest

_FORM = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK = 1 << 20  # bytes read at a time: memory stays flat for any file


class Digest(str):
    """A SHA-256 digest, ``sha256:<64 lower-case hex digits>``."""

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        """Check the form.

        Raises:
            BadDigest: not ``sha256:`` and 64 hex digits.
        """
        if not _FORM.fullmatch(text):
            raise BadDigest(f"digest {text[:80]!r}: expected sha256:<64 lower-case hex digits>")
        return super().__new__(cls, text)

    @property
    def hex(self) -> str:
        """The 64 hex digits alone: the file name in every content-addressed folder."""
        return self[7:]

    @property
    def short(self) -> str:
        """The first 12 hex digits, for people and log lines; never for comparing."""
        return self[7:19]

    @classmethod
    def of_bytes(cls, data: bytes) -> Digest:
        """The digest of ``data``."""
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Digest:
        """The digest of the file's content, read in pieces.

        Raises:
            OSError: the file cannot be read.
        """
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return cls("sha256:" + digest.hexdigest())

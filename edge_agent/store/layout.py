"""Where everything lies in the store.

::

    STORE/
      lock                              held (flock) by the one agent that may write
      blobs/sha256/<hex>                members of all releases, by digest, read-only
      releases/<hex>/                   one folder per release, named by its manifest's digest
        manifest.json
        <members>                       hard links to blobs
      models/<name>/
        current  -> ../../releases/<hex>    the release that answers; replaced by one rename
        previous -> ../../releases/<hex>    where a roll-back goes
        update.json                         the update machine's record (state.py)
      staging/                          unique folders being filled; swept at start
        partial/<hex>                   members half downloaded; survives a restart, so a download resumes
      tuf/                              trusted TUF metadata

Only ``current`` and ``previous`` decide what runs, and each is one atomic pointer to a whole release: model,
rules, baseline and golden vectors always change together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.contract.digest import Digest

CURRENT: Final = "current"
PREVIOUS: Final = "previous"
RECORD: Final = "update.json"
LASTING: Final = "lasting.json"  # what of the record must outlive its loss


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.root / "lock"

    @property
    def blobs(self) -> Path:
        """The folder of members by digest."""
        return self.root / "blobs" / "sha256"

    @property
    def releases(self) -> Path:
        """The folder of release folders."""
        return self.root / "releases"

    @property
    def models(self) -> Path:
        """The folder of models."""
        return self.root / "models"

    @property
    def staging(self) -> Path:
        """The folder of folders being filled."""
        return self.root / "staging"

    @property
    def partial(self) -> Path:
        """The folder of half-downloaded members."""
        return self.staging / "partial"

    @property
    def tuf(self) -> Path:
        """The folder of trusted TUF metadata."""
        return self.root / "tuf"

    def blob(self, digest: Digest) -> Path:
        """The file of a member."""
        return self.blobs / digest.hex

    def release(self, digest: Digest) -> Path:
        """The folder of a release."""
        return self.releases / digest.hex

    def model(self, name: str) -> Path:
        """The folder of a model."""
        return self.models / name

    @staticmethod
    def target(digest: Digest) -> Path:
        """What ``current`` and ``previous`` hold: relative, so that a store can be moved as a whole."""
        return Path("..", "..", "releases", digest.hex)

"""The release repository: a folder of static files that devices trust by signature, not by transport.

::

    metadata/                         TUF metadata (spec 1.0.34), consistent snapshots
      1.root.json 2.root.json ...     threshold of offline keys
      timestamp.json                  the one file a device polls
      N.snapshot.json
      N.targets.json                  offline key: which releases exist
      N.rollout.json                  online roll-out key, delegated "assignments/*" only: what runs where
    targets/
      releases/<model>/<sha256>.<version>.json    manifests (TUF targets)
      assignments/<sha256>.assignments.json       the assignments document (TUF target)
      transfers/<model>/<sha256>.<version>.json   shorter ways for members to travel (TUF targets, optional)
    blobs/sha256/<hex>                members of every release and parcels, by digest

Two powers (Uptane's split): the offline *targets* key says which releases exist; the online *rollout* key
only chooses among them. A stolen roll-out key can move devices between signed releases, never introduce one.
"""

from __future__ import annotations

from typing import Final

from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version

METADATA: Final = "metadata"
TARGETS: Final = "targets"
BLOBS: Final = "blobs/sha256"

TIMESTAMP: Final = f"{METADATA}/timestamp.json"
ROLLOUT_ROLE: Final = "rollout"
ASSIGNMENTS_PATTERN: Final = "assignments/*"
ASSIGNMENTS_TARGET: Final = "assignments/assignments.json"


RELEASES: Final = "releases/"  # what the target paths of manifests begin with


def manifest_target(model: str, version: Version) -> str:
    """The TUF target path of a release's manifest."""
    return f"{RELEASES}{model}/{version}.json"


def transfers_target(model: str, version: Version) -> str:
    """The TUF target path of a release's transfers document."""
    return f"transfers/{model}/{version}.json"


def blob_path(digest: Digest) -> str:
    """The path of a member, relative to the repository."""
    return f"{BLOBS}/{digest.hex}"

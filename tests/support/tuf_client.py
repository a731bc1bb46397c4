#!/usr/bin/env python
"""The agent's own trust code behind the small command line of the public TUF conformance suite.

https://github.com/theupdateframework/tuf-conformance (CLIENT-CLI.md) drives ``init``, ``refresh`` and
``download``; docs/operations.md says how. Nothing here verifies anything: it is ``TrustedRepository``, with
its durable storage, as the update worker uses it. Beside that only the newest root is copied to where the
suite looks for it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from edge_agent.contract.repository import METADATA, TARGETS
from edge_agent.errors import EdgeError
from edge_agent.store.fs import Disk
from edge_agent.update.trust import TrustedRepository
from edge_agent.update.web import HttpSource

EMBEDDED = "embedded_root"  # the root that a device has from its configuration
TIMEOUT = 10.0  # seconds
LARGEST = 5_000_000  # bytes of a target


class TwoUrls(HttpSource):
    """The suite serves metadata and targets from two places."""

    def __init__(self, metadata_url: str, target_url: str | None) -> None:
        super().__init__(metadata_url, TIMEOUT)
        self._metadata = HttpSource(metadata_url, TIMEOUT)
        self._targets = HttpSource(target_url or metadata_url, TIMEOUT)

    def read(self, path: str, limit: int) -> bytes:
        kind, _, name = path.partition("/")
        return {METADATA: self._metadata, TARGETS: self._targets}[kind].read(name, limit)


def init(trusted: Path, root: Path) -> None:
    """Take a root as the anchor. Nothing is asked of the repository."""
    data = root.read_bytes()
    Disk().write_durable(trusted / EMBEDDED, data)
    Disk().write_durable(trusted / "root.json", data)


def follow(
    trusted: Path, metadata_url: str, targets: tuple[str, ...], target_url: str | None, folder: Path | None
) -> None:
    """Refresh the trusted metadata, and download targets."""
    with tempfile.TemporaryDirectory() as scratch:
        repository = TrustedRepository(
            TwoUrls(metadata_url, target_url), (trusted / EMBEDDED).read_bytes(), trusted, Path(scratch),
            downloads=folder,
        )  # fmt: skip
        try:
            repository.refresh()
            for target in targets:
                repository.target(target, LARGEST)
        finally:
            roots = sorted(
                (trusted / "root_history").glob("*.root.json"), key=lambda p: int(p.name.split(".")[0])
            )
            if roots:
                Disk().write_durable(trusted / "root.json", roots[-1].read_bytes())


def main() -> int:
    """0 if the command was carried out, 1 if any part of it was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args()
    try:
        if given.command == "init":
            init(given.metadata_dir, given.root)
        else:
            names = tuple(given.target_name) if given.command == "download" else ()
            follow(given.metadata_dir, given.metadata_url, names, given.target_base_url, given.target_dir)
    except EdgeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a person installs by hand, on its way into the store."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_agent.contract import manifest as manifests
from edge_agent.contract.bundle import Bundle, open_bundle, open_given, unpack_given
from edge_agent.errors import UpdateRejected
from edge_agent.store.fs import explained


def make_folder(path: Path) -> None:
    """Make a folder.

    Raises:
        StoreError: the disk refused.
    """
    with explained("create", path):
        path.mkdir()


def stage_local(source: Path, folder: Path, max_bytes: int) -> Bundle:
    """Copy an operator's bundle, a folder or a ``.tar``, into the staging folder and verify the copy.

    Raises:
        BadBundle, BadManifest: it is none, or damaged.
        UpdateRejected: it is too large.
        StoreError: the disk refused.
    """
    make_folder(folder)
    if not source.is_dir():
        with explained("unpack into", folder):
            return unpack_given(source, folder)
    bundle = open_given(source)
    if bundle.manifest.size > max_bytes:
        raise UpdateRejected(
            f"{source}: {bundle.manifest.size} bytes, updates.max_bundle_bytes allows {max_bytes}",
            reason="too_large",
        )
    with explained("copy to", folder):
        for name in (manifests.FILE_NAME, *bundle.manifest.members):
            shutil.copyfile(source / name, folder / name)
    staged = open_bundle(folder)
    staged.verify()
    return staged

"""What a person installs by hand, on its way into the store."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_agent.contract import manifest as manifests
from edge_agent.contract.bundle import Bundle, open_bundle, unpack
from edge_agent.contract.errors import BadBundle
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
        try:
            return unpack(source, folder)
        except OSError as error:
            raise BadBundle(
                f"{source} cannot be read: {error.strerror}; give a bundle folder or .tar"
            ) from error
    try:
        bundle = open_bundle(source)
    except BadBundle as error:
        raise BadBundle(f"{error}; give a bundle folder or .tar") from error
    if bundle.manifest.size > max_bytes:
        raise UpdateRejected(
            f"{source}: {bundle.manifest.size} bytes, updates.max_bundle_bytes allows {max_bytes}",
            reason="too_large",
        )
    bundle.verify(source)
    with explained("copy to", folder):
        for name in (manifests.FILE_NAME, *bundle.manifest.members):
            shutil.copyfile(source / name, folder / name)
    staged = open_bundle(folder)
    staged.verify()
    return staged

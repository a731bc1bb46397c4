"""Bundles: a folder with ``manifest.json`` and the members it names, or the same as one ``.tar``.

Invariants:

- ``open_bundle`` reads nothing but the manifest; ``Bundle.verify`` reads every byte and proves it;
- files are verified before anything parses them;
- a ``.tar`` is the same bytes for the same bundle: manifest first, members sorted, no times, no owners;
- unpacking writes plain files with plain names inside the folder it was given, under limits, or raises.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.contract import manifest as manifests
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadBundle
from edge_agent.contract.manifest import Manifest, Member

MODEL: Final = "model.onnx"
RULES: Final = "rules.yaml"
REPORT: Final = "report.json"
# In the metadata of model.onnx: its rows run one at a time, or each would change the answers of the others.
ROWS_KEY: Final = "edge_inference.rows"
ROWS_APART: Final = "apart"
# Bytes of a tensor that may be computed when the model is loaded: a hostile model must not fill the memory. A
# larger constant is computed in every run.
FOLDED_AT_MOST: Final = 64 << 20

MAX_BYTES: Final = 1 << 30  # bytes unpacked: well above any model that fits a 4 GB device


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder whose manifest has been read. Call ``verify`` before trusting its members."""

    path: Path
    manifest: Manifest
    digest: Digest

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    def member(self, name: str) -> Path:
        """The path of a member.

        Raises:
            BadBundle: the manifest names no such member.
        """
        if name not in self.manifest.members:
            raise BadBundle(
                f"bundle {self.path}: no member {name!r}, it has {', '.join(sorted(self.manifest.members))}"
            )
        return self.path / name

    def read(self, name: str) -> bytes:
        """A member's bytes, proven against the manifest.

        Raises:
            BadBundle: missing, truncated or altered.
        """
        path = self.member(name)
        expected = self.manifest.members[name]
        try:
            with path.open("rb") as file:
                data = file.read(expected.size + 1)
        except OSError as error:
            raise BadBundle(f"bundle {self.path}: member {name} cannot be read: {error.strerror}") from error
        _compare(self.path, name, expected, len(data), Digest.of_bytes(data))
        return data

    def verify(self, called: Path | None = None) -> None:
        """Prove every member's size and digest.

        Args:
            called: what the person who gave it knows the bundle as.

        Raises:
            BadBundle: a member is missing, truncated or altered; says which, expected and got.
        """
        try:
            for name in sorted(self.manifest.members):
                self.verify_member(name, called)
        except BadBundle as error:
            if called is None:
                raise
            raise BadBundle(f"{error}; it is damaged, copy it again") from error

    def verify_member(self, name: str, called: Path | None = None) -> None:
        """Prove one member's size and digest without holding it in memory.

        Raises:
            BadBundle: missing, truncated or altered.
        """
        where = called or self.path
        path = self.member(name)
        expected = self.manifest.members[name]
        try:
            size = path.stat().st_size
            digest = Digest.of_file(path) if size == expected.size else None
        except OSError as error:
            raise BadBundle(f"bundle {where}: member {name} cannot be read: {error.strerror}") from error
        _compare(where, name, expected, size, digest)


def _compare(where: Path, name: str, expected: Member, size: int, digest: Digest | None) -> None:
    if size != expected.size:
        raise BadBundle(f"bundle {where}: member {name} has {size} bytes, expected {expected.size}")
    if digest != expected.digest:
        got = digest.short if digest else "unknown"
        raise BadBundle(f"bundle {where}: member {name} has digest {got}, expected {expected.digest.short}")


def open_bundle(path: Path) -> Bundle:
    """Read the manifest of a bundle folder.

    Raises:
        BadBundle: there is no manifest there.
        BadManifest: the manifest is wrong.
    """
    try:
        with (path / manifests.FILE_NAME).open("rb") as file:
            data = file.read(manifests.MAX_BYTES + 1)
    except OSError as error:
        raise BadBundle(f"{path} is not a bundle: {manifests.FILE_NAME}: {error.strerror}") from error
    return Bundle(path, manifests.parse(data), Digest.of_bytes(data))


def open_given(path: Path) -> Bundle:
    """A bundle folder that a person names, every byte of it proven; what is wrong comes with what to do.

    Raises:
        BadBundle: there is no manifest there, or a member is missing or altered.
        BadManifest: the manifest is wrong.
    """
    try:
        bundle = open_bundle(path)
    except BadBundle as error:
        raise BadBundle(f"{error}; give a bundle folder or .tar") from error
    bundle.verify(path)
    return bundle


def unpack_given(path: Path, folder: Path) -> Bundle:
    """A ``.tar`` bundle that a person names, in an existing empty folder, verified.

    Raises:
        BadBundle, BadManifest: as ``unpack``; also that it cannot be read.
        OSError: the folder cannot be written.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise BadBundle(f"{path} cannot be read: {error.strerror}; give a bundle folder or .tar") from error
    return unpack(path, folder)


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write members and manifest into an existing empty folder; ``manifest.members`` is filled in here.

    Raises:
        BadManifest: the manifest contradicts itself.
        OSError: the folder cannot be written.
    """
    members = {name: Member(Digest.of_bytes(data), len(data)) for name, data in files.items()}
    data = manifests.encode(msgspec.structs.replace(manifest, members=members))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / manifests.FILE_NAME).write_bytes(data)
    return open_bundle(folder)


def pack(bundle: Bundle, target: Path) -> None:
    """Write the bundle's one-file form, byte for byte the same for the same bundle.

    Raises:
        BadBundle: a member is missing or altered.
        OSError: the file cannot be written.
    """
    bundle.verify()
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in (manifests.FILE_NAME, *sorted(bundle.manifest.members)):
            path = bundle.path / name
            info = tarfile.TarInfo(name)  # mtime 0, uid 0, mode 0644: nothing of this machine gets in
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)


def unpack(source: Path, folder: Path) -> Bundle:
    """Unpack a ``.tar`` bundle into an existing empty folder and verify it.

    Raises:
        BadBundle: not a tar, a name that is not plain, a link or device, members that the manifest does
            not name, anything altered, or more than ``MAX_BYTES``. What was written stays in ``folder``
            for the caller to remove.
        BadManifest: the manifest is wrong.
    """
    try:
        with tarfile.open(source, "r:") as tar:
            total = 0
            names: set[str] = set()
            for info in tar:
                total += info.size
                if total > MAX_BYTES or len(names) > manifests.MAX_MEMBERS:
                    raise BadBundle(
                        f"{source}: larger than {MAX_BYTES} bytes or {manifests.MAX_MEMBERS} members"
                    )
                if not info.isreg() or not manifests.is_plain(info.name) or info.name in names:
                    raise BadBundle(
                        f"{source}: entry {info.name[:80]!r} is not a plain file with a plain name"
                    )
                names.add(info.name)
                content = tar.extractfile(info) or io.BytesIO()
                with (folder / info.name).open("wb") as out:
                    shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError) as error:
        cut = "unexpected end" in str(error)
        advice = "it was cut off, copy it again" if cut else "give a bundle folder or .tar"
        raise BadBundle(f"{source} is not a bundle: {error}; {advice}") from error
    if manifests.FILE_NAME not in names:
        raise BadBundle(f"{source} is not a bundle: it holds no {manifests.FILE_NAME}; give one that does")
    bundle = open_bundle(folder)
    if missing := bundle.manifest.members.keys() - names:
        raise BadBundle(f"{source}: member {sorted(missing)[0]} is missing: the file is truncated or altered")
    if extra := names - {manifests.FILE_NAME, *bundle.manifest.members}:
        raise BadBundle(f"{source}: {sorted(extra)[0]!r} is not named in the manifest")
    bundle.verify(source)
    return bundle

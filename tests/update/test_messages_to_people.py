"""What a person who gives a wrong bundle by hand is told: what, why, and what to do."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.contract.bundle import MODEL, pack
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher


def cut_off(folder: Path) -> Path:
    pack(tiny_bundle(folder / "whole"), folder / "cut.tar")
    with (folder / "cut.tar").open("r+b") as file:
        file.truncate(3000)
    return folder / "cut.tar"


def shorter(folder: Path) -> Path:
    bundle = tiny_bundle(folder / "shorter")
    with bundle.member(MODEL).open("r+b") as file:
        file.truncate(100)
    return bundle.path


def no_tar(folder: Path) -> Path:
    (folder / "notes.txt").write_text("not a bundle\n" * 100)
    return folder / "notes.txt"


def no_manifest(folder: Path) -> Path:
    bundle = tiny_bundle(folder / "bare")
    (bundle.path / "manifest.json").unlink()
    return bundle.path


def manifest_only(folder: Path) -> Path:
    bundle = tiny_bundle(folder / "whole")
    (folder / "alone").mkdir()
    shutil.copy(bundle.path / "manifest.json", folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (cut_off, "cut.tar is not a bundle: unexpected end of data; it was cut off, copy it again"),
        (shorter, "member model.onnx has 100 bytes, expected"),
        (shorter, "; it is damaged, copy it again"),
        (no_tar, "notes.txt is not a bundle: "),
        (no_tar, "; give a bundle folder or .tar"),
        (no_manifest, "manifest.json: No such file or directory; give a bundle folder or .tar"),
        (manifest_only, "cannot be read: No such file or directory; it is damaged, copy it again"),
    ],
)
def test_a_wrong_bundle_is_refused_in_a_sentence_that_says_what_to_do(
    tmp_path: Path, given: Callable[[Path], Path], said: str
) -> None:
    device = Device(tmp_path / "store", Publisher(tmp_path / "fleet"))
    path = given(tmp_path)
    outcome = asyncio.run(device.updater.install(path))
    assert outcome.reason == "bad_bundle"
    assert said in outcome.message
    assert str(path) in outcome.message, "by the name that the person knows"
    assert device.store.models() == []

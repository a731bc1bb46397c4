"""Whatever bytes come: an error of ours with its sentence, or a value; never a file outside staging.

``EDGE_FUZZ`` is how many examples each test takes; the normal suite takes a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.config import EngineConfig
from edge_agent.contract import assignments, baseline, golden, manifest
from edge_agent.contract.assignments import Assignments, ModelAssignment, Release
from edge_agent.contract.bundle import pack, unpack
from edge_agent.contract.errors import BadAssignments, BadManifest, BadMember, ContractError
from edge_agent.contract.version import Version
from edge_agent.store import state
from edge_agent.store.store import Store
from edge_agent.update.messages import (
    Check,
    Checked,
    Done,
    Failed,
    Fetch,
    ReadManifest,
    SelfTest,
    Setup,
    Test,
)
from edge_agent.update.worker import Worker
from tests.support.bundles import tiny_bundle
from tests.update.devices import DEVICE, Device, Publisher

EXAMPLES = int(os.environ.get("EDGE_FUZZ", "25"))

fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# What breaks parsers: other bytes, missing bytes, more bytes, a value of another kind in a document's place.
damage = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(0)),
    st.tuples(st.just("twice"), st.integers(0, 1 << 20), st.integers(1, 400)),
    st.tuples(st.just("drop"), st.integers(0, 1 << 20), st.integers(1, 400)),
    st.tuples(
        st.sampled_from(
            [
                b"null",
                b"-1",
                b"1e400",
                b"[]",
                b"{}",
                b'"\\ud800"',
                b'""',
                b"99999999999999999999",
                b"[" * 3000,
            ]
        ),
        st.integers(0, 1 << 20),
        st.just(0),
    ),
)
damages = st.lists(damage, min_size=1, max_size=4)
Damages = list[tuple[str | bytes, int, int]]


def damaged(data: bytes, how: Damages) -> bytes:
    for kind, somewhere, number in how:
        at = somewhere % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ number]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "twice":
            data = data[:at] + data[at : at + number] * 2 + data[at + number :]
        elif kind == "drop":
            data = data[:at] + data[at + number :]
        elif isinstance(kind, bytes):  # in the place of the value after the next colon
            colon = data.find(b":", at)
            end = min(
                (e for e in (data.find(b",", colon), data.find(b"}", colon)) if e > 0), default=len(data)
            )
            data = data[: colon + 1] + kind + data[end:] if colon >= 0 else kind
    return data


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Publisher, Path]:
    """A repository, and the store of a device that follows it."""
    folder = tmp_path_factory.mktemp("site")
    publisher = Publisher(folder / "fleet")
    publisher.assign(publisher.publish("1.0.0"))
    device = Device(folder / "store", publisher)
    asyncio.run(device.follow())
    device.store.close()
    publisher.assign(publisher.publish("2.0.0"))
    return publisher, folder / "store"


def document(bundle_folder: Path) -> bytes:
    release = Release(Version("1.0.0"), tiny_bundle(bundle_folder).digest)
    return assignments.encode(Assignments(serial=3, models={"demo": ModelAssignment(stable=release)}))


@fuzzed
@given(how=damages)
def test_a_damaged_manifest(site: tuple[Publisher, Path], how: Damages) -> None:
    data = next((site[1] / "releases").glob("*/manifest.json")).read_bytes()
    with contextlib.suppress(BadManifest):
        manifest.parse(damaged(data, how))


@fuzzed
@given(how=damages)
def test_damaged_assignments(tmp_path: Path, how: Damages) -> None:
    data = (tmp_path / "d").read_bytes() if (tmp_path / "d").exists() else document(tmp_path / "b")
    (tmp_path / "d").write_bytes(data)
    with contextlib.suppress(BadAssignments):
        assignments.assigned(assignments.parse(damaged(data, how)), "demo", DEVICE)


@fuzzed
@given(how=damages)
def test_a_damaged_record_is_a_value_error(site: tuple[Publisher, Path], how: Damages) -> None:
    data = (site[1] / "models" / "demo" / "update.json").read_bytes()
    with contextlib.suppress(ValueError):
        state.parse(damaged(data, how))


@fuzzed
@given(how=damages, member=st.sampled_from([golden, baseline]))
def test_a_damaged_binary_member(site: tuple[Publisher, Path], how: Damages, member: object) -> None:
    module = golden if member is golden else baseline
    path = next((site[1] / "releases").glob(f"*/{module.FILE_NAME}"))
    with contextlib.suppress(BadMember):
        module.parse(damaged(path.read_bytes(), how))


names = st.one_of(
    st.sampled_from(
        [
            "../out",
            "/tmp/out",
            "a/../../out",
            "model.onnx",
            "manifest.json",
            ".",
            "..",
            "",
            "a\0b",
            "con",
            "x" * 300,
        ]
    ),
    st.text(max_size=40),
)
kinds = st.sampled_from(
    [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)


@fuzzed
@given(how=st.none() | damages, extra=st.lists(st.tuples(names, kinds, names), max_size=3))
def test_a_hostile_tar(tmp_path: Path, how: Damages | None, extra: list[tuple[str, bytes, str]]) -> None:
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    inside = tmp_path / "x" / "inside"
    inside.mkdir(parents=True)
    if not (tmp_path / "b.tar").exists():
        pack(tiny_bundle(tmp_path / "b"), tmp_path / "b.tar")
    data = (tmp_path / "b.tar").read_bytes()
    if extra:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, kind, target in extra:
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
                with contextlib.suppress(ValueError, UnicodeError):  # tarfile will not write it
                    tar.addfile(info, io.BytesIO(b"abc"))
        data = buffer.getvalue()[:-1024] + data
    (tmp_path / "x.tar").write_bytes(damaged(data, how) if how else data)
    with contextlib.suppress(ContractError):
        unpack(tmp_path / "x.tar", inside)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["inside"]
    assert not Path("/tmp/out").exists()
    assert all(path.is_file() and not path.is_symlink() for path in inside.iterdir())


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@fuzzed
@given(how=damages, which=st.integers(0, 1 << 16))
def test_a_damaged_repository_through_the_worker(
    tmp_path: Path, site: tuple[Publisher, Path], how: Damages, which: int
) -> None:
    publisher, store = site
    for name in ("repository", "store", "scratch"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    repository = shutil.copytree(publisher.path, tmp_path / "repository")
    shutil.copytree(store, tmp_path / "store", symlinks=True)
    (tmp_path / "scratch").mkdir()
    files = sorted(path for path in repository.rglob("*") if path.is_file())
    victim = files[which % len(files)]
    victim.write_bytes(damaged(victim.read_bytes(), how))
    before = tree(tmp_path) - tree(tmp_path / "scratch")
    layout = Store.read(tmp_path / "store").layout
    worker = Worker(
        Setup(
            device=DEVICE, source=str(repository), root=str(publisher.root), models=(), tuf=str(layout.tuf),
            partial=str(layout.partial), scratch=str(tmp_path / "scratch"), timeout=5.0,
            engine=EngineConfig(),
        )
    )  # fmt: skip
    try_an_update(worker, tmp_path / "scratch")
    written = {path for path in tree(tmp_path) - before if not path.startswith("scratch/")}
    assert all(path.startswith(("store/tuf/", "store/staging/partial/")) for path in written), written


def try_an_update(worker: Worker, scratch: Path) -> None:
    """As the updater asks; every answer is one that it knows, and none is "bug"."""

    def ask(command: Check | ReadManifest | Fetch | Test) -> object:
        reply = worker.handle(command, lambda _: None)
        assert not isinstance(reply, Failed) or (reply.kind != "bug" and reply.message), reply
        return reply

    checked = ask(Check())
    share = checked.shares.get("demo") if isinstance(checked, Checked) else None
    if share is None or share.release is None:
        return
    folder = scratch / "staged"
    folder.mkdir()
    if not isinstance(ask(ReadManifest("demo", share.release, str(folder))), Done):
        return
    members = tuple(sorted(manifest.parse((folder / "manifest.json").read_bytes()).members))
    if isinstance(ask(Fetch(str(folder), members, spare=0)), Done):
        report = ask(Test(str(folder)))
        assert isinstance(report, SelfTest)
        assert report.passed, "what got this far is what was signed"

"""Whatever system call the power fails in, `current` resolves to a complete, verified release: old or new."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version
from edge_agent.errors import StoreError
from edge_agent.store.fs import TEMPORARY, Disk
from edge_agent.store.state import State, UpdateRecord
from edge_agent.store.store import Store
from tests.store.bundles import plain_bundle
from tests.store.faults import CountingDisk, DyingDisk, RefusingDisk, power_cut_in

Work = Callable[[Path, Path, Disk], None]


def install_second(store: Path, bundles: Path, disk: Disk) -> None:
    """Admit and activate 2.0.0 over 1.0.0, with the records an updater writes on the way."""
    with Store.open(store, disk) as opened:
        opened.save("demo", UpdateRecord(state=State.VERIFYING))
        with opened.staging() as folder:
            staged = folder / "bundle"
            shutil.copytree(bundles / "2", staged)
            bundle = opened.admit(staged)
        opened.save("demo", UpdateRecord(state=State.ACTIVATING))
        opened.activate(bundle)
        opened.save("demo", UpdateRecord(state=State.PROBATION))
        opened.collect_garbage()


def roll_back(store: Path, bundles: Path, disk: Disk) -> None:
    with Store.open(store, disk) as opened:
        if opened.previous("demo") is not None:  # as the updater asks when it resumes
            opened.roll_back("demo")
        opened.collect_garbage()


def repair(store: Path, bundles: Path, disk: Disk) -> None:
    with Store.open(store, disk) as opened, opened.staging() as folder:
        shutil.copytree(bundles / "2", folder / "bundle")
        opened.admit(folder / "bundle")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: hundreds of stores are written, and only processes die here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    for version in ("1", "2", "3"):
        plain_bundle(tmp_path / "bundles" / version, f"{version}.0.0")
    return tmp_path / "bundles"


def prepare(path: Path, bundles: Path, versions: str) -> Path:
    """A store in which the releases of ``versions`` were activated one after the other."""
    with Store.open(path) as store:
        for version in versions:
            with store.staging() as folder:
                shutil.copytree(bundles / version, folder / "bundle")
                store.activate(store.admit(folder / "bundle"))
    return path


def dying(work: Work, store: Path, bundles: Path, at: int) -> None:
    work(store, bundles, DyingDisk(at))


def in_a_process_that_dies(work: Work, store: Path, bundles: Path, at: int) -> bool:
    """Run ``work`` in a process whose power fails before call ``at``; False if it ended before."""
    return power_cut_in(dying, work, store, bundles, at)


def assert_whole(path: Path, allowed: set[str]) -> str:
    """The store opens, serves one of ``allowed``, has nothing half-done in it; returns which."""
    with Store.open(path) as store:
        current = store.current("demo")
        assert current is not None
        current.verify()
        assert current.manifest.version in allowed
        previous = store.previous("demo")
        if previous is not None:
            previous.verify()
            assert previous.digest != current.digest
        store.record("demo")
        for release in store.layout.releases.iterdir():
            assert Digest.of_file(release / "manifest.json").hex == release.name
        assert not list(path.rglob(f"{TEMPORARY}*"))
        assert [p.name for p in store.layout.staging.iterdir()] == ["partial"]
        return current.manifest.version


@pytest.mark.parametrize(
    ("work", "versions", "old", "new"),
    [(install_second, "1", "1.0.0", "2.0.0"), (install_second, "31", "1.0.0", "2.0.0"),
     (roll_back, "12", "2.0.0", "1.0.0"), (repair, "12", "2.0.0", "2.0.0")],
    ids=["first-update", "third-update", "roll-back", "repair"],
)  # fmt: skip
def test_a_power_cut_before_any_call_leaves_the_old_or_the_new_release(
    tmp_path: Path, bundles: Path, work: Work, versions: str, old: str, new: str
) -> None:
    origin = prepare(tmp_path / "origin", bundles, versions)
    seen = []
    at = 1
    while True:
        store = tmp_path / f"store-{at}"
        shutil.copytree(origin, store, symlinks=True)
        if work is repair:
            damage(store)
        if not in_a_process_that_dies(work, store, bundles, at):
            break
        if work is not repair:
            seen.append(assert_whole(store, {old, new}))
        # What was interrupted can be done again, and then it is done.
        work(store, bundles, Disk())
        assert assert_whole(store, {old, new}) == new
        shutil.rmtree(store)
        at += 1
    assert at > 5, "the calls are no longer seen"
    if old != new:
        assert set(seen) == {old, new}
        assert seen == sorted(seen, key=lambda version: version == new), "it never goes back and forth"


def damage(store: Path) -> None:
    """Flip a byte of the current model, in the blob and in every link to it."""
    model = store / "models" / "demo" / "current" / "model.onnx"
    blob = store / "blobs" / "sha256" / Digest.of_file(model).hex
    for path in (model, blob):  # a copied store holds copies where the original held links
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)


def test_a_second_power_cut_during_recovery_changes_nothing(tmp_path: Path, bundles: Path) -> None:
    origin = prepare(tmp_path / "origin", bundles, "1")
    calls = CountingDisk()
    reference = tmp_path / "reference"
    shutil.copytree(origin, reference, symlinks=True)
    install_second(reference, bundles, calls)
    for first in range(1, len(calls.calls) + 1, 5):
        store = tmp_path / f"store-{first}"
        shutil.copytree(origin, store, symlinks=True)
        assert in_a_process_that_dies(install_second, store, bundles, first)
        for second in (1, 2, 3, 5, 8):
            in_a_process_that_dies(install_second, store, bundles, second)
        assert_whole(store, {"1.0.0", "2.0.0"})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_any_one_call_leaves_everything_as_it_was(
    tmp_path: Path, bundles: Path, number: int
) -> None:
    origin = prepare(tmp_path / "origin", bundles, "1")
    at = 1
    while True:
        store = tmp_path / f"store-{at}"
        shutil.copytree(origin, store, symlinks=True)
        disk = RefusingDisk(at, number)
        done = False
        with contextlib.suppress(StoreError):
            install_second(store, bundles, disk)
            done = True  # what is refused while the store is opened is asked for again
        if disk.obeyed:
            break
        left = assert_whole(store, {"1.0.0", "2.0.0"})
        # After the switch only saving the record and collecting garbage are left.
        assert done or left == "1.0.0" or disk.calls[:at].count("symlink") == 2
        shutil.rmtree(store)
        at += 1
    assert at > 20


def test_a_failing_fsync_of_the_switch_puts_the_pointer_back(tmp_path: Path, bundles: Path) -> None:
    with Store.open(prepare(tmp_path / "store", bundles, "1")) as store, store.staging() as folder:
        shutil.copytree(bundles / "2", folder / "bundle")
        bundle = store.admit(folder / "bundle")
    counting = CountingDisk()
    with Store.open(tmp_path / "store", counting) as store:
        before = len(counting.calls)
        store.activate(bundle)
        last = len(counting.calls)
        assert counting.calls[before:] == ["symlink", "rename", "fsync"] * 2
        store.roll_back("demo")
    with (
        Store.open(tmp_path / "store", RefusingDisk(last, errno.EIO)) as store,
        pytest.raises(StoreError, match="Input/output error"),
    ):
        store.activate(bundle)
    assert assert_whole(tmp_path / "store", {"1.0.0", "2.0.0"}) == "1.0.0"


def test_a_disk_that_stays_full_keeps_the_current_release(tmp_path: Path, bundles: Path) -> None:
    prepare(tmp_path / "store", bundles, "1")
    with pytest.raises(StoreError, match="free some space") as caught:
        install_second(tmp_path / "store", bundles, RefusingDisk(4, errno.ENOSPC, forever=True))
    assert caught.value.reason == "disk_full"
    assert assert_whole(tmp_path / "store", {"1.0.0"}) == "1.0.0"


def test_a_leftover_of_a_crash_never_blocks_the_next_switch(tmp_path: Path, bundles: Path) -> None:
    path = prepare(tmp_path / "store", bundles, "1")
    folder = path / "models" / "demo"
    (folder / f"{TEMPORARY}0123").symlink_to("nowhere")
    (path / "releases" / "half").mkdir()
    (path / "releases" / "half" / f"{TEMPORARY}4567").write_bytes(b"x")
    install_second(path, bundles, Disk())
    assert assert_whole(path, {"2.0.0"}) == "2.0.0"
    assert Version("2.0.0") > Version("1.0.0")

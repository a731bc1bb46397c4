"""What is installed, which release answers, and that one agent writes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.assignments import Release
from edge_agent.contract.bundle import MODEL, RULES, Bundle
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadBundle, BadManifest
from edge_agent.contract.version import Version
from edge_agent.errors import StoreError
from edge_agent.store.fs import Disk
from edge_agent.store.layout import PREVIOUS
from edge_agent.store.state import Finished, Rejected, Result, State, UpdateRecord
from edge_agent.store.store import Store
from tests.store.bundles import plain_bundle


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def admit(store: Store, bundle: Bundle, *, without: tuple[str, ...] = ()) -> Bundle:
    with store.staging() as folder:
        staged = folder / "bundle"
        shutil.copytree(bundle.path, staged)
        for name in without:
            (staged / name).unlink()
        return store.admit(staged)


def activate(store: Store, bundle: Bundle) -> Bundle:
    admitted = admit(store, bundle)
    store.activate(admitted)
    return admitted


def flip_a_byte(path: Path) -> None:
    """Damage on the medium: the same file, other bytes."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.models() == []
    assert store.current("demo") is None
    assert store.previous("demo") is None
    assert store.record("demo") == UpdateRecord()


def test_an_admitted_release_is_verified_but_not_active(store: Store, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "1", "1.0.0")
    admitted = admit(store, bundle)
    admitted.verify()
    assert admitted.digest == bundle.digest
    assert store.current("demo") is None


def test_activating_keeps_the_one_before_for_a_roll_back(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    second = activate(store, plain_bundle(tmp_path / "2", "2.0.0"))
    assert store.current("demo") == second
    assert store.previous("demo") == first
    assert store.models() == ["demo"]


def test_activating_what_is_active_changes_nothing(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    second = activate(store, plain_bundle(tmp_path / "2", "2.0.0"))
    store.activate(second)
    assert store.previous("demo") == first


def test_a_roll_back_brings_the_previous_release_back_once(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    activate(store, plain_bundle(tmp_path / "2", "2.0.0"))
    assert store.roll_back("demo") == first
    assert store.current("demo") == first
    with pytest.raises(StoreError, match="no previous release") as caught:
        store.roll_back("demo")
    assert caught.value.reason == "no_previous"
    assert store.current("demo") == first


def test_a_roll_back_to_a_damaged_release_is_refused(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    second = activate(store, plain_bundle(tmp_path / "2", "2.0.0"))
    flip_a_byte(first.path / MODEL)
    with pytest.raises(StoreError) as caught:
        store.roll_back("demo")
    assert caught.value.reason == "corrupt_previous"
    assert store.current("demo") == second


def test_releases_share_the_members_they_have_in_common(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0", model=b"same"))
    bundle = plain_bundle(tmp_path / "2", "1.0.1", model=b"same", rules=b"default: pass\n")
    assert list(store.lacks(bundle.manifest)) == [RULES]
    second = admit(store, bundle, without=(MODEL,))
    assert (first.path / MODEL).samefile(second.path / MODEL)


def test_a_release_with_a_missing_member_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="neither staged nor in the store"):
        admit(store, plain_bundle(tmp_path / "1", "1.0.0"), without=(RULES,))
    assert list(store.layout.releases.iterdir()) == []
    assert list(store.layout.blobs.iterdir()) == []


def test_a_tampered_member_is_refused_and_the_current_release_untouched(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    second = plain_bundle(tmp_path / "2", "2.0.0")
    flip_a_byte(second.path / MODEL)
    with pytest.raises(BadBundle, match=r"model\.onnx has digest"):
        admit(store, second)
    assert store.current("demo") == first
    assert len(list(store.layout.releases.iterdir())) == 1


def test_a_member_that_is_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "1", "1.0.0")
    (tmp_path / "elsewhere").write_bytes((bundle.path / MODEL).read_bytes())
    with store.staging() as folder:
        shutil.copytree(bundle.path, folder / "bundle")
        (folder / "bundle" / MODEL).unlink()
        (folder / "bundle" / MODEL).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BadBundle, match="is a link"):
            store.admit(folder / "bundle")


def test_a_manifest_that_cannot_be_read_is_refused(store: Store) -> None:
    with store.staging() as folder:
        (folder / "manifest.json").write_text("{")
        with pytest.raises(BadManifest):
            store.admit(folder)


def test_admitting_again_repairs_a_damaged_member(store: Store, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "1", "1.0.0")
    active = activate(store, bundle)
    flip_a_byte(active.path / MODEL)
    with pytest.raises(BadBundle):
        active.verify()
    assert list(store.lacks(bundle.manifest)) == [MODEL]

    admit(store, bundle)

    current = store.current("demo")
    assert current is not None
    current.verify()


def test_admitting_again_repairs_a_damaged_manifest(store: Store, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "1", "1.0.0")
    active = activate(store, bundle)
    flip_a_byte(active.path / "manifest.json")
    with pytest.raises((BadBundle, BadManifest)):
        store.current("demo")
    admit(store, bundle)
    assert store.current("demo") == active


def test_an_altered_but_readable_manifest_is_noticed(store: Store, tmp_path: Path) -> None:
    active = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    path = active.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"threshold": 1', b'"threshold": 9'))
    with pytest.raises(BadBundle, match="altered on the disk"):
        store.current("demo")


def test_a_repair_reaches_every_release_that_shares_the_member(store: Store, tmp_path: Path) -> None:
    first = plain_bundle(tmp_path / "1", "1.0.0", model=b"same")
    activate(store, first)
    second = activate(store, plain_bundle(tmp_path / "2", "1.0.1", model=b"same", rules=b"default: pass\n"))
    flip_a_byte(second.path / MODEL)

    admit(store, first)

    second.verify()
    previous = store.previous("demo")
    assert previous is not None
    previous.verify()


def test_a_damaged_release_does_not_become_the_previous_one(store: Store, tmp_path: Path) -> None:
    first = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    second = activate(store, plain_bundle(tmp_path / "2", "2.0.0"))
    flip_a_byte(second.path / MODEL)
    third = activate(store, plain_bundle(tmp_path / "3", "3.0.0"))
    assert (store.current("demo"), store.previous("demo")) == (third, first)


def test_a_store_can_be_moved_as_a_whole(store: Store, tmp_path: Path) -> None:
    bundle = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    store.close()
    (tmp_path / "store").rename(tmp_path / "moved")
    with Store.open(tmp_path / "moved") as moved:
        current = moved.current("demo")
        assert current is not None
        assert current.digest == bundle.digest


def test_garbage_is_what_no_pointer_and_no_record_names(store: Store, tmp_path: Path) -> None:
    first, second, third, fourth = (
        plain_bundle(tmp_path / version, f"{version}.0.0") for version in ("1", "2", "3", "4")
    )
    for bundle in (first, second, third):
        activate(store, bundle)
    staged = admit(store, fourth)
    store.save("demo", UpdateRecord(candidate=Release(Version("4.0.0"), staged.digest)))

    assert store.collect_garbage() == 2  # the first release and its model; all share their rules

    assert {path.name for path in store.layout.releases.iterdir()} == {
        bundle.digest.hex for bundle in (second, third, fourth)
    }
    for digest in (second.digest, third.digest, fourth.digest):
        Bundle(store.layout.release(digest), second.manifest, digest).path.exists()
    for bundle in (store.current("demo"), store.previous("demo"), staged):
        assert bundle is not None
        bundle.verify()
    assert store.collect_garbage() == 0


def test_nothing_is_collected_while_a_referenced_manifest_is_damaged(store: Store, tmp_path: Path) -> None:
    active = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    admit(store, plain_bundle(tmp_path / "2", "2.0.0"))
    (active.path / "manifest.json").write_text("{")
    assert store.collect_garbage() == 0


def test_the_record_survives_and_keeps_what_was_rejected(store: Store, tmp_path: Path) -> None:
    digest = Digest.of_bytes(b"bad")
    record = UpdateRecord(
        state=State.ROLLED_BACK,
        candidate=Release(Version("2.0.0-rc.1"), digest),
        last=Finished(Result.FAILED_ROLLBACK_COMPLETE, "fallback", "too many", "2.0.0-rc.1", digest, 1.5),
        killed=True,
        minimum_version=Version("1.0.0"),
    ).rejecting(Rejected(digest, Version("2.0.0-rc.1"), "selftest", "golden vectors differ", 1.5))
    store.save("demo", record)
    store.close()
    with Store.open(tmp_path / "store") as again:
        assert again.record("demo") == record
        rejection = again.record("demo").rejection(digest)
        assert rejection is not None
        assert rejection.reason == "selftest"
        assert again.record("demo").forgiving(digest).rejected == ()


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": "unheard_of"}', b'{"format": 99}', b"\xff" * 100])
def test_a_damaged_record_starts_afresh(store: Store, content: bytes) -> None:
    store.save("demo", UpdateRecord(state=State.PROBATION))
    (store.layout.model("demo") / "update.json").write_bytes(content)
    assert store.record("demo") == UpdateRecord()


def test_a_second_agent_is_refused_and_can_still_look(store: Store, tmp_path: Path) -> None:
    bundle = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    with pytest.raises(StoreError, match=f"process {os.getpid()}") as caught:
        Store.open(tmp_path / "store")
    assert caught.value.reason == "locked"
    looking = Store.read(tmp_path / "store")
    assert looking.current("demo") == bundle
    with pytest.raises(StoreError, match="reading only"):
        looking.save("demo", UpdateRecord())
    with pytest.raises(StoreError, match="reading only"):
        looking.activate(bundle)


def test_the_lock_of_a_killed_agent_is_free_again(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from edge_agent.store.store import Store\n"
        "store = Store.open(pathlib.Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(StoreError):
            Store.open(tmp_path / "store")
        holder.kill()
        holder.wait()
    Store.open(tmp_path / "store").close()


def test_looking_at_a_store_that_is_not_there_creates_nothing(tmp_path: Path) -> None:
    assert Store.read(tmp_path / "store").models() == []
    assert not (tmp_path / "store").exists()


def test_a_path_that_cannot_be_a_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create"):
        Store.open(tmp_path / "file" / "store")


def test_staging_is_empty_unique_and_gone_afterwards(store: Store) -> None:
    with store.staging() as one, store.staging() as other:
        assert one != other
        assert list(one.iterdir()) == []
        (one / "file").write_text("x")
    assert not one.exists()


def test_half_downloads_survive_a_restart(store: Store, tmp_path: Path) -> None:
    (store.layout.partial / "abc").write_bytes(b"half")
    store.close()
    with Store.open(tmp_path / "store") as again:
        assert (again.layout.partial / "abc").read_bytes() == b"half"


def test_previous_is_absent_where_both_pointers_are_equal(store: Store, tmp_path: Path) -> None:
    bundle = activate(store, plain_bundle(tmp_path / "1", "1.0.0"))
    Disk().replace_symlink(store.layout.model("demo") / PREVIOUS, store.layout.target(bundle.digest))
    assert store.previous("demo") is None


class _RefusesToRemove(Disk):
    """As while an orphaned worker still writes into the folder: rmtree finds it not empty."""

    def before(self, call: str, path: Path) -> None:
        if call == "rmtree":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))


def test_left_over_staging_that_cannot_be_removed_does_not_keep_the_agent_from_serving(
    tmp_path: Path,
) -> None:
    Store.open(tmp_path).close()
    left = tmp_path / "staging" / "left-by-a-killed-agent"
    left.mkdir()
    store = Store.open(tmp_path, _RefusesToRemove())
    assert store.models() == []
    store.close()
    Store.open(tmp_path).close()
    assert not left.exists()

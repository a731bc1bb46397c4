"""Two agents and one store: the second serves what the first installed, and writes once the first is gone."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from edge_agent.contract.bundle import Bundle
from edge_agent.errors import StoreError
from edge_agent.store.state import UpdateRecord
from edge_agent.store.store import Store
from tests.store.bundles import plain_bundle
from tests.store.faults import CountingDisk, RefusingDisk


def install(store: Store, bundle: Bundle) -> None:
    with store.staging() as folder:
        shutil.copytree(bundle.path, folder / "bundle")
        store.activate(store.admit(folder / "bundle"))


def test_the_second_agent_serves_what_the_first_installed_and_changes_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as first:
        install(first, plain_bundle(tmp_path / "1", "1.0.0"))
        second = Store.open_or_read(tmp_path / "store")
        assert not second.writable
        current = second.current("demo")
        assert current is not None
        current.verify()
        with pytest.raises(StoreError, match="reading only") as caught:
            second.save("demo", UpdateRecord())
        assert caught.value.reason == "not_locked"


def test_the_second_agent_takes_over_when_the_first_is_gone_and_sees_what_it_left(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "store")
    install(first, plain_bundle(tmp_path / "1", "1.0.0"))
    second = Store.open_or_read(tmp_path / "store")
    with pytest.raises(StoreError) as caught:
        second.take()
    assert caught.value.reason == "locked"
    install(first, plain_bundle(tmp_path / "2", "2.0.0"))
    first.close()
    second.take()
    assert second.writable
    current = second.current("demo")
    assert current is not None
    assert current.manifest.version == "2.0.0"
    install(second, plain_bundle(tmp_path / "3", "3.0.0"))
    second.take()  # harmless when repeated
    second.close()


def test_taking_over_sweeps_what_the_first_left_half_done(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "store")
    install(first, plain_bundle(tmp_path / "1", "1.0.0"))
    second = Store.open_or_read(tmp_path / "store")
    left = tmp_path / "store" / "models" / "demo" / ".tmp-0123"
    left.symlink_to("nowhere")
    first.close()
    second.take()
    second.close()
    assert not left.is_symlink()


def test_nothing_to_serve_and_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store"), pytest.raises(StoreError, match="in use by another agent"):
        Store.open_or_read(tmp_path / "store")


def test_a_disk_that_fails_while_it_is_taken_still_serves(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        install(store, plain_bundle(tmp_path / "1", "1.0.0"))
    (tmp_path / "store" / "staging" / "partial").rmdir()
    store = Store.open_or_read(tmp_path / "store", RefusingDisk(1, errno.EROFS))
    assert not store.writable
    assert store.current("demo") is not None


def test_what_is_found_is_made_durable_before_it_is_relied_on(tmp_path: Path) -> None:
    """A killed agent leaves renames that everybody sees and a power cut undoes."""
    with Store.open(tmp_path / "store") as store:
        install(store, plain_bundle(tmp_path / "1", "1.0.0"))
    disk = CountingDisk()
    with Store.open(tmp_path / "store", disk) as store:
        settled = disk.calls.count("fsync")
        assert settled >= 8, "every folder"
        store.save("demo", UpdateRecord())
        assert disk.calls.count("fsync") == settled + 2, "once"


def test_after_a_failed_fsync_nothing_is_relied_on_until_it_is_durable(tmp_path: Path) -> None:
    disk = RefusingDisk(10**9, errno.EIO)
    with Store.open(tmp_path / "store", disk) as store:
        install(store, plain_bundle(tmp_path / "1", "1.0.0"))
        disk.refuse_from_now_on(after=3)
        with pytest.raises(StoreError):
            store.save("demo", UpdateRecord())
        disk.obey()
        before = len(disk.calls)
        store.save("demo", UpdateRecord())
        assert disk.calls[before:].count("fsync") > 8

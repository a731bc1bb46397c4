"""The model of a disk is worth what it can find: here it finds the mistakes that the store does not make."""

from __future__ import annotations

import random
from pathlib import Path

from edge_agent.store.fs import Disk
from tests.store.medium import Medium, RecordingDisk


def contents_after(medium: Medium, name: str) -> set[bytes | None]:
    medium.observe()
    found = set[bytes | None]()
    for image in medium.states(random.Random(1)):
        paths = dict(image.walk())
        found.add(image.contents[paths[name]] if name in paths else None)
    return found


def test_a_rename_before_the_fsync_of_its_file_may_leave_an_empty_or_half_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    medium = Medium(tmp_path)
    (tmp_path / "t").write_bytes(b"newer!")
    (tmp_path / "t").replace(tmp_path / "a")
    medium.observe()
    medium.flush(tmp_path)
    assert contents_after(medium, "a") == {b"", b"new", b"newer!"}


def test_a_rename_without_the_fsync_of_its_folder_may_be_undone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    medium = Medium(tmp_path)
    (tmp_path / "t").write_bytes(b"new")
    medium.observe()
    medium.flush(tmp_path / "t")
    (tmp_path / "t").replace(tmp_path / "a")
    assert contents_after(medium, "a") == {b"old", b"new"}


def test_renames_in_two_folders_may_be_reordered(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    medium = Medium(tmp_path)
    (tmp_path / "x" / "1").symlink_to("first")
    (tmp_path / "y" / "2").symlink_to("second")
    medium.observe()
    seen = {frozenset(dict(image.walk())) - {"x", "y"} for image in medium.states(random.Random(1))}
    assert seen == {frozenset(), frozenset({"x/1"}), frozenset({"y/2"}), frozenset({"x/1", "y/2"})}


def test_a_failed_fsync_loses_the_file_for_good(tmp_path: Path) -> None:
    medium = Medium(tmp_path)
    (tmp_path / "a").write_bytes(b"new")
    medium.observe()
    medium.drop(tmp_path / "a")
    medium.flush(tmp_path / "a")  # it says yes, and lies
    medium.flush(tmp_path)
    assert b"" in contents_after(medium, "a")


def test_a_durable_write_is_old_or_new_at_every_call(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    seen = set[bytes | None]()
    disk = RecordingDisk(tmp_path, lambda number, call, medium: seen.update(contents_after(medium, "a")))
    disk.write_durable(tmp_path / "a", b"new")
    assert seen == {b"old", b"new"}
    assert contents_after(disk.medium, "a") == {b"new"}
    assert disk.calls == ["open", "write", "fsync", "rename", "fsync"]


def test_a_state_becomes_a_folder_again_with_its_hard_links(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    disk = Disk()
    disk.make_durable_dir(store / "x")
    disk.write_durable(store / "x" / "a", b"data")
    disk.replace_link(store / "b", store / "x" / "a")
    disk.replace_symlink(store / "c", Path("b"))
    Medium(store).live.write(tmp_path / "again")
    assert (tmp_path / "again" / "c").read_bytes() == b"data"
    assert (tmp_path / "again" / "b").samefile(tmp_path / "again" / "x" / "a")
    assert (tmp_path / "again" / "c").readlink() == Path("b")

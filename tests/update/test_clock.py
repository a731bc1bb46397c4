"""A device whose clock went back does not take expired metadata for fresh: it holds updates and says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_agent.errors import UpdateRejected
from edge_agent.store.fs import Disk
from edge_agent.update.source import FolderSource
from edge_agent.update.trust import TrustedRepository
from tests.update.devices import Publisher

DAY = 86400.0


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    publisher = Publisher(tmp_path / "fleet")
    publisher.assign(publisher.publish("1.0.0"))
    return publisher


def refresh(tmp_path: Path, publisher: Publisher, at: float) -> None:
    trusted = tmp_path / "tuf"
    Disk().make_durable_dir(trusted)
    scratch = tmp_path / f"scratch-{time.monotonic_ns()}"
    scratch.mkdir()
    TrustedRepository(
        FolderSource(publisher.path), publisher.root.read_bytes(), trusted, scratch, now=lambda: at
    ).refresh()


def test_a_clock_that_went_back_holds_updates_until_it_is_right_again(
    tmp_path: Path, publisher: Publisher
) -> None:
    now = time.time()
    refresh(tmp_path, publisher, now)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "tuf").glob("*.json")}
    publisher.sign()
    for before in (0.0, now - 30 * DAY):
        with pytest.raises(UpdateRejected, match="set the clock") as caught:
            refresh(tmp_path, publisher, before)
        assert caught.value.reason == "clock_behind"
    assert {path.name: path.read_bytes() for path in (tmp_path / "tuf").glob("*.json")} == kept
    refresh(tmp_path, publisher, now + 60)


def test_a_clock_that_was_corrected_by_minutes_holds_nothing(tmp_path: Path, publisher: Publisher) -> None:
    now = time.time()
    refresh(tmp_path, publisher, now)
    refresh(tmp_path, publisher, now - 600)


def test_a_damaged_floor_is_no_floor(tmp_path: Path, publisher: Publisher) -> None:
    now = time.time()
    refresh(tmp_path, publisher, now)
    for damage in (b"", b"nan", b"inf", b"\xff" * 100):
        (tmp_path / "tuf" / "clock_floor").write_bytes(damage)
        refresh(tmp_path, publisher, now)
    assert float((tmp_path / "tuf" / "clock_floor").read_text()) == pytest.approx(now, abs=1)

"""The power fails before a system call of a whole update: old or new, and then it goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.store.state import State
from tests.store.faults import CountingDisk, DyingDisk, power_cut_in
from tests.update.devices import Device, Publisher

POINTS = 16  # spread over the calls of an update; every single call of the store's is cut in tests/store


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: only processes die here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


class Repository:
    """The publisher as a device sees it: two paths."""

    def __init__(self, folder: Path) -> None:
        self.path, self.root = folder / "repository", folder / "root.json"


async def update(device: Device) -> None:
    """A start of the agent, an update, its probation."""
    await device.updater.recover()
    device.serving.take_up(device.store)
    await device.updater.run_once()
    await device.commit()


def update_and_die(store: Path, fleet: Path, at: int) -> None:
    device = Device(store, Repository(fleet), disk=DyingDisk(at))  # type: ignore[arg-type]
    asyncio.run(update(device))


def test_an_update_cut_anywhere_serves_old_or_new_and_is_finished_by_the_next_start(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    publisher = Publisher(fleet)
    publisher.assign(publisher.publish("1.0.0"))
    first = Device(tmp_path / "origin", publisher)
    asyncio.run(first.follow())
    first.store.close()
    publisher.assign(publisher.publish("2.0.0"))
    counting = CountingDisk()
    shutil.copytree(tmp_path / "origin", tmp_path / "counted", symlinks=True)
    counted = Device(tmp_path / "counted", publisher, disk=counting)
    asyncio.run(update(counted))
    assert counted.version() == "2.0.0"
    counted.store.close()
    calls = len(counting.calls)

    seen = set()
    for at in range(1, calls + 1, max(calls // POINTS, 1)):
        store = tmp_path / f"store-{at}"
        shutil.copytree(tmp_path / "origin", store, symlinks=True)
        assert power_cut_in(update_and_die, store, fleet, at)
        assert power_cut_in(update_and_die, store, fleet, 5), "and again while it recovers"

        device = Device(store, publisher)

        async def come_up(device: Device = device) -> None:
            await device.updater.recover()
            device.serving.take_up(device.store)
            seen.add(device.version())
            assert device.serving.running["demo"].manifest.version == device.version()
            await device.updater.run_once()
            assert device.version() == "2.0.0"
            await device.commit()
            assert device.state() is State.COMMITTED

        asyncio.run(come_up())
        device.store.close()
        shutil.rmtree(store)
    assert seen == {"1.0.0", "2.0.0"}

"""`edge-agent install`: the same way as a release from the repository, without one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import UpdatesConfig
from edge_agent.contract.bundle import MODEL, pack
from edge_agent.contract.version import Version
from edge_agent.store.state import Result, State
from edge_agent.store.store import Store
from edge_agent.update.updater import Updater
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Iterator[Device]:
    """A device that follows nothing."""
    device = Device(tmp_path / "store", publisher, source="")
    yield device
    device.store.close()


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_local_bundle_goes_live_on_probation_and_is_committed(
    device: Device, tmp_path: Path, form: str
) -> None:
    bundle = tiny_bundle(tmp_path / "b", version="1.0.0")
    path = bundle.path
    if form == "tar":
        path = tmp_path / "b.tar"
        pack(bundle, path)

    async def scenario() -> None:
        outcome = await device.updater.install(path)
        assert (outcome.result, outcome.version) == (Result.SUCCEEDED, "1.0.0")
        assert outcome.as_dict()["result"] == "succeeded"
        assert (device.state(), device.version()) == (State.PROBATION, "1.0.0")
        assert device.serving.swaps == ["1.0.0"]
        await device.commit()
        assert device.state() is State.COMMITTED
        again = await device.updater.install(path)
        assert again.result is Result.ALREADY_INSTALLED
        bundle.verify()  # it was copied, not taken

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / MODEL).write_bytes(b"tampered"), "bad_bundle"),
        (lambda path: (path / MODEL).unlink(), "bad_bundle"),
        (lambda path: (path / "manifest.json").write_text("{}"), "bad_bundle"),
        (shutil.rmtree, "bad_bundle"),
    ],
    ids=["tampered", "truncated", "no-manifest", "absent"],
)
def test_a_damaged_local_bundle_is_refused_and_nothing_changes(
    device: Device, tmp_path: Path, damage: object, reason: str
) -> None:
    async def scenario() -> None:
        await device.updater.install(tiny_bundle(tmp_path / "1", version="1.0.0").path)
        await device.commit()
        second = tiny_bundle(tmp_path / "2", version="2.0.0").path
        damage(second)  # type: ignore[operator]
        outcome = await device.updater.install(second)
        assert (outcome.result, outcome.reason) == (Result.REJECTED, reason)
        assert outcome.message
        assert device.version() == "1.0.0"
        assert device.state() is State.COMMITTED
        assert [path.name for path in device.store.layout.staging.iterdir()] == ["partial"]

    asyncio.run(scenario())


def test_a_file_that_is_no_bundle_is_refused(device: Device, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\0" * 2048 + b"no")
    outcome = asyncio.run(device.updater.install(tmp_path / "x.tar"))
    assert (outcome.result, outcome.reason, outcome.model) == (Result.REJECTED, "bad_bundle", None)
    assert device.store.models() == []


def test_a_local_bundle_is_self_tested_too(device: Device, tmp_path: Path) -> None:
    outcome = asyncio.run(device.updater.install(tiny_bundle(tmp_path / "b", bad=True).path))
    assert (outcome.result, outcome.reason) == (Result.REJECTED, "selftest")
    assert device.version() is None


def test_installing_a_rejected_release_by_hand_forgives_it(device: Device, tmp_path: Path) -> None:
    async def scenario() -> None:
        for version in ("1.0.0", "2.0.0"):
            await device.updater.install(tiny_bundle(tmp_path / version, version=version).path)
            await device.commit()
        await device.updater.roll_back("demo")
        assert len(device.store.record("demo").rejected) == 1
        outcome = await device.updater.install(tmp_path / "2.0.0")
        assert outcome.result is Result.SUCCEEDED
        assert device.version() == "2.0.0"
        assert device.store.record("demo").rejected == ()

    asyncio.run(scenario())


def test_the_signed_floor_holds_by_hand_too(tmp_path: Path, publisher: Publisher) -> None:
    async def scenario() -> None:
        device = Device(tmp_path / "store", publisher)
        publisher.assign(publisher.publish("2.0.0"), minimum_version=Version("2.0.0"))
        await device.follow()
        outcome = await device.updater.install(tiny_bundle(tmp_path / "old", version="1.0.0").path)
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "below_floor")
        assert device.version() == "2.0.0"
        device.store.close()

    asyncio.run(scenario())


def test_the_repository_wins_over_a_local_install_at_the_next_look(
    tmp_path: Path, publisher: Publisher
) -> None:
    async def scenario() -> None:
        device = Device(tmp_path / "store", publisher)
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        await device.updater.install(tiny_bundle(tmp_path / "local", version="9.0.0").path)
        assert device.version() == "9.0.0"
        await device.updater.run_once()
        assert device.version() == "1.0.0"
        device.store.close()

    asyncio.run(scenario())


def test_a_stopped_agents_store_can_be_installed_into(tmp_path: Path, publisher: Publisher) -> None:
    """As the command line does it: no serving side; the agent's next start begins the probation."""
    bundle = tiny_bundle(tmp_path / "b", version="1.0.0")

    async def alone() -> None:
        with Store.open(tmp_path / "store") as store:
            updater = Updater(UpdatesConfig(), "unit-1", store, None, None)
            outcome = await updater.install(bundle.path)
            assert outcome.result is Result.SUCCEEDED
            assert store.record("demo").starts == 0

    async def agent() -> None:
        device = Device(tmp_path / "store", publisher, source="")
        await device.updater.recover()
        device.serving.take_up(device.store)
        assert (device.state(), device.store.record("demo").starts) == (State.PROBATION, 1)
        await device.commit()
        assert device.state() is State.COMMITTED
        device.store.close()

    asyncio.run(alone())
    asyncio.run(agent())


def test_a_stopped_agents_store_can_be_rolled_back(tmp_path: Path) -> None:
    async def alone() -> None:
        with Store.open(tmp_path / "store") as store:
            updater = Updater(UpdatesConfig(in_process=True), "unit-1", store, None, None)
            for version in ("1.0.0", "2.0.0"):
                await updater.install(tiny_bundle(tmp_path / version, version=version).path)
            outcome = await updater.roll_back(None)
            assert (outcome.result, outcome.version) == (Result.SUCCEEDED, "1.0.0")
            current = store.current("demo")
            assert current is not None
            assert current.manifest.version == "1.0.0"

    asyncio.run(alone())

"""A device follows its repository: install, prove, commit; and every way in which a release is refused."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent import __version__
from edge_agent.config import ProbationConfig
from edge_agent.contract.bundle import MODEL, RULES, Bundle, write_bundle
from edge_agent.contract.manifest import Requirements
from edge_agent.contract.version import Version
from edge_agent.errors import EngineError
from edge_agent.store.state import Result, State
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Iterator[Device]:
    device = Device(tmp_path / "store", publisher)
    yield device
    device.store.close()


def requiring(folder: Path, version: str, requires: Requirements) -> Bundle:
    """A tiny bundle that asks something of the device."""
    plain = tiny_bundle(folder / "plain", version=version)
    files = {name: plain.read(name) for name in plain.manifest.members}
    (folder / "requiring").mkdir()
    return write_bundle(
        folder / "requiring", msgspec.structs.replace(plain.manifest, requires=requires), files
    )


def test_a_first_release_goes_live_and_is_committed_once_it_proved_itself(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.state, outcome.version) == (None, State.PROBATION, "1.0.0")
        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0"]
        assert device.state() is State.PROBATION
        assert device.shown_state() == "probation"

        await device.commit()
        assert device.state() is State.COMMITTED
        assert device.store.record("demo").last_result == "succeeded"
        assert device.result_count("succeeded") == 1
        status = device.updater.status()["models"]["demo"]
        assert status["self_test"]["passed"]
        assert status["self_test"]["vectors"] == 8

    asyncio.run(scenario())


def test_an_update_keeps_the_release_before_it_and_swaps_once(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        publisher.assign(publisher.publish("2.0.0"))
        await device.follow()
        assert device.version() == "2.0.0"
        assert device.serving.swaps == ["1.0.0", "2.0.0"]
        previous = device.store.previous("demo")
        assert previous is not None
        assert previous.manifest.version == "1.0.0"

    asyncio.run(scenario())


def test_only_members_that_changed_are_moved(device: Device, publisher: Publisher, tmp_path: Path) -> None:
    async def scenario() -> None:
        first = tiny_bundle(tmp_path / "first", version="1.0.0")
        publisher.assign(publisher.publish_bundle(first))
        await device.follow()
        files = {name: first.read(name) for name in first.manifest.members}
        (tmp_path / "second").mkdir()
        second = write_bundle(
            tmp_path / "second",
            msgspec.structs.replace(first.manifest, version=Version("1.0.1")),
            files | {RULES: files[RULES] + b"\n# edited\n"},
        )
        publisher.assign(publisher.publish_bundle(second))
        for name, member in first.manifest.members.items():
            if name != RULES:  # not there to be fetched: it must not be asked for
                (publisher.path / "blobs" / "sha256" / member.digest.hex).unlink()
        await device.follow()
        assert device.version() == "1.0.1"

    asyncio.run(scenario())


def test_nothing_new_starts_no_worker_and_writes_nothing(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        (publisher.path / "metadata" / "1.root.json").unlink()  # a full check would fail now
        for path in (publisher.path / "metadata").glob("*.snapshot.json"):
            path.unlink()
        record = (device.store.layout.model("demo") / "update.json").stat().st_mtime_ns
        outcome = await device.updater.run_once()
        assert outcome.result is Result.SUCCEEDED
        assert (device.store.layout.model("demo") / "update.json").stat().st_mtime_ns == record

    asyncio.run(scenario())


def test_the_same_release_assigned_again_is_already_installed(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        release = publisher.publish("1.0.0")
        publisher.assign(release)
        await device.follow()
        publisher.assign(release, minimum_version=Version("1.0.0"))
        outcome = await device.updater.run_once()
        assert outcome.result is Result.ALREADY_INSTALLED
        assert device.serving.swaps == ["1.0.0"]

    asyncio.run(scenario())


def test_the_cohort_gets_the_candidate_and_the_others_the_stable_release(
    device: Device, publisher: Publisher, tmp_path: Path
) -> None:
    other = Device(tmp_path / "other", publisher, "unit-2")

    async def scenario() -> None:
        first = publisher.publish("1.0.0")
        publisher.assign_candidate(publisher.publish("2.0.0"), stable=first)
        assert (await device.updater.run_once()).version == "2.0.0"
        assert device.store.record("demo").rollout == "r1"
        assert (await other.updater.run_once()).version == "1.0.0"

    asyncio.run(scenario())
    other.store.close()


def test_no_release_for_this_device_is_no_artifact(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        assert (await device.updater.run_once()).result is Result.NO_ARTIFACT
        publisher.assign(None)
        assert (await device.updater.run_once()).result is Result.NO_ARTIFACT
        assert device.store.models() == []

    asyncio.run(scenario())


def test_an_older_release_assigned_again_is_installed_without_moving_a_byte(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        first, second = publisher.publish("1.0.0"), publisher.publish("2.0.0")
        for release in (first, second):
            publisher.assign(release)
            await device.follow()
        for blob in (publisher.path / "blobs" / "sha256").iterdir():
            blob.unlink()
        publisher.assign(first)
        await device.follow()
        assert device.version() == "1.0.0"
        assert device.state() is State.COMMITTED

    asyncio.run(scenario())


def test_a_held_device_keeps_what_it_has_until_it_is_let_go(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        second = publisher.publish("2.0.0")
        publisher.assign(second, held=("unit-1",))
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.state, outcome.reason) == (None, State.HELD, "held")
        assert device.version() == "1.0.0"
        publisher.assign(second)
        await device.follow()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def test_the_kill_switch_holds_over_a_restart(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        release = publisher.publish("1.0.0")
        publisher.assign(release)
        await device.follow()
        publisher.assign(release, killed=True)
        await device.updater.run_once()
        assert device.serving.killed == {"demo": True}
        await device.restart()
        assert device.serving.killed == {"demo": True}
        publisher.assign(release)
        await device.updater.run_once()
        assert device.serving.killed == {"demo": False}

    asyncio.run(scenario())


def test_two_models_are_followed_each_by_itself(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        publisher.assign(publisher.publish("3.0.0", name="other", bad=True), name="other")
        outcome = await device.updater.run_once()
        assert {one.model: one.result for one in outcome.models} == {"demo": None, "other": Result.REJECTED}
        assert outcome.model == "other"  # the weightiest
        assert device.version("demo") == "1.0.0"
        assert device.version("other") is None

    asyncio.run(scenario())


# Refused, and the current release untouched


def refused(device: Device, publisher: Publisher, second: Bundle | None = None, **options: object) -> None:
    """1.0.0 is committed, then 2.0.0 is assigned."""

    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        release = publisher.publish_bundle(second) if second else publisher.publish("2.0.0", **options)
        publisher.assign(release)

    asyncio.run(scenario())


def assert_untouched(device: Device) -> None:
    assert device.version() == "1.0.0"
    assert device.serving.swaps == ["1.0.0"]
    assert device.serving.running["demo"].manifest.version == "1.0.0"


def test_a_release_whose_golden_vectors_differ_is_rejected_for_good(
    device: Device, publisher: Publisher
) -> None:
    refused(device, publisher, bad=True)

    async def scenario() -> None:
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason, outcome.state) == (Result.REJECTED, "selftest", State.IDLE)
        assert "golden vector 0 of 8" in outcome.message
        assert_untouched(device)
        assert device.result_count("rejected") == 1

        await device.restart()
        again = await device.updater.run_once()
        assert (again.result, again.reason) == (Result.REJECTED, "selftest")
        assert "was rejected here before" in again.message
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_a_model_that_cannot_be_loaded_is_rejected_for_good(device: Device, publisher: Publisher) -> None:
    refused(device, publisher)

    async def scenario() -> None:
        device.serving.fault = EngineError("no memory")
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "engine")
        assert_untouched(device)
        assert device.store.record("demo").rejected[0].version == "2.0.0"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        (Requirements(arch=("riscv128",)), "wrong_arch"),
        (Requirements(arch=("riscv128", platform.machine()), agent=Version("99.0.0")), "agent_too_old"),
    ],
)
def test_a_release_for_other_devices_is_rejected_before_it_is_fetched(
    device: Device, publisher: Publisher, tmp_path: Path, requires: Requirements, reason: str
) -> None:
    refused(device, publisher, requiring(tmp_path, "2.0.0", requires))
    blobs = len(list(device.store.layout.blobs.iterdir()))

    outcome = asyncio.run(device.updater.run_once())

    assert (outcome.result, outcome.reason) == (Result.REJECTED, reason)
    assert len(list(device.store.layout.blobs.iterdir())) == blobs
    assert_untouched(device)
    assert device.store.record("demo").rejected == ()  # a newer agent may take it


def test_what_the_device_fulfils_is_installed(device: Device, publisher: Publisher, tmp_path: Path) -> None:
    requires = Requirements(arch=(platform.machine(),), agent=Version(__version__))
    refused(device, publisher, requiring(tmp_path, "2.0.0", requires))
    asyncio.run(device.updater.run_once())
    assert device.version() == "2.0.0"


def test_a_release_that_is_too_large_is_rejected(tmp_path: Path, publisher: Publisher) -> None:
    device = Device(tmp_path / "store", publisher, max_bundle_bytes=1000)
    publisher.assign(publisher.publish("1.0.0"))
    outcome = asyncio.run(device.updater.run_once())
    assert (outcome.result, outcome.reason) == (Result.REJECTED, "too_large")
    assert device.version() is None
    device.store.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(lambda data: data[: len(data) // 2], "truncated"), (lambda data: data[::-1], "blob_mismatch"),
     (lambda data: data + b"more", "blob_mismatch")],
    ids=["truncated", "swapped", "longer"],
)  # fmt: skip
def test_a_blob_that_is_not_what_was_signed_changes_nothing_and_is_tried_again(
    device: Device, publisher: Publisher, damage: object, reason: str
) -> None:
    refused(device, publisher)
    current = device.store.current("demo")
    assert current is not None
    blobs = publisher.path / "blobs" / "sha256"
    known = {member.digest.hex for member in current.manifest.members.values()}
    good = {path: path.read_bytes() for path in blobs.iterdir() if path.name not in known}
    for path, data in good.items():  # the member, and the parcel that would be fetched instead
        path.write_bytes(damage(data))  # type: ignore[operator]

    async def scenario() -> None:
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.FAILED_NO_STATE_CHANGE, reason)
        assert_untouched(device)

        for path, data in good.items():
            path.write_bytes(data)
        await device.updater.run_once()
        assert device.version() == "1.0.0", "it waits before it tries again"
        device.clock.sleep(60)
        await device.updater.run_once()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def test_a_missing_blob_changes_nothing(device: Device, publisher: Publisher) -> None:
    refused(device, publisher)
    for blob in (publisher.path / "blobs" / "sha256").iterdir():
        blob.unlink()
    outcome = asyncio.run(device.updater.run_once())
    assert (outcome.result, outcome.reason) == (Result.FAILED_NO_STATE_CHANGE, "not_found")
    assert_untouched(device)


# The store's copy of what is assigned is damaged


def test_a_damaged_current_release_is_fetched_again_by_itself(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        model = device.store.layout.model("demo") / "current" / MODEL
        model.chmod(0o644)
        model.write_bytes(b"not a model")

        await device.updater.run_once()

        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0", "1.0.0"], "the repaired release is loaded again"
        await device.commit()
        assert device.state() is State.COMMITTED

    asyncio.run(scenario())


def test_a_model_that_serving_lost_is_loaded_again(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        device.serving.states["demo"] = "failed"
        await device.updater.run_once()
        assert device.serving.states["demo"] == "ready"
        device.serving.states["demo"] = "unloaded"  # an operator wants it so
        device.clock.sleep(1000)
        await device.updater.run_once()
        assert device.serving.states["demo"] == "unloaded"

    asyncio.run(scenario())


def test_the_run_loop_survives_what_it_does_not_expect(device: Device, publisher: Publisher) -> None:
    """A serving side that raises something unheard of is a failed update, not a dead updater."""
    publisher.assign(publisher.publish("1.0.0"))
    device.serving.fault = LookupError("our bug")
    device.config = msgspec.structs.replace(device.config, probation=ProbationConfig())

    async def scenario() -> None:
        running = asyncio.create_task(device.updater.run())
        async with asyncio.timeout(20):
            while device.store.record("demo").last is None:
                device.clock.sleep(5)
                await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        last = device.store.record("demo").last
        assert last is not None
        assert (last.result, last.reason) == (Result.FAILED_NO_STATE_CHANGE, "bug")
        assert device.version() is None

    asyncio.run(scenario())

"""Probation, roll-back, restarts: the release before comes back by itself, and what failed stays away."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.contract.assignments import Release
from edge_agent.contract.version import Version
from edge_agent.errors import InvalidInput, UnknownModel
from edge_agent.store.layout import PREVIOUS
from edge_agent.store.state import Result, State, UpdateRecord
from tests.store.faults import RefusingDisk
from tests.update.devices import Device, Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Iterator[Device]:
    device = Device(tmp_path / "store", publisher)
    yield device
    device.store.close()


async def on_probation(device: Device, publisher: Publisher) -> Release:
    """1.0.0 is committed, 2.0.0 is live and on probation."""
    publisher.assign(publisher.publish("1.0.0"))
    await device.follow()
    second = publisher.publish("2.0.0")
    publisher.assign(second)
    await device.updater.run_once()
    assert (device.state(), device.version()) == (State.PROBATION, "2.0.0")
    return second


def test_faults_on_probation_bring_the_old_release_back(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        device.serving.tallies["demo"].rows = 20
        device.serving.tallies["demo"].fallback_rows = 20

        outcome = await device.updater.run_once()

        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0", "2.0.0", "1.0.0"]
        assert device.state() is State.ROLLED_BACK
        assert device.result_count("failed_rollback_complete") == 1
        record = device.store.record("demo")
        assert (record.last_result, record.last_reason) == ("failed_rollback_complete", "fallback")
        # The same round looks at the repository, which still assigns it: it stays rejected.
        assert (outcome.result, outcome.reason) == (Result.FAILED_ROLLBACK_COMPLETE, "fallback")

        await device.restart()
        again = await device.updater.run_once()
        assert (again.result, again.reason) == (Result.REJECTED, "fallback")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_a_release_lost_by_serving_on_probation_is_taken_back(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        device.serving.states["demo"] = "failed"
        await device.updater.run_once()
        assert device.version() == "1.0.0"
        assert device.store.record("demo").last_reason == "not_running"

    asyncio.run(scenario())


async def first_release_fails(device: Device, publisher: Publisher) -> None:
    publisher.assign(publisher.publish("1.0.0"))
    await device.updater.run_once()
    device.serving.tallies["demo"].rows = device.serving.tallies["demo"].fallback_rows = 50
    await device.updater.run_once()


def test_where_a_first_release_fails_its_rules_answer_also_after_a_restart(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await first_release_fails(device, publisher)
        assert device.serving.states == {"demo": "rejected"}
        record = device.store.record("demo")
        assert (record.last_result, record.last_reason) == ("failed_rollback_complete", "fallback")
        assert device.result_count("failed_unable_to_rollback") == 0
        await device.restart()
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "fallback")
        assert device.serving.states == {"demo": "rejected"}
        assert device.serving.swaps == [], "what failed is not even loaded"

    asyncio.run(scenario())


def test_a_better_release_follows_a_rejected_first_one_and_there_is_no_way_back_to_that(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await first_release_fails(device, publisher)
        publisher.assign(publisher.publish("1.0.1"))
        await device.follow()
        assert (device.version(), device.state()) == ("1.0.1", State.COMMITTED)
        assert device.serving.states == {"demo": "ready"}
        outcome = await device.updater.roll_back("demo")
        assert (outcome.result, outcome.reason) == (Result.FAILED_NO_STATE_CHANGE, "no_previous")
        assert device.serving.states == {"demo": "ready"}
        publisher.assign(publisher.publish("1.0.2"))
        await device.follow()
        assert (await device.updater.roll_back("demo")).version == "1.0.1"

    asyncio.run(scenario())


def test_a_second_release_that_fails_after_a_rejected_first_one_leaves_the_rules(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await first_release_fails(device, publisher)
        publisher.assign(publisher.publish("1.0.1"))
        await device.updater.run_once()
        device.serving.tallies["demo"].rows = device.serving.tallies["demo"].fallback_rows = 50
        await device.updater.run_once()
        assert device.serving.states == {"demo": "rejected"}
        assert [str(one.version) for one in device.store.record("demo").rejected] == ["1.0.0", "1.0.1"]
        assert device.store.record("demo").last_result == "failed_rollback_complete"

    asyncio.run(scenario())


def test_an_operator_forgives_a_rejected_first_release_by_installing_it(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await first_release_fails(device, publisher)
        outcome = await device.updater.install(publisher.folder / "bundle-1")
        assert (outcome.result, device.state()) == (Result.SUCCEEDED, State.PROBATION)
        await device.commit()
        assert device.serving.states == {"demo": "ready"}
        await device.restart()
        assert device.serving.states == {"demo": "ready"}

    asyncio.run(scenario())


def test_a_first_release_that_keeps_ending_the_agent_is_not_run_again(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.updater.run_once()
        for _ in range(3):
            await device.restart()
        assert device.store.record("demo").last_reason == "crash_loop"
        assert device.serving.swaps == []
        assert device.serving.states == {"demo": "rejected"}

    asyncio.run(scenario())


def test_a_device_without_traffic_commits_in_the_end(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        device.clock.sleep(3599)
        await device.updater.run_once()
        assert device.state() is State.PROBATION
        device.clock.sleep(2)
        await device.updater.run_once()
        assert device.state() is State.COMMITTED

    asyncio.run(scenario())


def test_another_assignment_on_probation_goes_back_first(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        publisher.assign(publisher.publish("3.0.0"))
        await device.updater.run_once()
        assert device.version() == "3.0.0"
        assert device.serving.swaps == ["1.0.0", "2.0.0", "1.0.0", "3.0.0"]
        previous = device.store.previous("demo")
        assert previous is not None
        assert previous.manifest.version == "1.0.0", "never to a release that did not prove itself"
        assert device.result_count("aborted") == 1
        assert device.store.record("demo").rejected == (), "2.0.0 did nothing wrong"

    asyncio.run(scenario())


def test_the_fleet_going_back_ends_probation_on_the_old_release(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        first = publisher.repository.release("demo", Version("1.0.0"))
        publisher.assign(first)
        outcome = await device.updater.run_once()
        assert outcome.result is Result.ALREADY_INSTALLED
        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0", "2.0.0", "1.0.0"]

    asyncio.run(scenario())


def test_another_assignment_replaces_a_first_release_on_probation(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.updater.run_once()
        publisher.assign(publisher.publish("1.1.0"))
        await device.follow()
        assert device.version() == "1.1.0"
        assert device.state() is State.COMMITTED

    asyncio.run(scenario())


def test_probation_goes_on_after_a_restart_and_starts_its_time_again(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        device.clock.sleep(50)
        await device.restart()
        assert (device.state(), device.store.record("demo").starts) == (State.PROBATION, 2)
        device.serving.tallies["demo"].rows = 100
        device.clock.sleep(20)
        await device.updater.run_once()
        assert device.state() is State.PROBATION
        await device.commit()
        assert device.state() is State.COMMITTED
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def answer(device: Device, rows: int, late: int) -> None:
    """So many more rows were answered, so many of them by the rules because the time was over."""
    tally = device.serving.tallies["demo"]
    tally.rows += rows
    tally.late_rows += late
    tally.fallback_rows += late
    tally.latencies = (sum(tally.latencies) + rows, 0)


def test_a_device_that_is_busy_for_a_minute_refuses_no_release(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        second = await on_probation(device, publisher)
        for _ in range(2):
            answer(device, 100, late=100)
            await device.updater.run_once()
            device.clock.sleep(61)
            await device.updater.run_once()
            assert (device.state(), device.version()) == (State.PROBATION, "2.0.0")
        answer(device, 100, late=0)
        device.clock.sleep(61)
        await device.updater.run_once()
        assert device.state() is State.COMMITTED
        assert device.store.record("demo").rejection(second.digest) is None

    asyncio.run(scenario())


def test_a_release_that_is_late_look_after_look_is_taken_back(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        second = await on_probation(device, publisher)
        for _ in range(3):
            answer(device, 100, late=20)
            device.clock.sleep(61)
            await device.updater.run_once()
        record = device.store.record("demo")
        assert (record.state, record.last_reason) == (State.ROLLED_BACK, "deadline")
        assert record.rejection(second.digest) is not None
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_a_release_that_fails_otherwise_is_taken_back_at_once_on_a_busy_device_too(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        answer(device, 100, late=50)
        device.serving.tallies["demo"].fallback_rows += 10
        await device.updater.run_once()
        assert device.store.record("demo").last_reason == "fallback"

    asyncio.run(scenario())


def test_a_crash_loop_on_probation_rolls_back_at_the_next_start(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        second = await on_probation(device, publisher)
        for _ in range(2):  # max_restarts
            await device.restart()
            assert device.version() == "2.0.0"
        await device.restart()
        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0"], "it rolled back before anything was served"
        record = device.store.record("demo")
        assert (record.state, record.last_reason) == (State.ROLLED_BACK, "crash_loop")
        assert record.rejection(second.digest) is not None

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [State.TESTING, State.SHADOWING])
def test_an_agent_that_is_stopped_in_good_order_holds_nothing_against_what_it_was_trying(
    device: Device, publisher: Publisher, state: State
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        second = publisher.publish("2.0.0")
        for _ in range(5):
            record = device.store.record("demo")
            device.store.save("demo", msgspec.structs.replace(record, state=state, candidate=second))
            device.store.close()
            device.start()
            await device.updater._ledger.track("demo")  # as it is in the middle of it
            await device.updater.stop()
            await device.restart()
            record = device.store.record("demo")
            assert (record.state, record.interrupted) == (State.IDLE, 0)
        publisher.assign(second)
        await device.follow()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def test_dying_again_and_again_in_the_self_test_rejects_the_release(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        second = publisher.publish("2.0.0")
        for _ in range(3):
            record = device.store.record("demo")
            device.store.save("demo", msgspec.structs.replace(record, state=State.TESTING, candidate=second))
            await device.restart()
            assert device.state() is State.IDLE
        publisher.assign(second)
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "crash_loop")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


@pytest.mark.parametrize("state", list(State))
def test_the_agent_comes_up_from_every_state_and_can_be_updated(
    device: Device, publisher: Publisher, state: State
) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        record = device.store.record("demo")
        device.store.save("demo", msgspec.structs.replace(record, state=state))
        await device.restart()
        assert device.version() in ("1.0.0", "2.0.0")
        third = publisher.publish("3.0.0")
        publisher.assign(third)
        for _ in range(3):  # what was interrupted may want to be ended first
            device.clock.sleep(3600)
            await device.updater.run_once()
        assert device.version() == "3.0.0"

    asyncio.run(scenario())


def test_an_interrupted_activation_is_finished(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        # As if the power had failed between the record and the pointer.
        first = device.store.previous("demo")
        assert first is not None
        record = device.store.record("demo")
        device.store.activate(first)
        device.store.save("demo", msgspec.structs.replace(record, state=State.ACTIVATING))
        await device.restart()
        assert (device.version(), device.state()) == ("2.0.0", State.PROBATION)

    asyncio.run(scenario())


# By hand


def test_a_manual_roll_back_is_instant_and_stays(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        await device.commit()
        outcome = await device.updater.roll_back(None)
        assert (outcome.result, outcome.version) == (Result.SUCCEEDED, "1.0.0")
        assert device.version() == "1.0.0"
        assert device.serving.swaps[-1] == "1.0.0"
        # The repository still assigns 2.0.0.
        await device.updater.run_once()
        await device.restart()
        again = await device.updater.run_once()
        assert (again.result, again.reason) == (Result.REJECTED, "operator")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_a_roll_back_with_nowhere_to_go_changes_nothing(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        outcome = await device.updater.roll_back("demo")
        assert (outcome.result, outcome.reason) == (Result.FAILED_NO_STATE_CHANGE, "no_previous")
        assert device.store.record("demo").rejected == ()
        with pytest.raises(UnknownModel):
            await device.updater.roll_back("unheard-of")

    asyncio.run(scenario())


def test_a_roll_back_must_name_the_model_where_there_is_none(device: Device) -> None:
    with pytest.raises(InvalidInput, match="the store holds no model; install one first"):
        asyncio.run(device.updater.roll_back(None))


def test_no_roll_back_goes_below_the_signed_floor(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        second = await on_probation(device, publisher)
        publisher.assign(second, minimum_version=Version("2.0.0"))
        await device.updater.run_once()
        outcome = await device.updater.roll_back("demo")
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "below_floor")
        assert device.version() == "2.0.0"

        device.serving.tallies["demo"].rows = device.serving.tallies["demo"].fallback_rows = 50
        await device.updater.run_once()
        assert device.version() == "2.0.0"
        record = device.store.record("demo")
        assert (record.last_result, record.last_reason) == ("failed_unable_to_rollback", "below_floor")

    asyncio.run(scenario())


def test_a_roll_back_to_a_damaged_release_is_refused(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        await device.commit()
        model = device.store.layout.model("demo") / PREVIOUS / "model.onnx"
        model.chmod(0o644)
        model.write_bytes(b"rot")
        outcome = await device.updater.roll_back("demo")
        assert (outcome.result, outcome.reason) == (Result.FAILED_NO_STATE_CHANGE, "corrupt_previous")
        assert device.version() == "2.0.0"
        assert device.store.record("demo").rejected == ()

    asyncio.run(scenario())


# A disk that refuses


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_in_any_step_keeps_the_old_release_or_has_the_new_one(
    tmp_path: Path, publisher: Publisher, number: int
) -> None:
    async def scenario() -> None:
        device = Device(tmp_path / "store", publisher)
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        device.store.close()
        publisher.assign(publisher.publish("2.0.0"))
        at, tried, switched = 1, 0, False
        while True:
            device.folder = tmp_path / f"store-{at}"
            shutil.copytree(tmp_path / "store", device.folder, symlinks=True)
            disk = RefusingDisk(10**9, number, forever=True)
            await device.restart(disk)
            disk.refuse_from_now_on(at)
            outcome = await device.updater.run_once()
            if disk.obeyed:
                break
            tried += 1
            switched = switched or device.version() == "2.0.0"
            if not switched:
                assert outcome.result is Result.FAILED_NO_STATE_CHANGE, at
                assert outcome.reason in ("disk_full", "io"), at
                assert device.serving.swaps == ["1.0.0"], at
                assert device.version() == "1.0.0", at
            else:  # the switch itself may not be durable: then the old one goes on answering
                assert device.serving.swaps in (["1.0.0"], ["1.0.0", "2.0.0"]), at
                assert device.store.record("demo").rejected == (), at
                assert device.version() == "2.0.0", at
            # Space again: it goes on by itself, now or after a restart.
            await device.restart()
            device.clock.sleep(3600)
            await device.updater.run_once()
            assert device.version() == "2.0.0", at
            device.store.close()
            at += 5
        assert tried > 10
        assert switched
        device.store.close()

    asyncio.run(scenario())


def test_a_disk_that_refuses_the_roll_back_does_not_keep_a_bad_model_in_service(
    tmp_path: Path, publisher: Publisher
) -> None:
    async def scenario() -> None:
        device = Device(tmp_path / "store", publisher)
        await on_probation(device, publisher)
        disk = RefusingDisk(10**9, forever=True)
        await device.restart(disk)
        device.serving.tallies["demo"].rows = device.serving.tallies["demo"].fallback_rows = 50
        disk.refuse_from_now_on()
        await device.updater.run_once()
        assert device.shown_state() == "rolling_back"
        assert device.serving.swaps == ["2.0.0", "1.0.0"], "the old one answers, whatever the disk says"
        await device.updater.run_once()
        assert device.result_count("failed_unable_to_rollback") == 1
        disk.obey()
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.ROLLED_BACK, "1.0.0")
        assert device.serving.swaps == ["2.0.0", "1.0.0"]
        device.store.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("rot", ["zeros", "a letter"])
def test_what_was_rejected_stays_rejected_though_the_record_rots(
    device: Device, publisher: Publisher, rot: str
) -> None:
    async def scenario() -> None:
        bad = await on_probation(device, publisher)
        device.serving.tallies["demo"].rows = device.serving.tallies["demo"].fallback_rows = 50
        await device.updater.run_once()
        record = device.store.layout.model("demo") / "update.json"
        data = record.read_bytes()
        hex_ = bad.digest.hex.encode()
        other = (b"0" if hex_[:1] != b"0" else b"1") + hex_[1:]
        record.write_bytes(bytes(len(data)) if rot == "zeros" else data.replace(hex_, other))
        await device.restart()
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "fallback")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_the_kill_switch_and_the_floor_outlive_the_record(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        first = publisher.publish("1.0.0")
        publisher.assign(first, killed=True, minimum_version=Version("1.0.0"))
        await device.follow()
        (device.store.layout.model("demo") / "update.json").write_bytes(b"")
        await device.restart()
        assert device.serving.killed == {"demo": True}
        assert device.store.record("demo").minimum_version == "1.0.0"

    asyncio.run(scenario())


def test_a_record_without_its_second_file_costs_memory_and_nothing_else(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        await on_probation(device, publisher)
        (device.store.layout.model("demo") / "update.json").write_bytes(b"\0" * 100)
        await device.restart()
        assert device.version() == "2.0.0"
        assert device.store.record("demo") == UpdateRecord()
        outcome = await device.updater.run_once()
        assert outcome.result is Result.ALREADY_INSTALLED

    asyncio.run(scenario())

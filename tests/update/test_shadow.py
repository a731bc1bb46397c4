"""Shadow, then switch: the candidate sees requests beside the release that answers, and must agree first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge_agent.config import ShadowConfig
from edge_agent.contract.assignments import Mode, Release
from edge_agent.store.state import State
from edge_agent.update.policy import Shadowed, Verdict, judge_shadow
from tests.update import devices
from tests.update.devices import Device, Publisher

CONFIG = ShadowConfig(requests=100, seconds=600, max_disagreement=0.05, max_latency_ratio=4.0)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    return Device(tmp_path / "store", publisher, shadow=CONFIG)


@pytest.mark.parametrize(
    ("seen", "verdict", "reason"),
    [
        (Shadowed(1, 99, 99, 0, 0.001, 0.001), Verdict.WAIT, "shadow"),
        (Shadowed(1, 100, 100, 5, 0.001, 0.001), Verdict.HEALTHY, "agreed"),
        (Shadowed(1, 10, 10, 6, 0.001, 0.001), Verdict.UNHEALTHY, "disagreement"),  # certain before the end
        (Shadowed(601, 10, 10, 1, 0.001, 0.001), Verdict.UNHEALTHY, "disagreement"),
        (Shadowed(601, 0, 0, 0, 0.0, 0.0), Verdict.HEALTHY, "agreed"),
        (Shadowed(1, 100, 100, 0, 0.0015, 0.0001), Verdict.HEALTHY, "agreed"),  # fast enough for anybody
        (Shadowed(1, 100, 100, 0, 0.030, 0.005), Verdict.UNHEALTHY, "shadow_slow"),
    ],
)
def test_disagreement_and_latency_decide(seen: Shadowed, verdict: Verdict, reason: str) -> None:
    assert judge_shadow(CONFIG, seen)[:2] == (verdict, reason)


async def in_shadow(device: Device, publisher: Publisher) -> tuple[Release, Release]:
    old = publisher.publish("1.0.0")
    publisher.assign(old)
    await device.follow()
    new = publisher.publish("2.0.0")
    publisher.assign_candidate(new, stable=old, mode=Mode.SHADOW)
    await device.updater.run_once()
    assert (device.state(), device.version()) == (State.SHADOWING, "1.0.0")
    assert device.serving.shadows["demo"].manifest.version == "2.0.0"
    return old, new


def test_what_agrees_goes_live_and_on_probation(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        await device.updater.run_once()
        assert device.state() is State.SHADOWING, "nothing was compared yet"
        shown = device.updater.status()["models"]["demo"]["shadow"]
        assert (shown["version"], shown["requests"]) == ("2.0.0", 0)
        device.serving.shadowed = devices.Shadowed(100, 100, 0, 0.001, 0.001)
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.PROBATION, "2.0.0")
        assert not device.serving.shadows
        await device.commit()
        assert device.state() is State.COMMITTED

    asyncio.run(scenario())


def test_what_disagrees_is_rejected_for_good_and_never_answered(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        device.serving.shadowed = devices.Shadowed(20, 20, 20, 0.001, 0.001)
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.IDLE, "1.0.0")
        assert device.serving.swaps == ["1.0.0"]
        assert device.store.record("demo").last_reason == "disagreement"
        assert device.serving.forgotten == ["2.0.0"]
        await device.restart()
        await device.updater.run_once()
        assert not device.serving.shadows

    asyncio.run(scenario())


def test_a_restart_begins_the_shadow_again(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        await device.restart()
        assert (device.state(), device.version()) == (State.IDLE, "1.0.0")
        await device.updater.run_once()
        assert device.state() is State.SHADOWING

    asyncio.run(scenario())


def test_the_same_release_in_active_mode_ends_the_shadow(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        old, new = await in_shadow(device, publisher)
        publisher.assign_candidate(new, stable=old, mode=Mode.ACTIVE)
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.PROBATION, "2.0.0")

    asyncio.run(scenario())


def test_another_release_ends_the_shadow(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        publisher.assign(publisher.publish("3.0.0"))
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.PROBATION, "3.0.0")
        assert not device.serving.shadows

    asyncio.run(scenario())


def test_an_operator_goes_first(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        publisher.publish("1.5.0")
        await device.updater.install(publisher.folder / "bundle-3")
        assert (device.state(), device.version()) == (State.PROBATION, "1.5.0")
        assert not device.serving.shadows

    asyncio.run(scenario())


def test_a_hold_keeps_the_shadow_where_it_is(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await in_shadow(device, publisher)
        await device.updater.hold(None, "")
        device.serving.shadowed = devices.Shadowed(100, 100, 0, 0.001, 0.001)
        await device.updater.run_once()
        assert (device.state(), device.version()) == (State.SHADOWING, "1.0.0")
        await device.updater.release_hold()
        await device.updater.run_once()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def test_the_first_release_is_not_a_shadow_of_nothing(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign_candidate(publisher.publish("1.0.0"), stable=None, mode=Mode.SHADOW)
        outcome = await device.updater.run_once()
        assert (outcome.state, outcome.reason, device.version()) == (State.HELD, "shadow", None)

    asyncio.run(scenario())

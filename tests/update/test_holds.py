"""The device's own say: windows, the hold file, by hand; nothing new begins, nothing that runs is touched."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from pathlib import Path

import pytest

from edge_agent.config import WindowConfig
from edge_agent.errors import InvalidInput
from edge_agent.store.state import State
from edge_agent.update.holds import APART, FILE_NAME, LONGEST, MESSAGE_FILE, Holds, closed
from tests.update.devices import Device, Publisher

NIGHT = WindowConfig(start="22:00", end="02:00", days=("fri",))
LUNCH = WindowConfig(start="12:00", end="13:00")
FRIDAY = datetime.datetime(2026, 11, 20, tzinfo=datetime.UTC)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    return Device(tmp_path / "store", publisher)


@pytest.mark.parametrize(
    ("day", "clock", "open_"),
    [
        (0, (11, 59), False),
        (0, (12, 0), True),
        (0, (13, 0), False),
        (0, (22, 0), True),
        (1, (1, 59), True),  # Friday's window reaches into Saturday
        (1, (2, 0), False),
        (1, (22, 30), False),  # and there is none on Saturday
    ],
)
def test_a_window_is_open_from_its_start_until_its_end(day: int, clock: tuple[int, int], open_: bool) -> None:
    now = FRIDAY + datetime.timedelta(days=day, hours=clock[0], minutes=clock[1])
    assert (closed((NIGHT, LUNCH), now) is None) is open_


def test_a_closed_window_says_when_the_next_one_opens() -> None:
    hold = closed((NIGHT, LUNCH), FRIDAY + datetime.timedelta(hours=14))
    assert hold is not None
    assert hold.until == (FRIDAY + datetime.timedelta(hours=22)).timestamp()


def test_without_windows_every_time_is_right() -> None:
    assert closed((), FRIDAY) is None


@pytest.mark.parametrize(
    ("content", "held"),
    [
        (b"", True),
        (b"\nshift change\n", True),
        (b"2026-11-21T10:00:00+00:00\n", True),
        (b"2026-11-20T10:00:00+00:00\n", False),
        (b"tomorrow\n", True),
        (b"\xff\xfe\x00", True),
        (b"99999-01-01", True),
    ],
)
def test_a_hold_file_holds_until_its_time_and_in_doubt(tmp_path: Path, content: bytes, held: bool) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    now = (FRIDAY + datetime.timedelta(hours=12)).timestamp()
    assert (Holds(tmp_path).in_force(now) is not None) is held


def test_a_hold_set_by_hand_is_read_back_and_released(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    now = FRIDAY.timestamp()
    holds.set("2026-11-20T08:00:00+00:00", "line 3 is\nbusy", now)
    hold = Holds(tmp_path).in_force(now)
    assert hold is not None
    assert (hold.reason, hold.until) == ("line 3 is busy", now + 8 * 3600)
    assert Holds(tmp_path).in_force(now + 8 * 3600) is None
    holds.release()
    holds.release()
    assert Holds(tmp_path).in_force(now) is None


@pytest.mark.parametrize("until", ["soon", "2026-11-19T08:00:00+00:00", "25:00"])
def test_a_hold_until_nonsense_or_the_past_is_refused(tmp_path: Path, until: str) -> None:
    with pytest.raises(InvalidInput, match="until"):
        Holds(tmp_path).set(until, "", FRIDAY.timestamp())
    assert not (tmp_path / FILE_NAME).exists()


def test_an_update_waits_for_the_end_of_a_hold_and_then_comes(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        until = datetime.datetime.fromtimestamp(device.clock.now() + 600, datetime.UTC).isoformat()
        said = await device.updater.hold(until, "audit")
        assert (said["held"], said["reason"]) == (True, "audit")
        publisher.assign(publisher.publish("2.0.0"))
        outcome = await device.updater.run_once()
        assert (outcome.state, outcome.reason) == (State.HELD, "file")
        assert (device.version(), device.shown_state()) == ("1.0.0", "held")
        assert device.updater.status()["hold"]["reason"] == "audit"
        device.clock.sleep(601)  # nothing changes in the repository: the end of the hold is enough
        await device.follow()
        assert (device.version(), device.state()) == ("2.0.0", State.COMMITTED)

    asyncio.run(scenario())


def test_a_hold_survives_a_restart_and_ends_when_it_is_released(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.updater.hold(None, "")
        await device.updater.run_once()
        await device.restart()
        await device.updater.run_once()
        assert device.version() is None
        assert await device.updater.release_hold() == {
            "held": False, "kind": None, "until": None, "reason": "",
        }  # fmt: skip
        await device.updater.run_once()
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_outside_the_windows_an_update_waits(tmp_path: Path, publisher: Publisher) -> None:
    device = Device(tmp_path / "store", publisher)
    hour = datetime.datetime.fromtimestamp(device.clock.now()).astimezone() + datetime.timedelta(hours=3)
    window = WindowConfig(start=f"{hour.hour:02}:00", end=f"{hour.hour:02}:59")
    device.store.close()
    device = Device(tmp_path / "store", publisher, windows=(window,))

    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        outcome = await device.updater.run_once()
        assert (outcome.state, outcome.reason) == (State.HELD, "window")
        opens = device.updater.status()["hold"]["until"]
        device.clock.seconds += datetime.datetime.fromisoformat(opens).timestamp() - device.clock.now()
        await device.updater.run_once()
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_a_hold_that_comes_while_an_update_is_under_way_stops_it_before_it_goes_live(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        publisher.assign(publisher.publish("2.0.0"))
        plain = device.serving.prepare

        async def slow(bundle):  # type: ignore[no-untyped-def]
            await device.updater.hold(None, "now")
            return await plain(bundle)

        device.serving.prepare = slow  # type: ignore[method-assign]
        outcome = await device.updater.run_once()
        assert (outcome.state, outcome.reason, device.version()) == (State.HELD, "file", "1.0.0")
        assert device.serving.forgotten == ["2.0.0"]
        device.serving.prepare = plain  # type: ignore[method-assign]
        await device.updater.release_hold()
        await device.follow()
        assert (device.version(), device.state()) == ("2.0.0", State.COMMITTED)

    asyncio.run(scenario())


def test_what_a_person_does_by_hand_and_a_repair_do_not_wait(
    tmp_path: Path, device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        await device.updater.hold(None, "")
        model = device.store.layout.model("demo") / "current" / "model.onnx"
        model.chmod(0o644)
        model.write_bytes(b"rot")
        await device.updater.run_once()
        assert device.version() == "1.0.0"
        await device.commit()
        await device.updater.install(publisher.folder / "bundle-1")
        publisher.publish("1.1.0")
        await device.updater.install(publisher.folder / "bundle-2")
        assert device.version() == "1.1.0"
        await device.updater.roll_back(None)
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


# By message


NOW = FRIDAY.timestamp()


def said(hours: float, reason: str = "batch 17") -> bytes:
    until = (FRIDAY + datetime.timedelta(hours=hours)).isoformat()
    return json.dumps({"until": until, "reason": reason}).encode()


def test_a_message_holds_until_its_time_over_restarts_and_releases_only_what_messages_set(
    tmp_path: Path,
) -> None:
    hold = Holds(tmp_path).heed(said(8), NOW)
    assert hold == Holds(tmp_path).in_force(NOW + 1)
    assert hold is not None
    assert (hold.kind, hold.reason, hold.until) == ("mqtt", "batch 17", NOW + 8 * 3600)
    assert Holds(tmp_path).in_force(NOW + 8 * 3600) is None
    Holds(tmp_path).set(None, "by hand", NOW)
    assert Holds(tmp_path).heed(b"", NOW + 60) is None
    by_hand = Holds(tmp_path).in_force(NOW + 60)
    assert by_hand is not None
    assert by_hand.kind == "file"
    Holds(tmp_path).release()
    assert Holds(tmp_path).in_force(NOW + 60) is None


@pytest.mark.parametrize("release", [b"", b" ", b"{}", b'{"until": null, "reason": "done"}'])
def test_an_empty_message_or_one_without_a_time_releases(tmp_path: Path, release: bytes) -> None:
    holds = Holds(tmp_path)
    assert holds.heed(release, NOW) is None, "also where nothing is held"
    holds.heed(said(8), NOW)
    assert holds.heed(release, NOW + 60) is None
    assert holds.in_force(NOW + 60) is None


def test_whoever_publishes_without_end_holds_a_day_and_then_leaves_an_hour(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    held = []
    for hour in range(60):
        now = NOW + hour * 3600
        with contextlib.suppress(InvalidInput):
            holds.heed(said(10_000), now)
        if hour % 5 == 0:
            holds.heed(b"", now + 1)  # a release in between begins no new day
        with contextlib.suppress(InvalidInput):
            holds.heed(said(10_000), now + 2)
        held.append(holds.in_force(now + 1800) is not None)
    assert LONGEST == 24 * APART
    assert held == [True] * 24 + [False] + [True] * 24 + [False] + [True] * 10


def test_a_longer_hold_is_made_shorter_and_says_so(tmp_path: Path) -> None:
    hold = Holds(tmp_path).heed(said(10_000), NOW)
    assert hold is not None
    assert hold.until == NOW + LONGEST


@pytest.mark.parametrize(
    "message",
    [
        b"hold", b"[]", b'"x"', b'{"until": 7}', b'{"until": "soon"}', b'{"until": "99999-01-01"}',
        said(-1), b"\xff", b"[" * 5000, b'{"until": "2026-11-20T08:00:00+00:00", "reason": 5}',
    ],
)  # fmt: skip
def test_a_message_that_is_none_is_refused_and_changes_nothing(tmp_path: Path, message: bytes) -> None:
    with pytest.raises(InvalidInput):
        Holds(tmp_path).heed(message, NOW)
    assert not (tmp_path / MESSAGE_FILE).exists()


@pytest.mark.parametrize("content", [b"", b"x", b"\n\n\n", b"2030-01-01\nwhy\nnever\n", b"\xff" * 100])
def test_a_damaged_message_file_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MESSAGE_FILE).write_bytes(content)
    assert Holds(tmp_path).in_force(NOW) is None
    assert Holds(tmp_path).heed(said(8), NOW) is not None


def test_a_clock_that_was_set_back_does_not_make_a_hold_longer(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    holds.heed(said(8), NOW)
    assert holds.in_force(NOW - 7 * 24 * 3600) is None


def test_an_update_waits_for_a_message_and_goes_on_after_another(
    device: Device, publisher: Publisher
) -> None:
    async def scenario() -> None:
        until = datetime.datetime.fromtimestamp(device.clock.now() + 600, datetime.UTC).isoformat()
        shown = await device.updater.heed(json.dumps({"until": until, "reason": "line 3"}).encode())
        assert (shown["held"], shown["kind"], shown["reason"]) == (True, "mqtt", "line 3")
        publisher.assign(publisher.publish("1.0.0"))
        outcome = await device.updater.run_once()
        assert (outcome.state, outcome.reason, device.version()) == (State.HELD, "mqtt", None)
        await device.restart()
        assert (await device.updater.run_once()).reason == "mqtt"
        assert (await device.updater.heed(b""))["held"] is False
        await device.follow()
        assert device.version() == "1.0.0"

    asyncio.run(scenario())

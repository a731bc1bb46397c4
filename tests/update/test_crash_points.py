"""The power fails at every file-system call of whole updates: what was not fsynced is lost or reordered.

``EDGE_CRASH=all`` (``make test-crash``) tries every point, the normal suite a bounded sample of them. Both
print how many states were tried and how many broke an invariant.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.errors import StoreError
from tests.store.medium import Image, Medium, RecordingDisk
from tests.update.crash import (
    SCENARIOS,
    Promise,
    Scenario,
    Stage,
    check,
    device_at,
    metadata_in,
    promise_of,
    start,
)
from tests.update.devices import Device

ALL = os.environ.get("EDGE_CRASH") == "all"
SEED = 1
# What the sample takes of the whole: it is meant to take ten seconds, the whole takes half an hour.
SAMPLE = ("update", "taken-back")
SHARE = 0.2  # of the calls
CHOSEN = [scenario for scenario in SCENARIOS if ALL or scenario.name in SAMPLE]

scenarios = pytest.mark.parametrize("scenario", CHOSEN, ids=lambda scenario: scenario.name)
pytestmark = pytest.mark.timeout(3600 if ALL else 120)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: thousands of stores are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # thousands of crashes have much to say
    yield
    logging.disable(logging.NOTSET)


class Tally:
    """What was tried, and what broke."""

    def __init__(self, stage: Stage, *, every_call: bool = ALL) -> None:
        self._stage = stage
        self._every_call = every_call
        self._chance = random.Random(SEED)
        self._seen: dict[tuple[object, Promise], tuple[str, Image]] = {}
        self._floor, self._new = metadata_in(stage.origin), stage.metadata()
        self.points = 0
        self.tried = 0
        self.broken = Counter[str]()

    def at(self, store: Path, medium: Medium, where: str, mixtures: int = 4) -> None:
        """A point where the power may fail: note what it may leave."""
        if not self._every_call and mixtures and self._chance.random() > SHARE:
            return
        self.points += 1
        promise = promise_of(store, medium, self._floor, self._new)
        for image in medium.states(self._chance, mixtures):
            self._seen.setdefault((image.fingerprint(), promise), (where, image))

    def play(self, *, most: int, settle_every: int) -> None:
        """Check what was noted; a bounded sample of it in the normal suite."""
        noted = [(promise, *found) for (_, promise), found in self._seen.items()]
        if not ALL and len(noted) > most:
            noted = self._chance.sample(noted, most)
        for number, (promise, where, image) in enumerate(noted):
            path = self._stage.folder / "cut"
            broken = check(self._stage, image, promise, path, settle=number % settle_every == 0)
            self.tried += 1
            if broken:
                self.broken[f"{broken} ({where})"] += 1
        self._seen.clear()

    def until_broken(self, what: str) -> bool:
        """Check everything noted, in any order, until a state is broken in this way."""
        noted = [(promise, *found) for (_, promise), found in self._seen.items()]
        self._chance.shuffle(noted)
        path = self._stage.folder / "cut"
        return any(
            what in (check(self._stage, image, promise, path, settle=False) or "")
            for promise, _, image in noted
        )

    def say(self, capsys: pytest.CaptureFixture[str], what: str) -> None:
        with capsys.disabled():
            print(
                f"\n{what}, {self._stage.scenario.name}: power cut at {self.points} calls, "
                f"{self.tried} states tried, {self.broken.total()} failed",
                end="",
            )
        assert not self.broken, "\n".join(f"{n}x {what}" for what, n in self.broken.most_common(20))


@pytest.fixture
def stage(tmp_path: Path, scenario: Scenario) -> Stage:
    (tmp_path / scenario.name).mkdir()
    return Stage(scenario, tmp_path / scenario.name).build()


def play(stage: Stage, store: Path, disk: RecordingDisk) -> None:
    """The scenario on a disk under observation; it may not start where the disk refuses."""
    with contextlib.suppress(StoreError):
        device = device_at(store, stage.fleet, disk)
        try:
            asyncio.run(stage.scenario.act(device))
        finally:
            device.store.close()
    disk.medium.observe()


@scenarios
def test_a_power_cut_at_any_call_of_an_update(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(stage)
    store = stage.copy("store")
    disk = RecordingDisk(
        store, lambda number, call, medium: tally.at(store, medium, f"before call {number}, {call}")
    )
    play(stage, store, disk)
    tally.at(store, disk.medium, "at the end")
    assert len(disk.calls) > 10, "the calls are no longer seen"
    tally.play(most=60, settle_every=10)
    tally.say(capsys, "power cut")


@scenarios
def test_a_second_power_cut_while_it_recovers(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(stage)
    firsts: list[Image] = []
    chance = random.Random(SEED)

    def first(number: int, call: str, medium: Medium) -> None:
        # What was all lost, all kept, and one mixture: everything else between is the first test's.
        if ALL or chance.random() < SHARE:
            states = list(medium.states(chance, 1))
            firsts.extend((states[0], medium.live, states[-1]))

    store = stage.copy("store")
    play(stage, store, RecordingDisk(store, first))
    different = list({image.fingerprint(): image for image in firsts}.values())
    for number, image in enumerate(different if ALL else chance.sample(different, 4)):
        path = stage.folder / f"again-{number}"
        image.write(path)
        disk = RecordingDisk(path, recovering(tally, path, number))
        device = device_at(path, stage.fleet, disk)
        asyncio.run(start(device))
        device.store.close()
    tally.play(most=20, settle_every=20)
    tally.say(capsys, "power cut while it recovers from one")


def recovering(tally: Tally, path: Path, number: int) -> Callable[[int, str, Medium], None]:
    def at(call_number: int, call: str, medium: Medium) -> None:
        tally.at(path, medium, f"state {number}, before call {call_number} of recovery, {call}", 1)

    return at


@scenarios
def test_a_kill_and_then_a_power_cut(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed process leaves everything visible, and part of it not durable: its successor cannot know."""
    tally = Tally(stage)
    killed: list[tuple[Path, Medium]] = []
    store = stage.copy("store")
    calls = RecordingDisk(stage.copy("counted"))
    play(stage, stage.folder / "counted", calls)
    wanted = set(range(1, len(calls.calls) + 1))
    if not ALL:
        wanted = set(random.Random(SEED).sample(sorted(wanted), 2))

    def kill(number: int, call: str, medium: Medium) -> None:
        if number in wanted:
            path = stage.folder / f"killed-{number}"
            medium.live.write(path)
            killed.append((path, medium.moved(path)))

    play(stage, store, RecordingDisk(store, kill))
    for path, medium in killed:
        disk = RecordingDisk(path, after_kill(tally, path), medium=medium)
        play(stage, path, disk)
    tally.play(most=20, settle_every=20)
    tally.say(capsys, "kill, restart, power cut")


def after_kill(tally: Tally, path: Path) -> Callable[[int, str, Medium], None]:
    def at(number: int, call: str, medium: Medium) -> None:
        if medium.carries:  # later it is like any other update
            tally.at(path, medium, f"{path.name}, before call {number}, {call}", 0)

    return at


@scenarios
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["no-space", "io-error"])
def test_a_disk_that_refuses_one_call_and_then_a_power_cut(
    stage: Stage, error: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any call, so every fsync, too; a failed fsync has lost its pages for good."""
    tally = Tally(stage)
    counted = RecordingDisk(stage.copy("counted"))
    play(stage, stage.folder / "counted", counted)
    numbers = list(range(1, len(counted.calls) + 1))
    for number in numbers if ALL else random.Random(SEED + error).sample(numbers, 2):
        store = stage.copy(f"refused-{number}")
        disk = RecordingDisk(store, refuse=(number, error))
        where = f"{errno.errorcode[error]} at call {number}, {counted.calls[number - 1]}"
        go_on_after_a_refusal(stage, tally, store, disk, where)
    tally.play(most=20, settle_every=20)
    tally.say(capsys, f"{errno.errorcode[error]}, once more, power cut")


def go_on_after_a_refusal(stage: Stage, tally: Tally, store: Path, disk: RecordingDisk, where: str) -> None:
    """The same process tries again, with what it believes is on the disk."""

    def at(number: int, call: str, medium: Medium) -> None:
        if medium.carries:
            tally.at(store, medium, f"{where}, again, before call {number}, {call}", 0)

    async def again(device: Device) -> None:
        await stage.scenario.act(device)
        disk.medium.observe()
        disk.medium.mark()
        tally.at(store, disk.medium, where, 0)
        disk.at_each = at
        for _ in range(2):
            device.clock.sleep(2000)
            await device.updater.run_once()
            await stage.scenario.settle(device)

    try:
        device = device_at(store, stage.fleet, disk)
    except StoreError:
        disk.medium.observe()
    else:
        asyncio.run(again(device))
        device.store.close()
    disk.medium.observe()
    tally.at(store, disk.medium, f"{where}, at the end", 0)


@pytest.mark.parametrize("scenario", [SCENARIOS[0]], ids=["update"])
@pytest.mark.parametrize(
    ("forgotten", "what"),
    [
        (lambda path: path.name == "releases", "current is not whole"),
        (lambda path: path.parents[1].name == "staging" and path.suffix == "", "not whole"),
        (lambda path: path.name == "tuf", "trusted metadata went back"),
        (lambda path: path.suffix == ".onnx", "not whole"),
    ],
    ids=["release-folder", "staged-folder", "metadata-folder", "members"],
)
def test_a_forgotten_fsync_would_be_noticed(
    stage: Stage, forgotten: Callable[[Path], bool], what: str
) -> None:
    tally = Tally(stage, every_call=True)
    store = stage.copy("store")

    def at(number: int, call: str, medium: Medium) -> None:
        tally.at(store, medium, f"before call {number}, {call}")

    disk = RecordingDisk(store, at, forget=forgotten)
    play(stage, store, disk)
    tally.at(store, disk.medium, "at the end")
    assert tally.until_broken(what)

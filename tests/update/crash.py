"""Whole updates under a power cut: the updates, and what must hold of everything a power cut may leave.

The invariants are those of docs/operations.md, "What a power cut may do". ``check`` says in words which of
them did not hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import ProbationConfig
from edge_agent.contract.bundle import open_bundle
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import ContractError
from edge_agent.errors import EdgeError
from edge_agent.store.fs import TEMPORARY, Disk
from edge_agent.store.state import Result, State, UpdateRecord
from edge_agent.store.store import Store
from edge_agent.update.machine import BUSY
from tests.store.medium import Image, Medium
from tests.update.devices import Device, Publisher

MODEL = "demo"
ROLES = ("targets", "rollout", "snapshot", "timestamp")
# A crash loop is another test's business.
PROBATION = ProbationConfig(seconds=60, requests=100, max_seconds=3600, max_restarts=1000)


class Repository:
    """The publisher as a device sees it: two paths."""

    def __init__(self, folder: Path) -> None:
        self.path, self.root = folder / "repository", folder / "root.json"


def device_at(store: Path, fleet: Path, disk: Disk | None = None) -> Device:
    """An agent that starts on a store; not recovered yet."""
    return Device(store, Repository(fleet), disk=disk, probation=PROBATION)  # type: ignore[arg-type]


async def start(device: Device) -> None:
    """What the agent does before it follows the repository."""
    await device.updater.recover()
    device.serving.take_up(device.store)


async def healthy(device: Device) -> None:
    """A start, an update, a probation with good answers."""
    await start(device)
    await device.updater.run_once()
    await prove(device)


async def prove(device: Device) -> None:
    for tally in device.serving.tallies.values():
        tally.rows += 100
    device.clock.sleep(61)
    await device.updater.run_once()


async def unhealthy(device: Device) -> None:
    """A start, an update, and the rules must answer where 2.0.0 should."""
    await start(device)
    await device.updater.run_once()
    await disappoint(device)


async def disappoint(device: Device) -> None:
    running = device.serving.running.get(MODEL)
    if running is None or running.manifest.version != "2.0.0":
        await prove(device)
        return
    device.serving.tallies[MODEL].rows += 100
    device.serving.tallies[MODEL].fallback_rows += 100
    await device.updater.run_once()


async def taken_back_by_hand(device: Device) -> None:
    await start(device)
    with contextlib.suppress(EdgeError):
        await device.updater.roll_back(MODEL)


Act = Callable[[Device], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Scenario:
    """An update, from a store at rest to a store at rest.

    Attributes:
        before: the releases that were installed one after the other.
        assigned: the release that the repository names then; None: nothing new.
        bad: its golden vectors do not agree.
        act: what happens.
        settle: the traffic that a release on probation sees after the crash.
        ends: the release that answers once everything has come to rest.
        state: the state that the update is in then.
        rejected: whether 2.0.0 is refused from then on.
    """

    name: str
    act: Act
    settle: Act
    before: tuple[str, ...] = ("1.0.0",)
    assigned: str | None = "2.0.0"
    bad: bool = False
    ends: str = "2.0.0"
    states: tuple[State, ...] = (State.COMMITTED,)
    rejected: bool = False

    @property
    def allowed(self) -> set[str | None]:
        """What may answer at any time."""
        here = {self.before[-1] if self.before else None, self.ends}
        return here if self.bad else {*here, self.assigned} - ({None} if self.before else set())


REST = (State.IDLE, State.COMMITTED)
SCENARIOS = (
    Scenario("update", healthy, prove),
    Scenario("first-install", healthy, prove, before=()),
    Scenario("third-update", healthy, prove, before=("0.9.0", "1.0.0")),
    Scenario("refused-by-self-test", healthy, prove, bad=True, ends="1.0.0", states=REST, rejected=True),
    Scenario(
        "taken-back", unhealthy, disappoint, ends="1.0.0", states=(State.ROLLED_BACK, State.IDLE),
        rejected=True,
    ),
    Scenario(
        "taken-back-by-hand", taken_back_by_hand, prove, before=("1.0.0", "2.0.0"), assigned=None,
        ends="1.0.0", states=(State.ROLLED_BACK, State.IDLE), rejected=True,
    ),
)  # fmt: skip


@dataclass
class Stage:
    """A scenario ready to be played: a fleet, a store, and the digests of its releases."""

    scenario: Scenario
    folder: Path
    digests: dict[str, Digest] = field(default_factory=dict)

    @property
    def fleet(self) -> Path:
        return self.folder / "fleet"

    @property
    def origin(self) -> Path:
        return self.folder / "origin"

    def build(self) -> Stage:
        publisher = Publisher(self.fleet)
        device = device_at(self.origin, self.fleet)
        asyncio.run(start(device))
        for version in self.scenario.before:
            self._assign(publisher, version)
            asyncio.run(device.updater.run_once())
            asyncio.run(prove(device))
            assert device.version() == version
        device.store.close()
        if self.scenario.assigned is not None:
            self._assign(publisher, self.scenario.assigned)
        return self

    def _assign(self, publisher: Publisher, version: str) -> None:
        release = publisher.publish(version, bad=self.scenario.bad and version == self.scenario.assigned)
        self.digests[version] = release.digest
        publisher.assign(release)

    def copy(self, name: str) -> Path:
        """A store of one's own to spoil."""
        Medium(self.origin).live.write(self.folder / name)  # hard links stay links
        return self.folder / name

    def metadata(self) -> dict[str, int]:
        """The versions that the repository has now."""
        versions = {}
        for role in ROLES:
            names = (self.fleet / "repository" / "metadata").glob(f"*{role}.json")
            versions[role] = max(_version(path.read_bytes()) for path in names)
        return versions


def _version(data: bytes) -> int:
    try:
        return int(json.loads(data)["signed"]["version"])
    except (ValueError, KeyError):
        return 0


def metadata_in(store: Path) -> dict[str, int]:
    """The versions of the metadata that a store trusts."""
    return {
        role: _version(path.read_bytes()) if (path := store / "tuf" / f"{role}.json").exists() else 0
        for role in ROLES
    }


@dataclass(frozen=True)
class Promise:
    """What the agent has said or done already when the power fails, and must still be so afterwards."""

    metadata: tuple[tuple[str, int], ...] = ()  # at least these versions
    rejected: frozenset[Digest] = frozenset()
    committed: Digest | None = None  # said to be so, and nothing else begun since


def promise_of(store: Path, medium: Medium, floor: dict[str, int], new: dict[str, int]) -> Promise:
    """What is owed at this moment: ``floor`` from the beginning, ``new`` once a release is acted upon."""
    path = store / "models" / MODEL / "update.json"
    record = UpdateRecord()
    if path.exists():
        record = _parsed(path)
    acting = record.state in BUSY or record.state is State.PROBATION
    said = record if medium.is_certain(path) else UpdateRecord()
    rejected = frozenset(entry.digest for entry in said.rejected)
    proven = said.candidate if said.state is State.COMMITTED else None
    committed = proven.digest if proven else None
    return Promise(tuple((new if acting else floor).items()), rejected, committed)


def _parsed(path: Path) -> UpdateRecord:
    return Store.read(path.parents[2]).record(path.parent.name)


class Violation(AssertionError):
    """An invariant that did not hold."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


def check_as_found(stage: Stage, path: Path) -> None:
    """Before anything recovers: somebody who only looks sees a whole release."""
    store = Store.read(path)
    current = whole(store, "current")
    version = current[0] if current else None
    hold(version in stage.scenario.allowed, f"current is {version}")
    record = store.record(MODEL)
    untested = record.state in (State.ACTIVATING, State.PROBATION)
    if untested and version == stage.scenario.assigned and stage.scenario.before:
        previous = whole(store, "previous")
        old = stage.scenario.before[-1]
        hold(previous and previous[0] == old, f"previous is {previous} before the commit")


def whole(store: Store, name: str) -> tuple[str, Digest] | None:
    """The release that a pointer names, every byte of it proven."""
    digest = store.pointer(MODEL, name)
    if digest is None:
        return None
    try:
        bundle = open_bundle(store.layout.release(digest))
        bundle.verify()
    except ContractError as error:
        raise Violation(f"{name} is not whole: {error}") from error
    hold(bundle.digest == digest, f"{name} has another manifest")
    return str(bundle.manifest.version), digest


def check_recovered(stage: Stage, device: Device, promise: Promise) -> None:
    """After the start: it serves, what was promised holds, and what is said is so."""
    scenario, store = stage.scenario, device.store
    current = whole(store, "current")
    version, digest = current or (None, None)
    hold(version in scenario.allowed, f"current is {version} after recovery")
    running = device.serving.running.get(MODEL)
    hold((running.digest if running else None) == digest, "what is served is not what is current")
    record = store.record(MODEL)
    hold(promise.committed in (None, digest), "what was committed is no longer current")
    refused = {entry.digest for entry in record.rejected}
    hold(promise.rejected <= refused, "a rejected release is no longer rejected")
    hold(
        digest not in refused or record.state is State.ROLLING_BACK or not scenario.before,
        "a rejected release is current",
    )
    found = metadata_in(store.layout.root)
    hold(
        all(found[role] >= least for role, least in promise.metadata),
        f"trusted metadata went back: {found}, promised {promise.metadata}",
    )
    candidate = record.candidate.digest if record.candidate else None
    if record.state in (State.COMMITTED, State.PROBATION):
        hold(candidate == digest, f"{record.state.value}, and the candidate is not current")
    if record.state is State.ROLLED_BACK:
        hold(candidate != digest, "rolled_back, and the candidate is current")
    if record.state is State.COMMITTED and record.last and record.last.result is Result.SUCCEEDED:
        hold(record.last.digest == digest, "succeeded, and it is not current")
    hold(record.state not in BUSY or record.state is State.ROLLING_BACK, f"still {record.state.value}")
    root = store.layout.root
    hold(not list(root.rglob(f"{TEMPORARY}*")), "temporary names are left")
    hold([p.name for p in store.layout.staging.iterdir()] == ["partial"], "the staging folder is not empty")


def at_rest(device: Device) -> object:
    """What a second recovery must not change."""
    store = device.store
    record = msgspec.structs.replace(store.record(MODEL), starts=0, interrupted=0)
    return (
        store.pointer(MODEL), store.pointer(MODEL, "previous"), record,
        sorted(p.name for p in store.layout.releases.iterdir()), metadata_in(store.layout.root),
    )  # fmt: skip


async def check_settles(stage: Stage, device: Device) -> None:
    """Following the repository again, it ends where it should, and leaves nothing behind."""
    scenario, store = stage.scenario, device.store
    for _ in range(4):
        await device.updater.run_once()
        await scenario.settle(device)
        device.clock.sleep(2000)
    if scenario.act is taken_back_by_hand and device.version() == "2.0.0":
        return  # the power failed before the command counted
    hold(device.version() == scenario.ends, f"ends at {device.version()}")
    record = store.record(MODEL)
    hold(record.state in (*scenario.states, State.IDLE), f"ends in {record.state.value}")
    if scenario.rejected:
        hold(record.rejection(stage.digests["2.0.0"]), "2.0.0 is not rejected")
    hold(metadata_in(store.layout.root) == stage.metadata(), "the metadata is not the newest")
    store.collect_garbage()
    kept = {str(path.name) for path in store.layout.releases.iterdir()}
    hold(len(kept) <= 3, f"{len(kept)} releases are kept")
    needed = {
        member.digest.hex
        for name in kept
        for member in open_bundle(store.layout.releases / name).manifest.members.values()
    }
    hold({path.name for path in store.layout.blobs.iterdir()} == needed, "blobs that nobody needs")
    hold(not list(store.layout.root.rglob(f"{TEMPORARY}*")), "temporary names are left at the end")
    hold(not list(store.layout.partial.iterdir()), "half downloads are left at the end")


def check(stage: Stage, image: Image, promise: Promise, path: Path, *, settle: bool) -> str:
    """Play what happens after a power cut that left ``image``; '' or what did not hold."""
    image.write(path)
    return check_folder(stage, path, promise, settle=settle)


def check_folder(stage: Stage, path: Path, promise: Promise, *, settle: bool) -> str:
    try:
        check_as_found(stage, path)
        device = device_at(path, stage.fleet)
        asyncio.run(start(device))
        check_recovered(stage, device, promise)
        once = at_rest(device)
        device.store.close()
        device = device_at(path, stage.fleet)
        asyncio.run(start(device))
        hold(at_rest(device) == once, "a second recovery changes something")
        if settle:
            asyncio.run(check_settles(stage, device))
        device.store.close()
    except Violation as violation:
        return str(violation)
    finally:
        shutil.rmtree(path)
    return ""

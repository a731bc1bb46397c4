"""Every state of an update times everything that can go wrong in it, as data; named as Mender names them.

A row says what happens *while* the fault lasts (which release ``current`` names, and what the device says of
itself) and where it ends once the fault is gone. The fault strikes as soon as the state is on the disk.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.contract.assignments import Mode
from edge_agent.store import state as records
from edge_agent.store.fs import TEMPORARY, Disk
from edge_agent.store.state import State
from tests.store.medium import Medium
from tests.update.crash import MODEL, PROBATION, disappoint, prove, start
from tests.update.devices import DEVICE, Device, Publisher, Shadowed

PATIENCE = 30.0  # seconds for what takes milliseconds


class Fault(enum.Enum):
    ERROR = "Error"  # the next call of the disk fails
    KILLED = "Killed"  # the process ends
    HANG = "Hang"  # the disk does not return
    NO_SPACE = "No_space"  # every call of the disk fails until somebody makes space
    WRONG_SIGNATURE = "Wrong_signature"  # the repository is replaced by somebody else's
    NETWORK_CUT = "Network_cut"  # the repository is gone


@dataclass(frozen=True)
class Row:
    """What must come of one fault in one state.

    Attributes:
        answers: the release that is current when the round with the fault is over. The same serves, but where
            the disk does not let a roll-back happen: then the old one serves all the same.
        says: the trouble with the repository then, else how the last update ended (at first: that of 1.0.0).
        ends: release and state once the fault is gone and the device has followed its repository again.
    """

    state: State
    fault: Fault
    answers: str
    says: str
    ends: tuple[str, State]

    def __str__(self) -> str:
        return f"{self.fault.value}_in_{self.state.value}"


OLD, NEW = "1.0.0", "2.0.0"
# A state at rest writes nothing, so nothing hangs in it: idle, held, committed, rolled_back lack that row.
ROWS = [
    Row(State.IDLE, Fault.ERROR, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.IDLE, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.IDLE, Fault.NO_SPACE, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.IDLE, Fault.WRONG_SIGNATURE, OLD, "signature", (NEW, State.COMMITTED)),
    Row(State.IDLE, Fault.NETWORK_CUT, OLD, "unreachable", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.ERROR, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.WRONG_SIGNATURE, OLD, "signature", (NEW, State.COMMITTED)),
    Row(State.CHECKING, Fault.NETWORK_CUT, OLD, "unreachable", (NEW, State.COMMITTED)),
    Row(State.HELD, Fault.ERROR, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.HELD, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.HELD, Fault.NO_SPACE, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.HELD, Fault.WRONG_SIGNATURE, OLD, "signature", (NEW, State.COMMITTED)),
    Row(State.HELD, Fault.NETWORK_CUT, OLD, "unreachable", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.ERROR, NEW, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.WRONG_SIGNATURE, OLD, "signature", (NEW, State.COMMITTED)),
    Row(State.DOWNLOADING, Fault.NETWORK_CUT, OLD, "unreachable", (NEW, State.COMMITTED)),
    Row(State.VERIFYING, Fault.ERROR, NEW, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.VERIFYING, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.VERIFYING, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.VERIFYING, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.VERIFYING, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.VERIFYING, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.STAGED, Fault.ERROR, NEW, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.STAGED, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.STAGED, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.STAGED, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.STAGED, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.STAGED, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.TESTING, Fault.ERROR, NEW, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.TESTING, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.TESTING, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.TESTING, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.TESTING, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.TESTING, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.SHADOWING, Fault.ERROR, OLD, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.SHADOWING, Fault.KILLED, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.SHADOWING, Fault.HANG, NEW, "succeeded", (NEW, State.IDLE)),
    Row(State.SHADOWING, Fault.NO_SPACE, OLD, "succeeded", (NEW, State.COMMITTED)),
    Row(State.SHADOWING, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.SHADOWING, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.IDLE)),
    Row(State.ACTIVATING, Fault.ERROR, NEW, "failed_no_state_change", (NEW, State.COMMITTED)),
    Row(State.ACTIVATING, Fault.KILLED, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.ACTIVATING, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.ACTIVATING, Fault.NO_SPACE, OLD, "disk_full", (NEW, State.COMMITTED)),
    Row(State.ACTIVATING, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.ACTIVATING, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.PROBATION, Fault.ERROR, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.PROBATION, Fault.KILLED, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.PROBATION, Fault.HANG, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.PROBATION, Fault.NO_SPACE, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.PROBATION, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.PROBATION, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.COMMITTED, Fault.ERROR, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.COMMITTED, Fault.KILLED, NEW, "succeeded", (NEW, State.IDLE)),
    Row(State.COMMITTED, Fault.NO_SPACE, NEW, "succeeded", (NEW, State.COMMITTED)),
    Row(State.COMMITTED, Fault.WRONG_SIGNATURE, NEW, "signature", (NEW, State.IDLE)),
    Row(State.COMMITTED, Fault.NETWORK_CUT, NEW, "unreachable", (NEW, State.COMMITTED)),
    Row(State.ROLLING_BACK, Fault.ERROR, OLD, "failed_rollback_complete", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLING_BACK, Fault.KILLED, OLD, "failed_rollback_complete", (OLD, State.IDLE)),
    Row(State.ROLLING_BACK, Fault.HANG, OLD, "failed_rollback_complete", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLING_BACK, Fault.NO_SPACE, NEW, "succeeded", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLING_BACK, Fault.WRONG_SIGNATURE, OLD, "signature", (OLD, State.IDLE)),
    Row(State.ROLLING_BACK, Fault.NETWORK_CUT, OLD, "unreachable", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLED_BACK, Fault.ERROR, OLD, "failed_rollback_complete", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLED_BACK, Fault.KILLED, OLD, "failed_rollback_complete", (OLD, State.IDLE)),
    Row(State.ROLLED_BACK, Fault.NO_SPACE, OLD, "failed_rollback_complete", (OLD, State.ROLLED_BACK)),
    Row(State.ROLLED_BACK, Fault.WRONG_SIGNATURE, OLD, "signature", (OLD, State.IDLE)),
    Row(State.ROLLED_BACK, Fault.NETWORK_CUT, OLD, "unreachable", (OLD, State.ROLLED_BACK)),
]  # fmt: skip


class Trap(Disk):
    """Strikes when a state has come to the disk (``checking``, which never does: when metadata is kept)."""

    def __init__(self, state: State, strike: Callable[[], None]) -> None:
        self._state = state
        self._strike = strike
        self._announced = False
        self.sprung = False
        self.fail: int | None = None  # errno of every call
        self.once = False
        self.wait: threading.Event | None = None
        self.waits = threading.Event()

    def before(self, call: str, path: Path) -> None:
        if not self.sprung and self._is_reached(call, path):
            self.sprung = True
            self._strike()
            return
        if self.sprung and self.wait is not None:
            self.waits.set()
            assert self.wait.wait(PATIENCE)
            self.wait = None
        if self.sprung and self.fail is not None:
            number, self.fail = self.fail, None if self.once else self.fail
            raise OSError(number, os.strerror(number))

    def _is_reached(self, call: str, path: Path) -> bool:
        if self._state is State.CHECKING:
            return "tuf" in path.parts and call == "open"
        if call == "fsync" and path.name.startswith(TEMPORARY) and path.parent.parent.name == "models":
            self._announced = records.parse(path.read_bytes()).state is self._state
            return False
        return self._announced and call == "fsync" and path.parent.name == "models"


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two repositories, one of them held, and a device at 1.0.0: made once, copied for each row."""
    folder = tmp_path_factory.mktemp("fleets")
    publisher = Publisher(folder / "fleet")
    old = publisher.publish(OLD)
    publisher.assign(old)
    device = Device(folder / "store", publisher, probation=PROBATION)
    asyncio.run(device.follow())
    assert device.version() == OLD
    device.store.close()
    new = publisher.publish(NEW)
    shutil.copytree(folder / "fleet", folder / "nothing-new")
    publisher.assign(new, held=(DEVICE,))
    shutil.copytree(folder / "fleet", folder / "held")
    publisher.assign_candidate(new, stable=old, mode=Mode.SHADOW)
    shutil.copytree(folder / "fleet", folder / "shadow")
    publisher.assign(new)
    stranger = Publisher(folder / "stranger")
    stranger.assign(stranger.publish("9.9.9"))
    return folder


async def agree(device: Device) -> None:
    """What is in the shadow decides as what answers does, and then proves itself."""
    device.serving.shadowed = Shadowed(1000, 1000, 0, 0.001, 0.001)
    await device.updater.run_once()
    await prove(device)


_SHOWN = {State.HELD: "held", State.IDLE: "nothing-new", State.SHADOWING: "shadow"}
_SETTLED = {State.ROLLING_BACK: disappoint, State.ROLLED_BACK: disappoint, State.SHADOWING: agree}


class Site:
    """One device, its repository, and what is done to both."""

    def __init__(self, folder: Path, fleets: Path, row: Row) -> None:
        self.folder, self.fleets, self.row = folder, fleets, row
        self.path, self.root = folder / "repository", fleets / "fleet" / "root.json"
        self.show(_SHOWN.get(row.state, "fleet"))
        Medium(fleets / "store").live.write(folder / "store")
        self.trap = Trap(row.state, self.strike)
        self.image: Path | None = None
        self.device = Device(folder / "store", self, disk=self.trap, probation=PROBATION)  # type: ignore[arg-type]
        self.settle = _SETTLED.get(row.state, prove)

    def show(self, fleet: str) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.fleets / fleet / "repository", self.path)

    def strike(self) -> None:
        match self.row.fault:
            case Fault.ERROR:
                self.trap.fail, self.trap.once = errno.EIO, True
            case Fault.NO_SPACE:
                self.trap.fail = errno.ENOSPC
            case Fault.HANG:
                self.trap.wait = threading.Event()
            case Fault.KILLED:
                self.image = self.folder / "killed"
                Medium(self.folder / "store").live.write(self.image)
            case Fault.WRONG_SIGNATURE:
                self.show("stranger")
            case Fault.NETWORK_CUT:
                shutil.rmtree(self.path)

    def restart(self) -> None:
        """What a killed process left is all that the next one has."""
        assert self.image is not None
        self.device.store.close()
        self.device = Device(self.image, self, probation=PROBATION)  # type: ignore[arg-type]

    def mend(self) -> None:
        self.trap.fail = None
        self.show("fleet")

    @property
    def says(self) -> str:
        trouble = self.device.updater.status()["trouble"]
        last = self.device.store.record(MODEL).last
        return trouble["reason"] if trouble else (last.result.value if last else "-")


async def round_with_the_fault(site: Site) -> None:
    await start(site.device)
    await site.device.updater.run_once()
    await site.settle(site.device)
    site.device.clock.sleep(2000)
    await site.device.updater.run_once()


async def hang(site: Site) -> None:
    """The disk hangs: the event loop, and with it every answer, goes on; then the disk returns."""
    work = asyncio.create_task(round_with_the_fault(site))
    async with asyncio.timeout(PATIENCE):
        while not site.trap.waits.is_set():
            assert not work.done(), "nothing was written in this state"
            await asyncio.sleep(0.001)
    running = site.device.serving.running[MODEL]
    assert running.manifest.version in (OLD, NEW)
    running.verify()
    assert site.trap.wait is not None
    site.trap.wait.set()
    await work


async def follow(site: Site) -> None:
    for _ in range(4):
        site.device.clock.sleep(2000)
        await site.device.updater.run_once()
        await site.settle(site.device)


def play(site: Site) -> tuple[str | None, str, tuple[str | None, State]]:
    """Returns what answers and what is said after the fault, and where it ends."""
    row = site.row
    if row.fault is Fault.HANG:
        asyncio.run(hang(site))
    else:
        asyncio.run(round_with_the_fault(site))
    assert site.trap.sprung, f"{row.state.value} was never reached"
    if row.fault is Fault.KILLED:
        site.restart()
        asyncio.run(start(site.device))
    device = site.device
    answers, says = device.version(), site.says
    running = device.serving.running[MODEL]
    # A bad model does not stay in service because the disk will not say so.
    taken_back = device.shown_state() == State.ROLLING_BACK.value and running.manifest.version == OLD
    assert taken_back or running.digest == device.store.pointer(MODEL), "what is served is what is current"
    site.mend()
    asyncio.run(follow(site))
    ends = (site.device.version(), site.device.state())
    site.device.store.close()
    return answers, says, ends


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_state_matrix(tmp_path: Path, fleets: Path, row: Row) -> None:
    logging.disable(logging.CRITICAL)
    try:
        answers, says, ends = play(Site(tmp_path, fleets, row))
    finally:
        logging.disable(logging.NOTSET)
    assert (answers, says, ends) == (row.answers, row.says, row.ends)


def test_every_state_meets_every_fault() -> None:
    resting = {State.IDLE, State.HELD, State.COMMITTED, State.ROLLED_BACK}
    expected = {
        (state, fault) for state in State for fault in Fault if not (fault is Fault.HANG and state in resting)
    }
    assert {(row.state, row.fault) for row in ROWS} == expected

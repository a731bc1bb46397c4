"""The worker as a process of its own: what it keeps out of the agent, and what it may do to it (nothing)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import EngineConfig
from edge_agent.errors import StoreError, UpdateRejected
from edge_agent.store.state import Result, State
from edge_agent.update.child import Aborted, TimedOut, child_process
from edge_agent.update.messages import Check, SelfTest, Setup, Test
from edge_agent.update.source import SourceFailed
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher, StaticServer

PATIENCE = 60.0  # seconds for what takes one on an idle machine


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Iterator[Device]:
    device = Device(tmp_path / "store", publisher, in_process=False)
    yield device
    device.store.close()


def a_setup(folder: Path, source: str = "", root: str = "") -> Setup:
    return Setup(
        device="unit-1", source=source, root=root, models=(), tuf=str(folder), partial=str(folder),
        scratch=str(folder), timeout=PATIENCE, engine=EngineConfig(),
    )  # fmt: skip


def test_an_update_through_a_child_process_over_http(tmp_path: Path, publisher: Publisher) -> None:
    server = StaticServer(publisher.path)
    device = Device(tmp_path / "store", publisher, in_process=False, source=server.url)

    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0"))
        await device.follow()
        assert (device.version(), device.state()) == ("1.0.0", State.COMMITTED)
        publisher.assign(publisher.publish("2.0.0", bad=True))
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "selftest")

        server.requests.clear()
        await device.updater.run_once()
        assert server.requests == [("GET", "/metadata/timestamp.json", 304)], "one conditional request"

    try:
        asyncio.run(scenario())
    finally:
        server.stop()
        device.store.close()


def test_the_serving_process_never_imports_tuf_or_cryptography(tmp_path: Path, publisher: Publisher) -> None:
    """On a real update, in an interpreter of its own: what the worker imports stays in the worker."""
    publisher.assign(publisher.publish("1.0.0"))
    program = f"""
import asyncio, sys
from pathlib import Path
from edge_agent.config import UpdatesConfig
from edge_agent.store.store import Store
from edge_agent.update.updater import Updater

class Serving:
    swapped = []
    async def prepare(self, bundle): return bundle
    def swap(self, prepared): self.swapped.append(prepared.manifest.version)
    def served(self, name): raise AssertionError
    def set_killed(self, name, killed): pass
    def statuses(self): return []

config = UpdatesConfig(source={str(publisher.path)!r}, root={str(publisher.root)!r})
store = Store.open(Path({str(tmp_path / "store")!r}))
asyncio.run(Updater(config, "unit-1", store, Serving(), None).run_once())
print(Serving.swapped, store.record("demo").state.value)
heavy = ("tuf", "securesystemslib", "cryptography", "onnxruntime", "urllib3", "numpy")
print(sorted(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["['1.0.0'] probation", "[]"], done.stderr


def test_a_self_test_alone_needs_no_repository(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")

    async def scenario() -> None:
        async with child_process(a_setup(tmp_path), PATIENCE) as hands:
            report = await hands.ask(Test(str(bundle.path)))
            assert isinstance(report, SelfTest)
            assert report.passed
            assert report.vectors == 8
            assert 0 < report.median_seconds < 1

    asyncio.run(scenario())


def test_what_the_worker_refuses_is_raised_here_with_its_reason(tmp_path: Path, publisher: Publisher) -> None:
    async def scenario() -> None:
        async with child_process(a_setup(tmp_path, source=str(publisher.path)), PATIENCE) as hands:
            with pytest.raises(UpdateRejected, match=r"updates\.root") as caught:
                await hands.ask(Check())
            assert caught.value.reason == "bad_root"
            with pytest.raises(UpdateRejected):
                await hands.ask(Test(str(tmp_path / "nothing")))
        setup = a_setup(tmp_path / "gone", source=str(publisher.path), root=str(publisher.root))
        async with child_process(msgspec.structs.replace(setup, scratch=str(tmp_path)), PATIENCE) as hands:
            with pytest.raises(StoreError, match="cannot copy"):
                await hands.ask(Check())

    asyncio.run(scenario())


def test_a_silent_worker_is_ended(tmp_path: Path, publisher: Publisher) -> None:
    async def scenario() -> None:
        setup = a_setup(tmp_path, source=str(publisher.path), root=str(publisher.root))
        async with child_process(setup, PATIENCE) as hands:
            await hands.ask(Check())
            pid = hands._process.pid  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGSTOP)  # it hangs
            hands._silence = 0.05  # type: ignore[attr-defined]
            with pytest.raises(TimedOut, match=r"said nothing for 0\.05 s"):
                await hands.ask(Check())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(scenario())


def test_a_killed_worker_is_a_failed_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        bundle = tiny_bundle(tmp_path / "bundle")
        async with child_process(a_setup(tmp_path), PATIENCE) as hands:
            await hands.ask(Test(str(bundle.path)))
            hands._process.kill()  # type: ignore[attr-defined]
            with pytest.raises(SourceFailed) as caught:
                await hands.ask(Test(str(bundle.path)))
            assert caught.value.reason == "worker"

    asyncio.run(scenario())


def test_an_operator_can_interrupt_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        bundle = tiny_bundle(tmp_path / "bundle")
        async with child_process(a_setup(tmp_path), PATIENCE) as hands:
            asked = asyncio.create_task(hands.ask(Test(str(bundle.path))))
            await asyncio.sleep(0)
            hands.abort()
            with pytest.raises(Aborted):
                await asked

    asyncio.run(scenario())


def test_a_roll_back_does_not_wait_for_a_download(tmp_path: Path, publisher: Publisher) -> None:
    """The repository hangs in the middle of a check; `edge-agent rollback` answers at once."""
    server = StaticServer(publisher.path)
    device = Device(
        tmp_path / "store", publisher, in_process=False, source=server.url, timeout_seconds=PATIENCE
    )

    async def scenario() -> None:
        for version in ("1.0.0", "2.0.0"):
            publisher.assign(publisher.publish(version))
            await device.follow()
        publisher.assign(publisher.publish("3.0.0"))
        server.hang_on = "/blobs/"
        running = asyncio.create_task(device.updater.run_once())
        async with asyncio.timeout(PATIENCE):
            while not any("/blobs/" in path for _, path, _ in server.requests[-1:]):
                await asyncio.sleep(0.01)
            outcome = await device.updater.roll_back("demo")
            interrupted = await running
        assert (outcome.result, outcome.version) == (Result.SUCCEEDED, "1.0.0")
        assert interrupted.result is Result.ABORTED
        assert device.version() == "1.0.0"

    try:
        asyncio.run(scenario())
    finally:
        server.stop()
        device.store.close()


def test_the_worker_dies_with_the_agent(tmp_path: Path, publisher: Publisher) -> None:
    publisher.assign(publisher.publish("1.0.0"))
    program = f"""
import asyncio
from edge_agent.config import EngineConfig
from edge_agent.update.child import child_process
from edge_agent.update.messages import Check, Setup
setup = Setup(device="u", source={str(publisher.path)!r}, root={str(publisher.root)!r}, models=(),
              tuf={str(tmp_path / "t")!r}, partial="", scratch={str(tmp_path)!r}, timeout=60.0,
              engine=EngineConfig())
async def main():
    async with child_process(setup, 60.0) as hands:
        await hands.ask(Check())
        print(hands._process.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    (tmp_path / "t").mkdir()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        worker = int(agent.stdout.readline())
        watched = os.pidfd_open(worker)
        agent.kill()
        agent.wait()
        import select

        ended, _, _ = select.select([watched], [], [], PATIENCE)
        os.close(watched)
        assert ended, "an orphan is left"

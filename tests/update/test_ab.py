"""A/B by assignment: a candidate answers a share of a real device's requests, then all of them, or none."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.config import ProbationConfig
from edge_agent.contract.assignments import Mode, Release, Split
from edge_agent.contract.metric_names import LATENCY_BUCKETS
from edge_agent.store.state import State
from edge_agent.update.policy import Answered, Tried, Verdict, judge_split
from tests.update.devices import Publisher
from tests.update.test_with_the_service import PATIENCE, Agent

AB = Split(share=0.5, requests=100, seconds=600.0)
NOBODY = Answered(0, 0)
SLOW = (*(0 for _ in LATENCY_BUCKETS), 100)
FAST = (100, *(0 for _ in LATENCY_BUCKETS))


@pytest.mark.parametrize(
    ("seen", "verdict", "reason"),
    [
        (Tried(1, 99, 99, 0, 0, NOBODY, NOBODY), Verdict.WAIT, "ab"),
        (Tried(1, 100, 100, 0, 0, NOBODY, NOBODY), Verdict.HEALTHY, "agreed"),
        (Tried(600, 0, 0, 0, 0, NOBODY, NOBODY), Verdict.HEALTHY, "agreed"),
        (Tried(1, 10, 10, 5, 0, NOBODY, NOBODY), Verdict.WAIT, "ab"),
        (Tried(1, 10, 10, 6, 0, NOBODY, NOBODY), Verdict.UNHEALTHY, "fallback"),  # certain before the end
        (Tried(600, 10, 10, 1, 0, NOBODY, NOBODY), Verdict.UNHEALTHY, "fallback"),
        (Tried(1, 10, 10, 3, 3, NOBODY, NOBODY), Verdict.UNHEALTHY, "non_finite"),
        (Tried(1, 5, 5, 5, 0, NOBODY, NOBODY, "breaker_open"), Verdict.UNHEALTHY, "breaker_open"),
        (Tried(1, 100, 100, 0, 0, Answered(100, 90), Answered(100, 10)), Verdict.UNHEALTHY, "decisions"),
        (Tried(1, 99, 99, 0, 0, Answered(100, 90), Answered(100, 10)), Verdict.WAIT, "ab"),
        (
            Tried(1, 100, 100, 0, 0, Answered(100, 1, SLOW), Answered(100, 1, FAST)),
            Verdict.UNHEALTHY,
            "latency",
        ),
    ],
)
def test_faults_decisions_and_latency_decide(seen: Tried, verdict: Verdict, reason: str) -> None:
    assert judge_split(ProbationConfig(), AB, seen)[:2] == (verdict, reason)


class Plant:
    """Machines whose rows a running agent is asked for."""

    def __init__(self, agent: Agent, publisher: Publisher, old: Release) -> None:
        self.agent, self.publisher, self.old = agent, publisher, old
        self._numbers = itertools.count()
        self.sources: dict[str, set[str]] = {}  # machine: the versions that answered it

    def assign(self, release: Release, ab: Split, mode: Mode = Mode.ACTIVE) -> None:
        self.publisher.assign_candidate(release, stable=self.old, mode=mode, ab=ab)

    async def ask(self, value: float = 1.0) -> str:
        """One row of the next of a hundred machines; which version answered, or its reason."""
        source = f"press {next(self._numbers) % 100}"
        rows = np.full((1, 4), value, np.float32)
        answer = await self.agent.service.submit("demo", None, {"features": rows}, source=source)
        await asyncio.sleep(0)
        self.sources.setdefault(source, set()).add(str(answer.version))
        return str(answer.version) if answer.source == "model" else answer.reason

    @property
    def last_reason(self) -> str | None:
        return self.agent.store.record("demo").last_reason


@asynccontextmanager
async def plant(folder: Path) -> AsyncIterator[Plant]:
    publisher = Publisher(folder / "fleet")
    agent = Agent(folder / "store", publisher)
    old = publisher.publish("1.0.0")
    publisher.assign(old)
    running = asyncio.create_task(agent.updater.run())
    try:
        async with asyncio.timeout(PATIENCE):
            while agent.service.running("demo") is None:
                await asyncio.sleep(0.01)
            here = Plant(agent, publisher, old)
            while agent.state() is not State.COMMITTED:
                await here.ask()
            yield here
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        agent.store.close()


def test_a_candidate_that_is_no_worse_answers_its_share_and_then_everything(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            here.assign(here.publisher.publish("2.0.0"), Split(share=0.3, requests=200))
            while here.agent.service.split_report("demo") is None:
                assert await here.ask() == "1.0.0"
            here.sources.clear()
            answered = [await here.ask() for _ in range(100)]
            assert 10 < answered.count("2.0.0") < 60
            assert here.agent.updater.status()["models"]["demo"]["shadow"]["share"] == 0.3
            while here.agent.service.split_report("demo") is not None:
                assert await here.ask() in {"1.0.0", "2.0.0"}
            assert await here.ask() == "2.0.0"
            while here.agent.state() is not State.COMMITTED:
                await here.ask()

    asyncio.run(scenario())


def test_one_that_decides_otherwise_is_refused_and_each_machine_had_one_release(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            here.assign(here.publisher.publish("2.0.0", threshold=0.5), Split(share=0.5, requests=200))
            while here.agent.service.split_report("demo") is None:
                await here.ask()
            here.sources.clear()
            while here.agent.service.split_report("demo") is not None:
                await here.ask()
            versions = [seen for seen in here.sources.values() if len(seen) > 1]
            assert len(versions) <= 1  # the last one asked came after the end
            while here.last_reason != "decisions":
                assert await here.ask() == "1.0.0"
            assert here.agent.store.record("demo").rejected

    asyncio.run(scenario())


def test_one_that_fails_costs_nobody_an_answer_and_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            failing = here.publisher.publish("2.0.0", non_finite_above=0.95)
            here.assign(failing, Split(share=0.5, requests=200))
            answered = [await here.ask()]
            while here.last_reason not in ("fallback", "non_finite"):
                answered.append(await here.ask())
            assert set(answered) <= {"1.0.0", "non_finite"}
            assert await here.ask() == "1.0.0"

    asyncio.run(scenario())


def test_one_of_another_form_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            here.assign(here.publisher.publish("2.0.0", features=5), AB)
            while "its inputs are not those of 1.0.0" not in (
                here.agent.updater.status()["models"]["demo"]["last_message"] or ""
            ):
                assert await here.ask() == "1.0.0"
            while here.agent.state() is State.SHADOWING:
                assert await here.ask() == "1.0.0"
            assert here.agent.store.record("demo").rejected

    asyncio.run(scenario())


def test_another_release_or_a_document_without_ab_ends_the_split(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            for_ever = Split(share=0.5, requests=1_000_000)
            second, third = here.publisher.publish("2.0.0"), here.publisher.publish("3.0.0")
            here.assign(second, for_ever)
            while await here.ask() != "2.0.0":
                pass
            here.assign(third, for_ever)
            while await here.ask() != "3.0.0":
                pass
            assert {await here.ask() for _ in range(100)} == {"1.0.0", "3.0.0"}
            here.publisher.assign(third)
            while here.agent.service.split_report("demo") is not None:
                await here.ask()
            assert await here.ask() == "3.0.0"

    asyncio.run(scenario())


def test_where_the_release_beside_it_is_loaded_again_the_split_begins_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plant(tmp_path) as here:
            here.assign(here.publisher.publish("2.0.0"), Split(share=0.5, requests=1_000_000))
            while await here.ask() != "2.0.0":
                pass
            current = here.agent.store.current("demo")
            assert current is not None
            await here.agent.service.load("demo", current)  # an operator did
            assert here.agent.service.split_report("demo") is None
            async with asyncio.timeout(PATIENCE):
                while here.agent.service.split_report("demo") is None:
                    await here.ask()
            assert not here.agent.store.record("demo").rejected

    asyncio.run(scenario())


def test_agents_that_do_not_know_ab_read_the_document_as_before() -> None:
    class OldCandidate(msgspec.Struct, frozen=True):
        release: str
        mode: Mode = Mode.ACTIVE

    class NewCandidate(OldCandidate, frozen=True):
        ab: Split | msgspec.UnsetType = msgspec.UNSET

    with_ab = msgspec.json.encode(NewCandidate("r", Mode.SHADOW, AB))
    assert msgspec.json.decode(with_ab, type=OldCandidate) == OldCandidate("r", Mode.SHADOW)
    without = msgspec.json.encode(NewCandidate("r"))
    assert without == msgspec.json.encode(OldCandidate("r"))

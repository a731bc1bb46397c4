"""The shadow: it sees what the model answers, changes nothing of it, and its differences are counted."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.serving.service import Service
from edge_agent.serving.shadow import ShadowReport
from edge_agent.telemetry.metrics import AgentMetrics
from tests.serving.test_service import endless_bundle
from tests.support.bundles import tiny_bundle

PATIENCE = 30.0


def service() -> Service:
    metrics = AgentMetrics(CollectorRegistry(), "test", "0")
    return Service(ServingConfig(deadline_ms=5000), EngineConfig(), DriftConfig(), metrics)


async def seen(agent: Service, requests: int) -> ShadowReport:
    limit = time.monotonic() + PATIENCE
    while (report := agent.shadow_report("demo")).requests < requests:
        assert time.monotonic() < limit, f"only {report.requests} requests were compared"
        await asyncio.sleep(0.005)
    return report


async def ask(agent: Service, *values: float) -> list[bool]:
    rows = np.repeat(np.array([values], np.float32).T, 4, axis=1)
    answer = await agent.submit("demo", None, {"features": rows})
    assert answer.version == "1.0.0"
    assert answer.source == "model"
    return answer.failed


def test_a_shadow_that_decides_alike_agrees(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        agent.shadow(await agent.prepare(tiny_bundle(tmp_path / "2", version="2.0.0")), 1.0)
        for _ in range(10):
            assert await ask(agent, 1.0, 3.0) == [False, True]
        report = await seen(agent, 10)
        assert (report.rows, report.disagreeing_rows) == (20, 0)
        assert report.active_seconds > 0

    asyncio.run(story())


def test_rows_decided_otherwise_and_results_that_are_not_finite_disagree(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        # It fails rows above 0.5 instead of 4, and answers NaN above 8.
        stricter = tiny_bundle(tmp_path / "2", version="2.0.0", threshold=0.5, non_finite_above=8.0)
        agent.shadow(await agent.prepare(stricter), 1.0)
        assert await ask(agent, 0.5, 1.0, 3.0) == [False, False, True]
        report = await seen(agent, 1)
        assert (report.rows, report.disagreeing_rows, report.non_finite_rows) == (3, 2, 1)

    asyncio.run(story())


def test_it_sees_its_share_of_the_requests(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        agent.shadow(await agent.prepare(tiny_bundle(tmp_path / "2", version="2.0.0")), 0.25)
        for _ in range(40):
            await ask(agent, 1.0)
            await asyncio.sleep(0)
        assert (await seen(agent, 10)).requests == 10

    asyncio.run(story())


def test_a_shadow_of_another_shape_disagrees_on_every_row(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        wider = await agent.prepare(tiny_bundle(tmp_path / "2", version="2.0.0", features=5))
        agent.shadow(wider, 1.0)
        await ask(agent, 1.0, 1.0)
        report = await seen(agent, 1)
        assert (report.disagreeing_rows, report.failed_rows) == (2, 2)

    asyncio.run(story())


def test_what_was_in_the_shadow_can_answer_afterwards(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        prepared = await agent.prepare(tiny_bundle(tmp_path / "2", version="2.0.0"))
        agent.shadow(prepared, 1.0)
        await ask(agent, 1.0)
        await agent.end_shadow("demo")
        await agent.end_shadow("demo")
        assert agent.shadow_report("demo") == ShadowReport()
        agent.swap(prepared)
        answer = await agent.submit("demo", None, {"features": np.ones((1, 4), np.float32)})
        assert answer.version == "2.0.0"

    asyncio.run(story())


def test_what_a_release_answered_is_kept_for_the_comparison_with_the_next(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        await ask(agent, 1.0, 3.0, 3.0)
        slot = agent._slots["demo"]
        await slot.watch.look(slot.release.detector, slot.release.manifest.decision)  # as each second
        assert agent.served_before("demo") is None
        agent.swap(await agent.prepare(tiny_bundle(tmp_path / "2", version="2.0.0")))
        before, now = agent.served_before("demo"), agent.served("demo")
        assert (before.rows, before.failed_rows, sum(before.latencies)) == (3, 2, 1)
        # Scores of 1 and 9 over a threshold of 4: two doublings below, and one above.
        assert {index - 10: count for index, count in enumerate(before.scores) if count} == {-2: 1, 1: 2}
        assert (now.rows, now.failed_rows, sum(now.latencies), sum(now.scores)) == (0, 0, 0, 0)

    asyncio.run(story())


def test_a_shadow_that_gets_stuck_disagrees_and_can_be_ended(tmp_path):
    async def story():
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        stuck = endless_bundle(tmp_path / "2")
        agent.shadow(await agent.prepare(stuck), 1.0)
        endless = np.full((1, 4), 1e9, np.float32)
        await agent.submit("demo", None, {"features": endless})
        assert (await seen(agent, 1)).failed_rows == 1
        await agent.submit("demo", None, {"features": endless})
        await asyncio.sleep(0)
        await asyncio.wait_for(agent.end_shadow("demo"), PATIENCE)

    asyncio.run(story())

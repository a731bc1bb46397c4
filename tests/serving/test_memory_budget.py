"""Several models side by side in a memory budget: who is not asked makes room, and comes back when asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import MODEL, Bundle
from edge_agent.errors import EngineError
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from tests.support.bundles import tiny_bundle

ROW = np.full((1, 4), 3, np.float32)


def bundles(folder: Path) -> list[Bundle]:
    return [tiny_bundle(folder / name, name) for name in ("a", "b", "c")]


def service_for(models: int, bundle: Bundle, stay_seconds: float = 60.0) -> Service:
    """Room for so many of these models."""
    size = 2 * bundle.manifest.members[MODEL].size
    engine = EngineConfig(memory_budget_mb=(models + 0.5) * size / 1e6, stay_seconds=stay_seconds)
    metrics = AgentMetrics(CollectorRegistry(), "test", "0")
    return Service(ServingConfig(), engine, DriftConfig(enabled=False), metrics)


def states(service: Service) -> str:
    return " ".join(f"{status.name}:{status.state}" for status in service.statuses())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_the_one_not_asked_for_longest_makes_room(tmp_path: Path) -> None:
    async def story() -> None:
        a, b, c = bundles(tmp_path)
        service = service_for(2, a)
        for bundle in (a, b):
            await service.start(bundle.name, bundle)
        for name in ("b", "a"):
            await service.submit(name, None, {"features": ROW})
        await service.start("c", c)
        assert states(service) == "a:ready b:unloaded c:ready"
        answer = await service.submit("b", None, {"features": ROW})
        assert (answer.source, answer.reason, answer.failed) == ("fallback", "unloaded", [True])
        assert service.ready()

    asyncio.run(story())


def test_a_model_that_made_room_comes_back_when_it_is_asked(tmp_path: Path) -> None:
    async def story() -> None:
        a, b, _ = bundles(tmp_path)
        service = service_for(1, a, stay_seconds=0.0)
        await service.start("a", a)
        await service.start("b", b)
        assert states(service) == "a:unloaded b:ready"
        assert (await service.submit("a", None, {"features": ROW})).source == "fallback"
        await until(lambda: states(service) == "a:ready b:unloaded")
        assert (await service.submit("a", None, {"features": ROW})).source == "model"

    asyncio.run(story())


def test_two_that_do_not_fit_together_do_not_chase_each_other_out(tmp_path: Path) -> None:
    async def story() -> None:
        a, b, _ = bundles(tmp_path)
        service = service_for(1, a)
        await service.start("a", a)
        await service.start("b", b)
        answers: list[Answer] = []
        for _ in range(20):
            answers += [await service.submit(name, None, {"features": ROW}) for name in ("a", "b")]
        assert states(service) == "a:unloaded b:ready"
        assert [answer.source for answer in answers] == ["fallback", "model"] * 20

    asyncio.run(story())


def test_what_an_operator_unloaded_stays_unloaded(tmp_path: Path) -> None:
    async def story() -> None:
        a, b, _ = bundles(tmp_path)
        service = service_for(1, a)
        await service.start("a", a)
        await service.start("b", b)
        service.unload("a")
        service.unload("b")
        for name in ("a", "b"):
            assert (await service.submit(name, None, {"features": ROW})).source == "fallback"
        assert states(service) == "a:unloaded b:unloaded"

    asyncio.run(story())


def test_without_a_budget_all_stay(tmp_path: Path) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(ServingConfig(), EngineConfig(), DriftConfig(enabled=False), metrics)
        for bundle in bundles(tmp_path):
            await service.start(bundle.name, bundle)
        assert states(service) == "a:ready b:ready c:ready"

    asyncio.run(story())


def test_session_options_reach_onnxruntime(tmp_path: Path) -> None:
    async def story() -> None:
        bundle = tiny_bundle(tmp_path / "b")
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        good = EngineConfig(options={"session.disable_prepacking": "1"})
        await Service(ServingConfig(), good, DriftConfig(enabled=False), metrics).prepare(bundle)
        wrong = EngineConfig(options={"session.load_model_format": "ORT"})  # it is ONNX
        with pytest.raises(EngineError):
            await Service(ServingConfig(), wrong, DriftConfig(enabled=False), metrics).prepare(bundle)

    asyncio.run(story())

"""Several models side by side in a memory budget: who is not asked makes room, and comes back when asked."""

from __future__ import annotations

import asyncio
import weakref
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

VERSIONS = ("1.0.1", "1.0.2", "1.0.3")
ROW = np.full((1, 4), 3, np.float32)


def bundles(folder: Path) -> list[Bundle]:
    """Three different models: the version is in the file."""
    return [tiny_bundle(folder / name, name, version) for name, version in zip("abc", VERSIONS, strict=True)]


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


def session_of(service: Service, name: str) -> object:
    release = service._slots[name].release
    assert release is not None
    assert release.engine is not None
    return release.engine._session


def test_releases_with_the_same_model_file_share_one_session_and_answer_side_by_side(tmp_path: Path) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        engine = EngineConfig(inline_below_ms=0.0)  # each in a thread of its own
        service = Service(ServingConfig(deadline_ms=60_000), engine, DriftConfig(enabled=False), metrics)
        for name, threshold in (("a", 4.0), ("b", 10.0)):
            await service.start(name, tiny_bundle(tmp_path / name, name, threshold=threshold))
        await service.start("c", tiny_bundle(tmp_path / "c", "c", "1.0.1"))
        assert session_of(service, "a") is session_of(service, "b")
        assert session_of(service, "a") is not session_of(service, "c")
        rows = [np.full((1, 4), value, np.float32) for value in range(50)]
        asked = [service.submit(name, None, {"features": row}) for row in rows for name in ("a", "b")]
        answers = await asyncio.gather(*asked)
        assert [answer.reason for answer in answers] == ["ok"] * 100
        assert [answer.failed[0] for answer in answers if answer.model == "a"] == [v > 2 for v in range(50)]
        assert [answer.failed[0] for answer in answers if answer.model == "b"] == [v > 3 for v in range(50)]

    asyncio.run(story())


def test_a_new_release_with_other_rules_only_takes_no_second_session(tmp_path: Path) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(ServingConfig(), EngineConfig(), DriftConfig(enabled=False), metrics)
        await service.start("a", tiny_bundle(tmp_path / "1", "a"))
        kept = session_of(service, "a")
        rules = "format: 1\ndefault: pass\nlimits: {f0: {high: 8}}\n"
        prepared = await service.prepare(tiny_bundle(tmp_path / "2", "a", rules=rules))
        service.swap(prepared)
        assert session_of(service, "a") is kept
        assert (await service.submit("a", None, {"features": ROW})).source == "model"

    asyncio.run(story())


@pytest.mark.parametrize("beside", ["shadow", "split"])
def test_a_candidate_takes_room_too_and_gives_it_back(tmp_path: Path, beside: str) -> None:
    async def story() -> None:
        first, second, _ = bundles(tmp_path)
        service = service_for(2, first, stay_seconds=0.0)
        await service.start("a", first)
        await service.start("b", second)
        candidate = await service.prepare(tiny_bundle(tmp_path / "next", "a", "2.0.0"))
        getattr(service, beside)(candidate, 0.5)
        assert states(service) == "a:ready b:unloaded"
        for _ in range(5):  # asked for, it still does not take the place of what is being compared
            await service.submit("b", None, {"features": ROW})
            await asyncio.gather(*service._loading)
        assert states(service) == "a:ready b:unloaded"
        await service.end_shadow("a")
        service.end_split("a")
        await service.submit("b", None, {"features": ROW})
        await until(lambda: states(service) == "a:ready b:ready")

    asyncio.run(story())


def test_a_session_goes_with_the_last_who_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(ServingConfig(), EngineConfig(), DriftConfig(enabled=False), metrics)
        for name in ("a", "b"):
            await service.start(name, tiny_bundle(tmp_path / name, name))
        watched = weakref.ref(session_of(service, "a"))
        service.unload("a")
        assert (await service.submit("b", None, {"features": ROW})).source == "model"
        assert watched() is not None
        service.unload("b")
        await until(lambda: watched() is None)

    asyncio.run(story())


def test_a_candidate_that_is_forgotten_answers_what_it_was_asked_and_is_freed(tmp_path: Path) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(ServingConfig(), EngineConfig(), DriftConfig(enabled=False), metrics)
        await service.start("a", tiny_bundle(tmp_path / "a", "a"))
        candidate = await service.prepare(tiny_bundle(tmp_path / "b", "a", "2.0.0"))
        service.split(candidate, 1.0)
        assert candidate.engine is not None
        watched = weakref.ref(candidate.engine._session)
        asked = service.submit("a", None, {"features": ROW})
        service.end_split("a")
        service.forget(candidate)
        assert ((await asked).version, (await asked).source) == ("2.0.0", "model")
        await until(lambda: watched() is None)

    asyncio.run(story())


def test_a_shared_model_counts_once_and_leaves_as_a_whole(tmp_path: Path) -> None:
    async def story() -> None:
        first = tiny_bundle(tmp_path / "a", "a", "1.0.1")
        service = service_for(2, first)
        await service.start("a", first)
        await service.start("twin", tiny_bundle(tmp_path / "twin", "twin", "1.0.1"))
        await service.start("b", tiny_bundle(tmp_path / "b", "b", "1.0.2"))
        assert states(service) == "a:ready twin:ready b:ready"
        for name in ("b", "twin", "a"):
            await service.submit(name, None, {"features": ROW})
        await service.start("c", tiny_bundle(tmp_path / "c", "c", "1.0.3"))
        assert states(service) == "a:ready twin:ready b:unloaded c:ready"
        for name in ("a", "c"):
            await service.submit(name, None, {"features": ROW})
        await service.submit("c", None, {"features": ROW})
        await service.start("d", tiny_bundle(tmp_path / "d", "d", "1.0.4"))
        assert states(service) == "a:unloaded twin:unloaded b:unloaded c:ready d:ready"

    asyncio.run(story())

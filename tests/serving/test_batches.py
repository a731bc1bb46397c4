"""A row's answer does not depend on what travelled with it: a quantized bundle, alone and in every batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import MODEL, Bundle, open_bundle, write_bundle
from edge_agent.serving.batcher import Batcher, Pending
from edge_agent.serving.engine import Engine
from edge_agent.serving.service import Answer, Service
from edge_agent.serving.tensors import Feeds
from edge_agent.telemetry.metrics import AgentMetrics
from quantize.config import PrepareConfig, Scale
from quantize.int8 import static_recipe, write_int8
from quantize.load import load_data, load_model
from quantize.plan import plan_of
from quantize.prepare import prepare
from tests.quantize import models
from tests.quantize.models import quantize

SIZES = range(1, 65)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Static INT8, made by quantize-model from a dense autoencoder."""
    folder = tmp_path_factory.mktemp("int8")
    data = folder / "calibration.npz"
    np.savez(data, X=models.rows(300))
    model = models.autoencoder(folder / "model.onnx")
    assert quantize(model, data, folder / "out", "--scale", "standard") == 0
    return open_bundle(folder / "out" / "unit-1.2.3")


@pytest.fixture(scope="module")
def dynamic(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same network with layers that quantize while they run, one scale for all rows of a run."""
    folder = tmp_path_factory.mktemp("dynamic")
    source = load_model(models.autoencoder(folder / "model.onnx"))
    np.savez(folder / "calibration.npz", X=models.rows(300))
    rows, _ = load_data(folder / "calibration.npz", None, source.inputs)
    prepared = prepare(source, rows, PrepareConfig(scale=Scale.STANDARD))
    plan = plan_of(prepared.proto)
    recipe = replace(static_recipe(plan, {}), modes=plan.dynamic())
    files = {name: bundle.read(name) for name in bundle.manifest.members}
    files[MODEL] = write_int8(prepared.proto, plan, recipe).SerializeToString()
    (folder / "bundle").mkdir()
    return write_bundle(folder / "bundle", bundle.manifest, files)


@pytest.mark.parametrize("inline", [True, False], ids=["on the loop", "in a thread"])
@pytest.mark.parametrize("kind", ["bundle", "dynamic"])
def test_a_row_alone_and_in_every_batch_size_gets_the_same_bits(
    kind: str, inline: bool, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    assert bundle.manifest.precision == "int8"
    rows = np.concatenate([models.rows(60, seed=5), models.bad_rows(4)])

    async def story() -> None:
        registry = CollectorRegistry()
        engine = EngineConfig(inline_below_ms=1000.0 if inline else 0.0, max_batch_rows=64)
        service = Service(
            ServingConfig(deadline_ms=60_000),
            engine,
            DriftConfig(enabled=False),
            AgentMetrics(registry, "test", "0"),
        )
        await service.start("unit", bundle)

        def ask(row: np.ndarray) -> asyncio.Future[Answer]:
            return service.submit("unit", None, {"x": row[None]})

        alone = [await ask(row) for row in rows]
        assert {answer.source for answer in alone} == {"model"}
        for size in SIZES:
            together = await asyncio.gather(*[ask(row) for row in rows[:size]])
            in_one = await service.submit("unit", None, {"x": rows[:size]})
            for index, (one, other) in enumerate(zip(alone, together, strict=False)):
                assert other.outputs["score"].tobytes() == one.outputs["score"].tobytes(), (size, index)
                assert in_one.outputs["score"][index : index + 1].tobytes() == one.outputs["score"].tobytes()
                assert other.scores == one.scores
        labels = {"model": "unit", "version": bundle.manifest.version}
        asked = len(rows) + sum(SIZES) + sum(SIZES)
        assert registry.get_sample_value("edge_batch_rows_sum", labels) == asked
        batches = registry.get_sample_value("edge_batch_rows_count", labels)
        if inline:
            assert batches == len(rows) + 2 * len(SIZES)

    asyncio.run(story())


def test_an_answer_keeps_its_values_when_the_next_batch_uses_the_same_buffer(bundle: Bundle) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(
            ServingConfig(deadline_ms=60_000), EngineConfig(), DriftConfig(enabled=False), metrics
        )
        await service.start("unit", bundle)
        rows = models.rows(8, seed=6)
        asked = [service.submit("unit", None, {"x": row[None]}) for row in rows]
        first = await asyncio.gather(*asked)
        kept = [answer.outputs["score"].copy() for answer in first]
        for _ in range(3):
            await asyncio.gather(*[service.submit("unit", None, {"x": row[None]}) for row in rows[::-1] * 2])
        assert [answer.outputs["score"].tobytes() for answer in first] == [value.tobytes() for value in kept]

    asyncio.run(story())


def test_a_stall_that_many_requests_share_opens_no_breaker(bundle: Bundle) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        serving = ServingConfig(deadline_ms=60_000, breaker_failures=5)
        service = Service(serving, EngineConfig(inline_below_ms=1000.0), DriftConfig(enabled=False), metrics)
        await service.start("unit", bundle)
        row = {"x": models.rows(1)}
        late = await asyncio.gather(*[service.submit("unit", None, row, deadline=1e-9) for _ in range(50)])
        assert {answer.reason for answer in late} == {"deadline"}
        assert (await service.submit("unit", None, row)).reason == "ok"

    asyncio.run(story())


def test_a_caller_that_went_away_costs_nobody_else_an_answer(bundle: Bundle) -> None:
    async def story() -> None:
        metrics = AgentMetrics(CollectorRegistry(), "test", "0")
        service = Service(
            ServingConfig(deadline_ms=60_000), EngineConfig(), DriftConfig(enabled=False), metrics
        )
        await service.start("unit", bundle)
        row = {"x": models.rows(1)}
        asked = [service.submit("unit", None, row) for _ in range(5)]
        asked[2].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(answer, Answer) for answer in answers] == [True, True, False, True, True]

    asyncio.run(story())


def test_who_waits_longest_gets_its_own_rows_when_the_others_of_its_batch_gave_up(bundle: Bundle) -> None:
    """The others' time ran out while the engine was busy with the batch that all of them are in."""
    rows = models.rows(4, seed=8)
    release = threading.Event()

    class Held(Engine):
        def run(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
            release.wait(20)
            return super().run(feeds)

        def abort(self) -> None:
            pass

    async def story() -> None:
        engine = Held.load(bundle.member(MODEL), EngineConfig())
        done: dict[int, Feeds | None] = {}
        everyone = asyncio.Event()

        def finish(requests: list[Pending], result: Any) -> None:
            for request in requests:
                number = order.index(request)
                if result is None:
                    done[number] = None
                else:
                    score = result["score"]
                    begin = request.begin
                    done[number] = score[begin : begin + 1] if request.joined else score
            if len(done) == len(order):
                everyone.set()

        batcher = Batcher(
            engine, max_rows=64, joinable=True, inline=False, finish=finish, observe_rows=lambda _: None
        )
        now = time.monotonic()
        patience = [60.0, 0.2, 60.0, 0.2]
        order = [
            Pending({"x": row[None]}, 1, now, now + seconds)
            for row, seconds in zip(rows, patience, strict=True)
        ]
        for request in order:
            batcher.add(request)
        while len(done) < 2:
            await asyncio.sleep(0.01)
        assert done == {1: None, 3: None}
        release.set()
        await asyncio.wait_for(everyone.wait(), 20)
        for number in (0, 2):
            assert done[number].tobytes() == Engine.run(engine, {"x": rows[number][None]})["score"].tobytes()
        batcher.close(lambda: None)

    asyncio.run(story())


def waiting_batcher(bundle: Bundle, delay: float, max_rows: int = 64) -> tuple[Batcher, list[int]]:
    """A batcher on the loop, and the rows of each batch that it has computed."""
    batches: list[int] = []
    engine = Engine.load(bundle.member(MODEL), EngineConfig())
    batcher = Batcher(
        engine, max_rows=max_rows, joinable=True, inline=True, finish=lambda *_: None,
        observe_rows=lambda rows: batches.append(int(rows)), delay=delay,
    )  # fmt: skip
    return batcher, batches


def pending(seconds: float = 1e6) -> Pending:
    now = time.monotonic()
    return Pending({"x": models.rows(1)}, 1, now, now + seconds)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_with_a_delay_requests_of_different_turns_go_together(bundle: Bundle) -> None:
    async def story() -> None:
        for delay, expected in ((0.0, [1, 1, 1]), (0.2, [3])):
            batcher, batches = waiting_batcher(bundle, delay)
            order = [pending(), pending(), pending()]
            for request in order:
                batcher.add(request)
                await turns(3)
            while not all(request.done for request in order):
                await asyncio.sleep(0)
            assert batches == expected
            # Once more: nothing of the first wait is left over.
            batcher.add(last := pending())
            while not last.done:
                await asyncio.sleep(0.001)
            assert batches == [*expected, 1]

    asyncio.run(story())


def test_nobody_waits_for_company_in_a_full_batch_or_with_little_time_or_at_the_end(bundle: Bundle) -> None:
    hour = 3600.0

    async def story() -> None:
        batcher, batches = waiting_batcher(bundle, hour, max_rows=2)
        batcher.add(pending())
        await turns(5)
        assert batches == []
        batcher.add(pending())
        await turns(5)
        assert batches == [2]

        batcher, batches = waiting_batcher(bundle, hour)
        batcher.add(pending())
        await turns(5)
        batcher.add(pending(seconds=hour))
        await turns(5)
        assert batches == [2]

        batcher, batches = waiting_batcher(bundle, hour)
        batcher.add(pending())
        closed = asyncio.Event()
        batcher.close(closed.set)
        await asyncio.wait_for(closed.wait(), 20)
        assert batches == [1]

    asyncio.run(story())


def test_the_configured_delay_reaches_the_engine(bundle: Bundle) -> None:
    async def story() -> None:
        registry = CollectorRegistry()
        service = Service(
            ServingConfig(deadline_ms=60_000), EngineConfig(batch_delay_us=200_000),
            DriftConfig(enabled=False), AgentMetrics(registry, "test", "0"),
        )  # fmt: skip
        await service.start("unit", bundle)
        asked = []
        for _ in range(4):
            asked.append(service.submit("unit", None, {"x": models.rows(1)}))
            await turns(3)
        assert {answer.reason for answer in await asyncio.gather(*asked)} == {"ok"}
        labels = {"model": "unit", "version": bundle.manifest.version}
        assert registry.get_sample_value("edge_batch_rows_count", labels) == 1

    asyncio.run(story())

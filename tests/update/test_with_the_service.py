"""The updater with the agent's own inference service under load: real models, nothing dropped."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import (
    DriftConfig,
    EngineConfig,
    ProbationConfig,
    ServingConfig,
    ShadowConfig,
    UpdatesConfig,
)
from edge_agent.contract.assignments import Mode
from edge_agent.serving.service import Service
from edge_agent.standby import Standby
from edge_agent.store.state import State
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.update.updater import Updater
from tests.update.devices import Publisher

PATIENCE = 60.0  # seconds


class Agent:
    """Store, service and updater, put together as app.run does."""

    def __init__(
        self,
        folder: Path,
        publisher: Publisher,
        shadow: ShadowConfig | None = None,
        *,
        reads: bool = False,
        probation: ProbationConfig | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        self.store = Store.read(folder) if reads else Store.open(folder)
        self.metrics = AgentMetrics(CollectorRegistry(), "unit-1", "0.1.0")
        self.service = Service(
            ServingConfig(deadline_ms=5000), engine or EngineConfig(), DriftConfig(), self.metrics
        )
        config = UpdatesConfig(
            source=str(publisher.path), root=str(publisher.root), in_process=True, interval_seconds=0.05,
            probation=probation or ProbationConfig(seconds=0, requests=20),
            shadow=shadow or ShadowConfig(),
        )  # fmt: skip
        self.updater = Updater(config, "unit-1", self.store, self.service, self.metrics)

    async def ask(self, value: float) -> tuple[str, str, str]:
        """One request of one row: who answered, why, which version."""
        rows = np.full((1, 4), value, np.float32)
        answer = await self.service.submit("demo", None, {"features": rows})
        return answer.source, answer.reason, answer.version

    async def take_up(self) -> None:
        """Serve what the store holds, as app.run does, and every second of a second agent."""

        async def start(model: str) -> None:
            await self.service.start(model, self.store.current(model))

        standby = Standby(self.store, self.service, start)
        await standby.follow()
        await standby.follow()

    def state(self) -> State:
        return self.store.record("demo").state


def test_a_release_that_seems_slow_is_looked_at_three_times_before_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = Publisher(tmp_path / "fleet")

    async def scenario() -> None:
        # Every request waits 3 ms for company; none may take a thousandth of what those before took.
        agent = Agent(
            tmp_path / "store", publisher, engine=EngineConfig(batch_delay_us=3000),
            probation=ProbationConfig(seconds=0, requests=60, max_latency_ratio=0.001),
        )  # fmt: skip
        publisher.assign(publisher.publish("1.0.0"))
        running = asyncio.create_task(agent.updater.run())
        try:
            async with asyncio.timeout(PATIENCE):
                while agent.service.running("demo") is None:
                    await asyncio.sleep(0.01)
                while agent.state() is not State.COMMITTED:
                    await agent.ask(1)
                publisher.assign(publisher.publish("2.0.0"))
                while agent.store.record("demo").last_result != "failed_rollback_complete":
                    await agent.ask(1)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            record = agent.store.record("demo")
            agent.store.close()
        assert record.last_reason == "latency"
        assert [str(refused.version) for refused in record.rejected] == ["2.0.0"]
        assert sum("looking again" in line.getMessage() for line in caplog.records) == 2

    with caplog.at_level("INFO"):
        asyncio.run(scenario())


def test_a_swap_under_load_drops_nothing_and_a_bad_model_is_taken_back(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet")

    async def scenario() -> None:
        agent = Agent(tmp_path / "store", publisher)
        publisher.assign(publisher.publish("1.0.0"))
        await agent.updater.recover()
        running = asyncio.create_task(agent.updater.run())
        async with asyncio.timeout(PATIENCE):
            while agent.service.running("demo") is None:
                await asyncio.sleep(0.01)

        answers: list[tuple[str, str, str]] = []
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                answers.append(await agent.ask(1.0))
                await asyncio.sleep(0)

        loading = asyncio.create_task(load())
        async with asyncio.timeout(PATIENCE):
            publisher.assign(publisher.publish("2.0.0"))
            while not (agent.state() is State.COMMITTED and answers and answers[-1][2] == "2.0.0"):
                await asyncio.sleep(0.01)
            # It passes its golden vectors, and answers NaN to what the plant really sends.
            publisher.assign(publisher.publish("3.0.0", non_finite_above=0.9))
            while agent.state() is not State.ROLLED_BACK:
                await asyncio.sleep(0.01)
        stop.set()
        await loading
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        versions = [version for _, _, version in answers]
        changes = [b for a, b in itertools.pairwise(versions) if a != b]
        assert changes == ["2.0.0", "3.0.0", "2.0.0"], "each swap is one cut, no request fails"
        assert {(source, reason) for source, reason, version in answers if version != "3.0.0"} == {
            ("model", "ok")
        }
        assert {(source, reason) for source, reason, version in answers if version == "3.0.0"} <= {
            ("fallback", "non_finite"),
            ("model", "ok"),
        }
        record = agent.store.record("demo")
        assert (record.last_result, record.last_reason) == ("failed_rollback_complete", "fallback")
        current = agent.store.current("demo")
        assert current is not None
        assert current.manifest.version == "2.0.0"
        agent.store.close()

    asyncio.run(scenario())


def test_a_candidate_sees_real_requests_before_it_answers_any(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet")

    async def scenario() -> None:
        shadow = ShadowConfig(requests=20, share=1.0)
        agent = Agent(tmp_path / "store", publisher, shadow)
        old = publisher.publish("1.0.0")
        publisher.assign(old)
        running = asyncio.create_task(agent.updater.run())
        async with asyncio.timeout(PATIENCE):
            while agent.service.running("demo") is None:
                await asyncio.sleep(0.01)
            while agent.state() is not State.COMMITTED:
                await agent.ask(1.0)

            # It decides all that this plant sends otherwise, and no answer is ever its.
            bad = publisher.publish("2.0.0", threshold=0.5)
            publisher.assign_candidate(bad, stable=old, mode=Mode.SHADOW)
            while agent.store.record("demo").last_reason != "disagreement":
                assert (await agent.ask(1.0))[2] == "1.0.0"
                await asyncio.sleep(0)

            good = publisher.publish("3.0.0")
            publisher.assign_candidate(good, stable=old, mode=Mode.SHADOW)
            versions = [(await agent.ask(1.0))[2]]
            while versions[-1] != "3.0.0" or agent.state() is not State.COMMITTED:
                versions.append((await agent.ask(1.0))[2])
                await asyncio.sleep(0)
        assert "2.0.0" not in versions
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        agent.store.close()

    asyncio.run(scenario())


def test_a_model_damaged_on_disk_is_repaired_while_the_rules_answer(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet")

    async def scenario() -> None:
        first = Agent(tmp_path / "store", publisher)
        publisher.assign(publisher.publish("1.0.0"))
        await first.updater.run_once()
        model = first.store.layout.model("demo") / "current" / "model.onnx"
        model.chmod(0o644)
        model.write_bytes(b"rot")
        first.store.close()

        agent = Agent(tmp_path / "store", publisher)
        await agent.updater.recover()
        await agent.service.start("demo", agent.store.current("demo"))
        assert await agent.ask(1.0) == ("fallback", "corrupt_model", "1.0.0")
        await agent.updater.run_once()
        assert await agent.ask(1.0) == ("model", "ok", "1.0.0")
        agent.store.close()

    asyncio.run(scenario())


def test_where_a_first_release_fails_its_rules_answer_and_a_restart_does_not_load_it(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet")

    async def scenario() -> None:
        first = Agent(tmp_path / "store", publisher)
        # It passes its golden vectors, and answers NaN to what the plant really sends.
        publisher.assign(publisher.publish("1.0.0", non_finite_above=0.9))
        await first.updater.run_once()
        async with asyncio.timeout(PATIENCE):
            while first.state() is State.PROBATION:
                await first.ask(1.0)
                await first.updater.run_once()
        assert await first.ask(0.0) == ("fallback", "rejected", "1.0.0")
        first.store.close()

        agent = Agent(tmp_path / "store", publisher)
        await agent.updater.recover()
        await agent.take_up()
        await agent.updater.run_once()
        assert await agent.ask(0.0) == ("fallback", "rejected", "1.0.0")
        reader = Agent(tmp_path / "store", publisher, reads=True)  # a second agent, which nobody has told
        await reader.take_up()
        assert await reader.ask(0.0) == ("fallback", "rejected", "1.0.0")
        publisher.assign(publisher.publish("1.0.1"))
        await agent.updater.run_once()
        await reader.take_up()
        for one in (agent, reader):
            assert await one.ask(1.0) == ("model", "ok", "1.0.1")
        agent.store.close()

    asyncio.run(scenario())

"""A/B: a candidate answers a sticky share of the requests, and costs nobody an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.errors import EngineError, UnknownModel
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from tests.support.bundles import tiny_bundle
from tests.support.faulty import HANGS, faulty_bundle

GOOD, BAD = np.full((1, 4), 0.5, np.float32), np.full((1, 4), 30.0, np.float32)
KEYS = [f"press {number}" for number in range(400)]


class Rig:
    def __init__(self, **serving: int) -> None:
        self.registry = CollectorRegistry()
        options = ServingConfig(deadline_ms=60_000, **serving)
        metrics = AgentMetrics(self.registry, "test", "0")
        self.service = Service(options, EngineConfig(), DriftConfig(), metrics)

    async def begin(self, folder: Path, share: float, **candidate: object) -> None:
        await self.service.start("demo", tiny_bundle(folder / "1"))
        bundle = tiny_bundle(folder / "2", version="2.0.0", **candidate)
        self.service.split(await self.service.prepare(bundle), share)

    async def ask(self, rows: np.ndarray = GOOD, **options: object) -> Answer:
        return await self.service.submit("demo", options.pop("version", None), {"features": rows}, **options)

    async def takers(self, **options: object) -> set[str]:
        """The keys that the candidate answers."""
        return {key for key in KEYS if (await self.ask(source=key, **options)).version == "2.0.0"}

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model": "demo"} | labels)


def test_its_share_of_the_keys_gets_the_candidate_always_and_a_larger_share_adds_keys(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 0.25)
        first = await rig.takers()
        assert 60 < len(first) < 140
        assert await rig.takers() == first
        again = Rig()
        await again.begin(tmp_path / "later", 0.25)
        assert await again.takers() == first
        more = Rig()
        await more.begin(tmp_path / "more", 0.5)
        assert await more.takers() > first

    asyncio.run(story())


def test_the_key_is_the_source_else_the_id_else_the_rows(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 0.5)
        by_source = await rig.takers()
        assert {key for key in KEYS if (await rig.ask(key=key)).version == "2.0.0"} == by_source
        assert await rig.takers(key="an id that is another each time") == by_source
        rows = np.random.default_rng(1).uniform(-1, 1, (200, 1, 4)).astype(np.float32)
        versions = [(await rig.ask(row)).version for row in rows]
        assert 60 < versions.count("2.0.0") < 140
        assert [(await rig.ask(row.copy())).version for row in rows] == versions

    asyncio.run(story())


def test_a_version_that_is_insisted_on_answers_whatever_the_key_says(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 0.5)
        for version in ("1.0.0", "2.0.0"):
            for key in KEYS[:20]:
                assert (await rig.ask(source=key, version=version)).version == version
        with pytest.raises(UnknownModel):
            await rig.ask(version="3.0.0")

    asyncio.run(story())


def test_a_version_that_is_insisted_on_is_no_attempt_of_the_other_ones_half_open_breaker(tmp_path) -> None:
    async def story() -> None:
        rig = Rig(breaker_failures=3)
        await rig.begin(tmp_path, 0.5)
        slot = rig.service._slots["demo"]
        slot.failures = 3  # and its time is over
        assert (await rig.ask(version="2.0.0")).version == "2.0.0"
        assert slot.failures == 3
        assert (await rig.ask()).version == "1.0.0", "this one tries"
        assert slot.failures == 0

    asyncio.run(story())


def test_where_both_releases_are_late_the_machine_is_busy_and_the_candidate_goes_on(tmp_path) -> None:
    async def story() -> None:
        rig = Rig(breaker_failures=2, breaker_seconds=3600.0)
        hanging = [faulty_bundle(tmp_path / v, hanging=True, version=v) for v in ("1.0.0", "2.0.0")]
        await rig.service.start("demo", hanging[0])
        rig.service.split(await rig.service.prepare(hanging[1]), 0.5)
        stuck = np.array([HANGS], np.float32)
        assert (await rig.ask(stuck, version="1.0.0", deadline=0.03)).reason == "deadline"
        for _ in range(4):
            assert (await rig.ask(stuck, version="2.0.0", deadline=0.03)).reason == "deadline"
        report = rig.service.split_report("demo")
        assert (report.ended, report.candidate.late_rows) == ("", 4)
        rig.service._slots["demo"].failures = 0  # the other one does well
        for _ in range(2):
            await rig.ask(stuck, version="2.0.0", deadline=0.03)
        assert rig.service.split_report("demo").ended == "breaker_open"

    asyncio.run(story())


def test_both_releases_are_counted_each_by_itself(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 0.5, threshold=0.1)  # it fails what the other passes
        takers = await rig.takers()
        report = rig.service.split_report("demo")
        assert (report.candidate.rows, report.candidate.failed_rows) == (len(takers), len(takers))
        assert (report.active.rows, report.active.failed_rows) == (len(KEYS) - len(takers), 0)
        assert sum(report.candidate.latencies) == len(takers)
        assert sum(report.active.latencies) == len(KEYS) - len(takers)
        assert rig.count("edge_answers_total", version="2.0.0", source="model", reason="ok") == len(takers)
        assert rig.count("edge_split_share", version="2.0.0") == 0.5
        rig.service.end_split("demo")
        assert rig.count("edge_split_share", version="2.0.0") is None
        assert rig.service.split_report("demo") is None
        assert (await rig.takers()) == set()

    asyncio.run(story())


def test_where_the_candidate_fails_the_rules_of_the_release_beside_it_answer(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        everything_passes = "format: 1\ndefault: pass\nlimits: {f0: {high: 1e6}}\n"
        await rig.begin(tmp_path, 1.0, non_finite_above=100.0, rules=everything_passes, threshold=2.0)
        answer = await rig.ask(BAD, source="a")
        assert (answer.source, answer.reason, answer.version) == ("fallback", "non_finite", "1.0.0")
        assert (answer.failed, answer.decision.threshold) == ([True], 4.0)
        report = rig.service.split_report("demo")
        assert (report.candidate.rows, report.candidate.non_finite_rows) == (1, 1)
        assert report.active.rows == 0
        assert rig.count("edge_answers_total", version="2.0.0", source="fallback", reason="non_finite") == 1

    asyncio.run(story())


def test_a_candidate_whose_breaker_opens_answers_nothing_more(tmp_path) -> None:
    async def story() -> None:
        rig = Rig(breaker_failures=3)
        await rig.begin(tmp_path, 1.0)
        for _ in range(3):
            answer = await rig.ask(source="a", deadline=1e-9)
            assert (answer.source, answer.reason, answer.version) == ("fallback", "deadline", "1.0.0")
        answer = await rig.ask(source="a")
        assert (answer.source, answer.version) == ("model", "1.0.0")
        report = rig.service.split_report("demo")
        assert (report.ended, report.candidate.fallback_rows) == ("breaker_open", 3)
        assert rig.count("edge_split_share", version="2.0.0") == 0
        with pytest.raises(UnknownModel):
            await rig.ask(version="2.0.0")

    asyncio.run(story())


def test_one_success_between_failures_keeps_the_candidate(tmp_path) -> None:
    async def story() -> None:
        rig = Rig(breaker_failures=2)
        await rig.begin(tmp_path, 1.0)
        for _ in range(4):
            assert (await rig.ask(deadline=1e-9)).reason == "deadline"
            assert (await rig.ask()).version == "2.0.0"
        assert rig.service.split_report("demo").ended == ""

    asyncio.run(story())


def test_the_kill_switch_holds_for_the_candidate_too(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 1.0)
        rig.service.set_killed("demo", killed=True)
        for version in (None, "2.0.0"):
            answer = await rig.ask(version=version)
            assert (answer.source, answer.reason, answer.version) == ("fallback", "killed", "1.0.0")

    asyncio.run(story())


def test_a_candidate_of_another_form_is_refused(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        with pytest.raises(EngineError, match=r"its inputs are not those of 1\.0\.0"):
            await rig.begin(tmp_path, 0.5, features=5)
        assert (await rig.ask()).version == "1.0.0"

    asyncio.run(story())


def test_a_candidate_can_be_swapped_in_and_drift_is_judged_then(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "1"))
        prepared = await rig.service.prepare(tiny_bundle(tmp_path / "2", version="2.0.0"))
        rig.service.split(prepared, 1.0)
        with pytest.raises(RuntimeError):
            rig.service.shadow(prepared, 1.0)
        assert (await rig.ask()).version == "2.0.0"
        assert rig.service._slots["demo"].watch.waiting == 0
        rig.service.swap(prepared)
        assert rig.service.split_report("demo") is None
        assert (await rig.ask()).version == "2.0.0"
        assert rig.service.served("demo").rows == 1
        assert rig.service._slots["demo"].watch.waiting == 1

    asyncio.run(story())


def test_a_request_in_flight_when_the_split_ends_is_still_answered(tmp_path) -> None:
    async def story() -> None:
        rig = Rig()
        await rig.begin(tmp_path, 1.0)
        asked = [rig.service.submit("demo", None, {"features": GOOD}) for _ in range(5)]
        rig.service.end_split("demo")
        answers = await asyncio.gather(*asked)
        assert {(answer.version, answer.source) for answer in answers} == {("2.0.0", "model")}

    asyncio.run(story())

"""Alarms over time in the service: every row is shown to the rules, in order, whoever answers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import Bundle
from edge_agent.errors import InvalidInput
from edge_agent.rules.evaluate import RuleSet, RuleState
from edge_agent.serving.history import MOST_WAITING, SLICE, History, Noted
from edge_agent.serving.service import Answer, Service
from edge_agent.telemetry.metrics import AgentMetrics
from tests.support.bundles import feature_names, tiny_bundle

ALARMS = """
format: 2
default: pass
limits:
  f0: {high: 10, deadband: 2, on_delay: 3s, off_delay: 2s}
rules:
  frozen: {stuck: f1, for: 10s}
  falling: {rate: f2, fall: 1.0, per: 4s}
  over: {when: f3 > 8, latch: true}
"""
LATCH = "format: 2\ndefault: pass\nrules: {over: {when: f3 > 8, latch: true}}\nreset: {when: f0 > 50}\n"
QUIET = np.zeros((1, 4), np.float32)
OVER = np.array([[0, 0, 0, 9]], np.float32)
RESET = np.array([[60, 0, 0, 0]], np.float32)


def rule_set(text: str = ALARMS) -> RuleSet:
    return RuleSet.parse(text, feature_names())


def decided(history: History, noted: Noted) -> list[bool]:
    return [score > 1 for score in history.judge(noted).tolist()]


rows_of_requests = st.lists(
    st.tuples(
        st.sampled_from(["", "press 1", "press 2"]),
        st.floats(0, 5),  # seconds since the one before
        st.lists(st.lists(st.sampled_from([0.0, 1.0, 7.0, 9.0, 11.0, np.nan]), min_size=4, max_size=4),
                 min_size=1, max_size=2 * SLICE),
        st.booleans(),  # judged at once, or when all have come
    ),
    max_size=30,
)  # fmt: skip


@given(rows_of_requests)
@settings(max_examples=60, deadline=None)
def test_what_is_judged_early_late_or_in_slices_is_what_the_rules_say_row_by_row(requests) -> None:
    rules = rule_set()

    async def story() -> None:
        history = History(rules, 10)
        states: dict[str, RuleState] = {}
        late, now = [], 0.0
        for source, pause, rows, at_once in requests:
            now += pause
            x = np.array(rows, np.float32)
            expected = []
            for row in x:
                verdicts = rules.evaluate(row[None], state=states.get(source, RuleState()), now=now)
                states[source] = verdicts.state
                expected += verdicts.score.tolist()
            noted = history.note(source, x, now)
            if at_once:
                assert history.judge(noted).tolist() == expected
            late.append((noted, expected))
        for noted, expected in reversed(late):
            assert history.judge(noted).tolist() == expected
        assert history.alarms() == {name: state.names for name, state in states.items() if state.names}

    asyncio.run(story())


def test_rows_are_seen_although_nobody_asks_for_a_verdict() -> None:
    async def story() -> None:
        history = History(rule_set(LATCH), 10)
        history.note("", OVER, 0.0)
        history.note("", QUIET, 1.0)
        while not history.alarms():
            await asyncio.sleep(0.001)
        assert history.alarms() == {"": ("over",)}

    asyncio.run(story())


def test_a_flood_waits_in_bounded_memory_and_nothing_of_it_is_left_out() -> None:
    async def story() -> None:
        history = History(rule_set(LATCH), 10)
        history.note("", OVER, 0.0)
        every = [history.note("", QUIET, 1.0) for _ in range(10 * MOST_WAITING)]
        every.append(history.note("", np.repeat(QUIET, 5 * MOST_WAITING, axis=0), 2.0))
        waiting = sum(len(noted.rows) - noted.seen for noted in every)
        assert waiting <= MOST_WAITING
        assert all(decided(history, noted)[0] for noted in every)

    asyncio.run(story())


def test_the_source_not_heard_of_longest_is_forgotten_first(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        history = History(rule_set(LATCH), 2)
        history.note("a", OVER, 0.0)
        late = history.note("b", OVER, 1.0)
        history.note("a", QUIET, 2.0)
        history.note("c", QUIET, 3.0)
        assert decided(history, late) == [True]
        assert decided(history, history.note("a", QUIET, 4.0)) == [True]
        assert decided(history, history.note("b", QUIET, 5.0)) == [False]
        assert set(history.alarms()) <= {"a"}

    asyncio.run(story())
    assert caplog.text.count("max_sources") == 1


def service(**serving: int) -> Service:
    metrics = AgentMetrics(CollectorRegistry(), "test", "0")
    options = ServingConfig(deadline_ms=60_000, **serving)
    return Service(options, EngineConfig(), DriftConfig(enabled=False), metrics)


def bundle(folder, rules: str = LATCH, **options) -> Bundle:
    return tiny_bundle(folder, rules=rules, **options)


async def ask(agent: Service, rows: np.ndarray, source: str = "") -> Answer:
    return await agent.submit("demo", None, {"features": rows}, source=source)


def test_a_latch_set_while_the_model_answered_holds_when_it_no_longer_does(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1"))
        assert (await ask(agent, OVER)).source == "model"
        assert (await ask(agent, QUIET)).failed == [False]
        agent.unload("demo")
        answer = await ask(agent, QUIET)
        assert (answer.reason, answer.failed) == ("unloaded", [True])
        assert agent.alarms("demo") == {"": ("over",)}
        assert (await ask(agent, RESET)).failed == [False]
        assert (await ask(agent, QUIET)).failed == [False]
        assert agent.alarms("demo") == {}

    asyncio.run(story())


def test_each_source_has_its_own_alarms(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1"))
        agent.set_killed("demo", killed=True)
        assert (await ask(agent, OVER, "press 1")).failed == [True]
        assert (await ask(agent, QUIET, "press 2")).failed == [False]
        assert (await ask(agent, QUIET)).failed == [False]
        assert (await ask(agent, QUIET, "press 1")).failed == [True]

    asyncio.run(story())


def test_a_request_whose_model_fails_late_is_judged_in_its_own_place(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1", non_finite_above=500.0))
        model_fails = np.array([[45, 45, 0, 0]], np.float32)
        late = agent.submit("demo", None, {"features": model_fails})
        agent.set_killed("demo", killed=True)
        assert (await ask(agent, OVER)).failed == [True]
        answer = await late  # computed after the row that came behind it was judged
        assert (answer.reason, answer.failed) == ("non_finite", [False])

    asyncio.run(story())


def test_a_release_with_the_same_alarms_goes_on_with_them_and_one_with_others_begins_anew(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1"))
        await ask(agent, OVER)
        agent.swap(await agent.prepare(bundle(tmp_path / "2", version="2.0.0")))
        agent.set_killed("demo", killed=True)
        assert (await ask(agent, QUIET)).failed == [True]
        other = LATCH.replace("f3 > 8", "f3 > 8.5")
        agent.swap(await agent.prepare(bundle(tmp_path / "3", other, version="3.0.0")))
        assert (await ask(agent, QUIET)).failed == [False]
        assert (await ask(agent, OVER)).failed == [True]
        without = "format: 1\ndefault: pass\nlimits: {f3: {high: 8}}\n"
        agent.swap(await agent.prepare(bundle(tmp_path / "4", without, version="4.0.0")))
        assert (await ask(agent, QUIET)).failed == [False]
        assert agent.alarms("demo") == {}

    asyncio.run(story())


def test_a_request_in_flight_over_a_swap_keeps_its_place(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1", non_finite_above=500.0))
        wider = await agent.prepare(bundle(tmp_path / "2", version="2.0.0", features=6))
        await ask(agent, OVER)
        model_fails = np.array([[45, 45, 0, 0]], np.float32)
        flying = agent.submit("demo", None, {"features": model_fails})
        agent.swap(wider)
        answer = await flying
        assert (answer.version, answer.reason, answer.failed) == ("1.0.0", "non_finite", [True])
        agent.set_killed("demo", killed=True)
        assert (await ask(agent, np.zeros((1, 6), np.float32))).failed == [True]

    asyncio.run(story())


def test_what_is_refused_leaves_no_trace_in_the_history(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", bundle(tmp_path / "1"))
        with pytest.raises(InvalidInput):
            await ask(agent, np.array([[0, 0, 9]], np.float32))
        agent.set_killed("demo", killed=True)
        assert (await ask(agent, QUIET)).failed == [False]

    asyncio.run(story())


def test_rules_without_time_keep_no_history(tmp_path) -> None:
    async def story() -> None:
        agent = service()
        await agent.start("demo", tiny_bundle(tmp_path / "1"))
        await ask(agent, OVER)
        assert agent._slots["demo"].history is None

    asyncio.run(story())

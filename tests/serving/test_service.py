from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import MODEL, RULES, open_bundle, write_bundle
from edge_agent.errors import BadRules, EngineError, InvalidInput, Overloaded, Unavailable, UnknownModel
from edge_agent.serving.service import Service
from edge_agent.telemetry.metrics import AgentMetrics
from tests.support.bundles import expected_score, tiny_bundle
from tests.support.faulty import RAISES, counting, faulty_bundle

GOOD = np.full((1, 4), 0.5, np.float32)
BAD = np.full((1, 4), 30.0, np.float32)


class Rig:
    """A real service with its own registry."""

    def __init__(self, serving=None, engine=None, drift=None):
        self.registry = CollectorRegistry()
        self.metrics = AgentMetrics(self.registry, "test", "0")
        self.service = Service(
            serving or ServingConfig(), engine or EngineConfig(), drift or DriftConfig(), self.metrics
        )

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, {"model": "demo", "version": "1.0.0"} | labels)

    async def ask(self, rows, **options):
        return await self.service.submit("demo", None, {"features": rows}, **options)


def test_the_model_answers_with_its_score_and_decision(tmp_path):
    async def story():
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        rows = np.concatenate([GOOD, BAD])
        answer = await rig.ask(rows)
        assert (answer.source, answer.reason, answer.version) == ("model", "ok", "1.0.0")
        assert answer.outputs["score"] == pytest.approx(expected_score(rows))
        assert answer.failed == [False, True]
        assert rig.count("edge_answers_total", source="model", reason="ok") == 2
        assert rig.count("edge_decisions_total", decision="fail") == 1
        assert rig.count("edge_inference_duration_seconds_count") == 1

    asyncio.run(story())


def test_requests_of_one_turn_go_through_the_engine_together_and_answer_as_alone(tmp_path):
    async def story():
        rig = Rig(engine=EngineConfig(inline_below_ms=1000.0, max_batch_rows=64))
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        rows = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
        alone = [(await rig.ask(row[None])).outputs["score"] for row in rows]
        assert rig.count("edge_batch_rows_count") == 40
        together = await asyncio.gather(*[rig.ask(row[None]) for row in rows])
        assert rig.count("edge_batch_rows_count") == 41
        assert [a.tobytes() for a in alone] == [a.outputs["score"].tobytes() for a in together]

    asyncio.run(story())


def test_a_poisoned_request_does_not_spoil_the_answers_beside_it(tmp_path):
    async def story():
        rig = Rig(engine=EngineConfig(inline_below_ms=1000.0))
        await rig.service.start("demo", tiny_bundle(tmp_path / "b", non_finite_above=100.0))
        good, poisoned = await asyncio.gather(rig.ask(GOOD), rig.ask(BAD))
        assert (good.source, poisoned.source, poisoned.reason) == ("model", "fallback", "non_finite")
        assert good.outputs["score"].shape == (1,)  # its own row, not those of the whole batch
        assert (good.failed, len(good.scores)) == ([False], 1)
        assert poisoned.failed == [True]
        assert rig.count("edge_answers_total", source="fallback", reason="non_finite") == 1

    asyncio.run(story())


def test_the_rules_answer_after_unloading_on_the_scale_of_the_model(tmp_path):
    async def story():
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        rig.service.unload("demo")
        answer = await rig.ask(np.concatenate([GOOD, BAD]))
        assert (answer.source, answer.reason) == ("fallback", "unloaded")
        assert answer.failed == [False, True]
        assert [score > answer.decision.threshold for score in answer.scores] == [False, True]
        assert answer.outputs["score"].dtype == np.float32
        assert rig.service.ready()
        await rig.service.load("demo", open_bundle(tmp_path / "b"))
        assert (await rig.ask(GOOD)).source == "model"

    asyncio.run(story())


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_corrupt_model_is_never_loaded_and_its_rules_answer(tmp_path):
    async def story():
        bundle = tiny_bundle(tmp_path / "b")
        damage(bundle.path / MODEL)
        rig = Rig()
        await rig.service.start("demo", bundle)
        answer = await rig.ask(BAD)
        assert (answer.source, answer.reason, answer.failed) == ("fallback", "corrupt_model", [True])
        assert rig.service.statuses()[0].state == "corrupt"

    asyncio.run(story())


def test_rules_of_the_previous_release_answer_where_even_the_current_rules_are_damaged(tmp_path):
    async def story():
        spare = tiny_bundle(tmp_path / "old", version="0.9.0")
        bundle = tiny_bundle(tmp_path / "b")
        damage(bundle.path / MODEL)
        damage(bundle.path / RULES)
        rig = Rig()
        await rig.service.start("demo", bundle, spare)
        answer = await rig.ask(BAD)
        assert (answer.reason, answer.version, answer.failed) == ("corrupt_model", "0.9.0", [True])

    asyncio.run(story())


def test_with_no_rules_at_all_the_configured_default_answers(tmp_path):
    async def story():
        bundle = tiny_bundle(tmp_path / "b")
        damage(bundle.path / MODEL)
        (bundle.path / RULES).unlink()
        rig = Rig(ServingConfig(default_decision="fail"))
        await rig.service.start("demo", bundle)
        assert (await rig.ask(GOOD)).failed == [True]

    asyncio.run(story())


@pytest.mark.parametrize("decision", ["pass", "fail"])
def test_where_a_bundle_brings_no_rules_the_configured_default_answers(tmp_path, decision):
    async def story():
        seed = tiny_bundle(tmp_path / "seed")
        files = {name: seed.read(name) for name in seed.manifest.members if name != RULES}
        (tmp_path / "b").mkdir()
        rig = Rig(ServingConfig(default_decision=decision))
        await rig.service.start("demo", write_bundle(tmp_path / "b", seed.manifest, files))
        assert (await rig.ask(GOOD)).source == "model"
        rig.service.set_killed("demo", killed=True)
        assert (await rig.ask(GOOD)).failed == [decision == "fail"]

    asyncio.run(story())


def test_the_kill_switch_silences_the_model_and_is_taken_back(tmp_path):
    async def story():
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        rig.service.set_killed("demo", True)
        assert (await rig.ask(GOOD)).reason == "killed"
        rig.service.set_killed("demo", False)
        assert (await rig.ask(GOOD)).reason == "ok"

    asyncio.run(story())


def test_a_swap_under_load_loses_no_request_and_each_is_answered_by_one_release(tmp_path):
    async def story():
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "1"))
        new = await rig.service.prepare(tiny_bundle(tmp_path / "2", version="2.0.0"))
        before = [rig.ask(GOOD) for _ in range(50)]
        futures = [asyncio.ensure_future(request) for request in before]
        await asyncio.sleep(0)  # the requests are queued on the old release
        rig.service.swap(new)
        after = await rig.ask(GOOD)
        answers = await asyncio.gather(*futures)
        assert {answer.version for answer in answers} == {"1.0.0"}
        assert {answer.source for answer in answers} == {"model"}
        assert after.version == "2.0.0"
        info = {"model": "demo", "version": "1.0.0", "digest": answers[0].digest}
        assert rig.registry.get_sample_value("edge_model_info", info) is None
        assert rig.service.served("demo").rows == 1

    asyncio.run(story())


def endless_bundle(folder):
    """Like the tiny bundle, but the model counts to the first feature: 1e9 keeps it busy for minutes."""
    seed = tiny_bundle(folder.with_name("seed"))
    nodes = [
        helper.make_node("ReduceMax", ["features"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["trips"], to=TensorProto.INT64),
        helper.make_node("Loop", ["trips", "", "start"], ["counted"], body=counting()),
        helper.make_node("Mul", ["features", "features"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["counted", "zero"], ["nothing"]),
        helper.make_node("Add", ["mean", "nothing"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "endless",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.float32(0), name) for name in ("start", "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    files = {name: (seed.path / name).read_bytes() for name in seed.manifest.members}
    folder.mkdir()
    return write_bundle(
        folder, msgspec.structs.replace(seed.manifest, members={}), files | {MODEL: model.SerializeToString()}
    )


ENDLESS = np.full((1, 4), 1e9, np.float32)


def test_a_stuck_model_is_answered_for_at_the_deadline_and_does_not_take_the_service_along(tmp_path):
    async def story():
        rig = Rig(
            ServingConfig(deadline_ms=50.0, breaker_failures=100),
            EngineConfig(inline_below_ms=0.0, warmup_runs=1),
        )
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        stuck = await rig.ask(ENDLESS)
        assert (stuck.source, stuck.reason, stuck.failed) == ("fallback", "deadline", [True])
        # The run is aborted: the thread is free again, the next request is answered by the model.
        assert (await rig.ask(GOOD, deadline=30.0)).source == "model"

    asyncio.run(story())


def test_stuck_requests_that_travelled_together_leave_the_model_free_for_the_next(tmp_path):
    async def story():
        rig = Rig(
            ServingConfig(deadline_ms=50.0, breaker_failures=1000),
            EngineConfig(inline_below_ms=0.0, warmup_runs=1),
        )
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        for _ in range(3):
            stuck = await asyncio.gather(*[rig.ask(ENDLESS) for _ in range(10)])
            assert {answer.reason for answer in stuck} == {"deadline"}
            assert (await rig.ask(GOOD, deadline=30.0)).source == "model"

    asyncio.run(story())


def test_a_model_with_a_loop_never_runs_on_the_event_loop_however_fast_it_was_at_first(tmp_path):
    async def story():
        rig = Rig(ServingConfig(deadline_ms=50.0), EngineConfig(inline_below_ms=1e6, warmup_runs=1))
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        turned = asyncio.create_task(asyncio.sleep(0.001, "turned"))
        stuck = rig.service.submit("demo", None, {"features": ENDLESS})
        assert await turned == "turned"
        assert not stuck.done()
        assert (await stuck).reason == "deadline"

    asyncio.run(story())


def test_a_request_without_time_left_is_answered_by_the_rules_at_once(tmp_path):
    async def story():
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        assert (await rig.ask(GOOD, deadline=0.0)).reason == "deadline"

    asyncio.run(story())


def test_what_the_model_had_no_time_for_is_told_from_what_it_got_wrong(tmp_path):
    async def story():
        rig = Rig(
            ServingConfig(breaker_failures=2, breaker_seconds=3600.0),
            EngineConfig(inline_below_ms=0.0, warmup_runs=1),
        )
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        assert (await rig.ask(GOOD, deadline=-1.0)).reason == "deadline"
        assert rig.service.served("demo").fallback_rows == 0, "the model was not asked"
        for reason in ("deadline", "deadline", "breaker_open"):
            assert (await rig.ask(ENDLESS, deadline=0.03)).reason == reason
        served = rig.service.served("demo")
        assert (served.rows, served.fallback_rows, served.late_rows) == (4, 3, 3)

    asyncio.run(story())


def test_a_breaker_that_errors_opened_counts_no_row_as_late(tmp_path):
    async def story():
        rig = Rig(ServingConfig(breaker_failures=1, breaker_seconds=3600.0))
        await rig.service.start("demo", faulty_bundle(tmp_path / "b", hanging=False))
        raises = np.array([RAISES], np.float32)
        for reason in ("model_error", "breaker_open"):
            assert (await rig.ask(raises)).reason == reason
        served = rig.service.served("demo")
        assert (served.rows, served.fallback_rows, served.late_rows) == (2, 2, 0)

    asyncio.run(story())


def test_the_breaker_opens_after_failures_in_a_row_and_closes_after_a_success(tmp_path):
    async def story():
        rig = Rig(
            ServingConfig(deadline_ms=30.0, breaker_failures=2, breaker_seconds=0.05),
            EngineConfig(inline_below_ms=0.0, warmup_runs=1),
        )
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        assert [(await rig.ask(ENDLESS)).reason for _ in range(3)] == ["deadline", "deadline", "breaker_open"]
        assert rig.service.served("demo").fallback_rows == 3
        deadline = time.monotonic() + 30
        while (answer := await rig.ask(GOOD, deadline=30.0)).reason == "breaker_open":
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        assert answer.source == "model"

    asyncio.run(story())


def test_half_open_one_request_tries_the_model_and_the_others_do_not_wait_for_it(tmp_path):
    async def story():
        rig = Rig(
            ServingConfig(deadline_ms=60_000.0, breaker_failures=1, breaker_seconds=3600.0),
            EngineConfig(inline_below_ms=0.0, warmup_runs=1),
        )
        await rig.service.start("demo", endless_bundle(tmp_path / "b"))
        assert (await rig.ask(ENDLESS, deadline=0.03)).reason == "deadline"
        assert (await rig.ask(GOOD)).reason == "breaker_open"
        rig.service._slots["demo"].open_until = time.monotonic()  # an hour later
        tries = rig.service.submit("demo", None, {"features": ENDLESS}, deadline=0.04)
        others = [await rig.ask(GOOD) for _ in range(20)]
        assert {answer.reason for answer in others} == {"breaker_open"}
        assert (await tries).reason == "deadline"
        assert (await rig.ask(GOOD)).reason == "breaker_open"

    asyncio.run(story())


def test_beyond_the_limit_of_waiting_rows_a_request_is_refused_at_once(tmp_path):
    async def story():
        rig = Rig(ServingConfig(max_pending_rows=10), EngineConfig(inline_below_ms=1000.0))
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        accepted = [rig.service.submit("demo", None, {"features": GOOD}) for _ in range(10)]
        with pytest.raises(Overloaded, match="10 rows wait"):
            rig.service.submit("demo", None, {"features": GOOD})
        assert {answer.source for answer in await asyncio.gather(*accepted)} == {"model"}
        assert (await rig.ask(GOOD)).source == "model"

    asyncio.run(story())


def test_what_is_not_served_here_is_said(tmp_path):
    async def story():
        rig = Rig()
        with pytest.raises(UnknownModel, match="name one, this agent serves none"):
            rig.service.submit(None, None, {"features": GOOD})
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        with pytest.raises(UnknownModel, match="no model 'other' here, this agent serves demo"):
            rig.service.submit("other", None, {"features": GOOD})
        with pytest.raises(UnknownModel, match=r"no version '9\.9\.9' here, it is 1\.0\.0"):
            rig.service.submit("demo", "9.9.9", {"features": GOOD})
        with pytest.raises(InvalidInput, match="expected features"):
            rig.service.submit("demo", None, {"x": GOOD})
        await rig.service.start("second", None)
        with pytest.raises(InvalidInput, match="name one, this agent serves demo, second"):
            rig.service.submit(None, None, {"features": GOOD})
        with pytest.raises(Unavailable, match="model 'second' is absent"):
            rig.service.submit("second", None, {"features": GOOD})
        assert not rig.service.ready()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("member", "content", "error"),
    [(MODEL, b"not a model", EngineError), (RULES, b"default: perhaps", BadRules)],
)
def test_a_release_that_cannot_run_is_refused_and_the_old_one_goes_on(tmp_path, member, content, error):
    async def story():
        seed = tiny_bundle(tmp_path / "seed", version="2.0.0")
        files = {name: (seed.path / name).read_bytes() for name in seed.manifest.members}
        (tmp_path / "broken").mkdir()
        broken = write_bundle(
            tmp_path / "broken", msgspec.structs.replace(seed.manifest, members={}), files | {member: content}
        )
        rig = Rig()
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        with pytest.raises(error):
            await rig.service.prepare(broken)
        assert (await rig.ask(GOOD)).version == "1.0.0"

    asyncio.run(story())


def test_drift_is_seen_in_answered_rows_and_forgotten_at_a_swap(tmp_path):
    async def story():
        rig = Rig(drift=DriftConfig(window_rows=500, max_rows_per_second=1e9))
        await rig.service.start("demo", tiny_bundle(tmp_path / "b"))
        watch = asyncio.create_task(rig.service.watch_drift(interval=0.001))
        shifted = np.random.default_rng(3).uniform(2, 4, (500, 4)).astype(np.float32)
        await rig.ask(shifted)
        deadline = time.monotonic() + 30
        while rig.service.statuses()[0].drifting is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        assert rig.service.statuses()[0].drifting
        assert rig.registry.get_sample_value("edge_drift_features", {"model": "demo"}) == 4
        rig.service.swap(await rig.service.prepare(tiny_bundle(tmp_path / "2", version="2.0.0")))
        assert rig.service.statuses()[0].drifting is None
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    asyncio.run(story())


def test_a_swap_while_drift_is_looked_at_disturbs_neither(tmp_path, caplog):
    async def story():
        rig = Rig(drift=DriftConfig(window_rows=100, max_rows_per_second=1e9))
        bundle = tiny_bundle(tmp_path / "b")
        await rig.service.start("demo", bundle)
        watch = asyncio.create_task(rig.service.watch_drift(interval=0))
        rows = np.zeros((1000, 4), np.float32)
        for _ in range(20):
            prepared = await rig.service.prepare(bundle)
            for _ in range(5):
                await rig.ask(rows)
            rig.service.swap(prepared)  # most likely while a thread counts the rows
        assert not watch.done()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    asyncio.run(story())
    assert "drift cannot be judged" not in caplog.text


def test_without_onnxruntime_the_rules_answer(tmp_path):
    tiny_bundle(tmp_path / "b")
    story = (
        "import sys, asyncio, pathlib\n"
        "sys.modules['onnxruntime'] = None  # as if it were not installed: importing it raises ImportError\n"
        "import numpy as np\n"
        "from edge_agent.contract.bundle import open_bundle\n"
        "from tests.serving.test_service import Rig, BAD\n"
        "async def main():\n"
        "    rig = Rig()\n"
        "    await rig.service.start('demo', open_bundle(pathlib.Path(sys.argv[1])))\n"
        "    answer = await rig.ask(BAD)\n"
        "    print(answer.source, answer.reason, list(answer.failed), rig.service.statuses()[0].reason)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", story, str(tmp_path / "b")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("fallback model_error [True] onnxruntime cannot be imported"), done


def test_a_model_that_takes_four_rows_at_a_time_answers_for_each_of_them(tmp_path):
    async def story():
        rig = Rig()
        bundle = tiny_bundle(tmp_path / "b", fixed_batch=4, non_finite_above=100.0)
        await rig.service.start("demo", bundle)
        rows = np.array([[0.5] * 4, [3.0] * 4, [0.1] * 4, [2.5] * 4], np.float32)
        answer = await rig.ask(rows)
        assert (answer.source, answer.failed) == ("model", [False, True, False, True])
        assert rig.service.served("demo").rows == 4
        rows[3] = 30.0  # the last row alone is not finite
        answer = await rig.ask(rows)
        assert (answer.source, answer.reason, len(answer.scores)) == ("fallback", "non_finite", 4)
        with pytest.raises(InvalidInput, match=r"expected shape \[4, 4\], got \[1, 4\]"):
            await rig.ask(GOOD)

    asyncio.run(story())

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.manifest import Decision
from edge_agent.contract.metric_names import MODEL_STATES, REASONS
from edge_agent.serving.decision import confidence, fails, on_the_models_scale
from edge_agent.serving.service import Facts, choose

FINITE = st.floats(-1e6, 1e6)


def test_a_score_fails_strictly_above_the_threshold():
    decision = Decision("score", 2.0, spread=0.5)
    assert [fails(score, decision) for score in (1.0, 2.0, 3.0)] == [False, False, True]
    assert confidence(2.0, decision) == 0.5
    assert confidence(1.0, decision) == confidence(3.0, decision) == pytest.approx(1 / (1 + np.exp(-2)))


@given(st.lists(FINITE, min_size=1, max_size=20), FINITE, st.floats(1e-6, 1e3))
def test_confidence_is_between_a_half_and_one_and_grows_with_the_distance(scores, threshold, spread):
    values = (np.sort(np.abs(np.array(scores) - threshold)) + threshold).tolist()
    grown = [confidence(value, Decision("score", threshold, spread=spread)) for value in values]
    assert all(0.5 <= value <= 1 for value in grown)
    assert grown == sorted(grown)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), FINITE)
def test_the_rules_decide_the_same_on_the_models_scale(scores, threshold):
    own = np.array(scores)
    scaled = on_the_models_scale(own, Decision("score", threshold))
    assert ((scaled > threshold) == (own > 1.0)).all()
    assert (np.diff(scaled[np.argsort(own, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts("ready", killed=False, breaker_open=False, time_left=0.1), "ok"),
        (Facts("ready", killed=True, breaker_open=False, time_left=0.1), "killed"),
        (Facts("unloaded", killed=True, breaker_open=True, time_left=-1), "killed"),
        (Facts("ready", killed=False, breaker_open=True, time_left=0.1), "breaker_open"),
        (Facts("ready", killed=False, breaker_open=False, time_left=0.0), "deadline"),
        (Facts("corrupt", killed=False, breaker_open=False, time_left=0.1), "corrupt_model"),
        (Facts("absent", killed=False, breaker_open=False, time_left=0.1), "no_model"),
    ],
)
def test_each_fact_has_its_reason(facts, reason):
    assert choose(facts) == reason


def test_every_state_of_a_model_has_a_reason_that_the_metrics_know():
    for state in MODEL_STATES:
        assert choose(Facts(state, killed=False, breaker_open=False, time_left=1)) in REASONS

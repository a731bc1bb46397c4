"""Health is judged from facts: live, ready, degraded, and why."""

from __future__ import annotations

import pytest

from edge_agent.contract.metric_names import MODEL_STATES
from edge_agent.telemetry.health import as_dict, judge

NOW = 1_700_000_000.0


def test_all_well_has_no_reasons() -> None:
    health = judge(
        {"pump": "ready"}, now=NOW, metadata_expires=NOW + 1e6, queue_share=0.1, disk_free_bytes=1 << 30
    )
    assert as_dict(health) == {"live": True, "ready": True, "degraded": False, "reasons": []}


@pytest.mark.parametrize("state", MODEL_STATES)
def test_every_model_state_but_loading_is_ready_and_only_ready_is_well(state: str) -> None:
    health = judge({"pump": "ready", "valve": state}, now=NOW)
    assert health.live
    assert health.ready is (state != "loading")
    assert health.degraded is (state != "ready")
    assert all("valve" in reason for reason in health.reasons)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"metadata_expires": NOW - 1}, "has expired"),
        ({"metadata_expires": NOW + 7200}, "expires in 2.0 h"),
        ({"queue_share": 0.95}, "95% full"),
        ({"disk_free_bytes": 1_000_000}, "only 1 MB"),
    ],
)
def test_what_needs_a_look_degrades_but_never_stops_serving(facts: dict[str, float], says: str) -> None:
    health = judge({"pump": "ready"}, now=NOW, **facts)  # type: ignore[arg-type]
    assert (health.live, health.ready, health.degraded) == (True, True, True)
    assert len(health.reasons) == 1
    assert says in health.reasons[0]


def test_without_a_model_it_is_ready_and_says_so() -> None:
    health = judge({}, now=NOW)
    assert (health.ready, health.degraded) == (True, True)
    assert health.reasons == ("no model is installed",)


def test_a_stuck_loop_is_not_live_and_not_ready_and_is_said_first() -> None:
    health = judge({"pump": "corrupt"}, now=NOW, loop_late_seconds=45)
    assert (health.live, health.ready) == (False, False)
    assert health.reasons[0] == "the event loop is 45 s late"

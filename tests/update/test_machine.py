"""The table: every state can be reached and left, and resumes; what is not listed is a bug and says so."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from edge_agent.store.state import Result
from edge_agent.update.machine import BUSY, RESTING, RESUME, TRANSITIONS, Event, State, advance

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
FAILURES = (Event.FAIL, Event.UNHEALTHY)


def reachable(start: State) -> set[State]:
    found, left = {start}, [start]
    while left:
        state = left.pop()
        for (source, _), target in TRANSITIONS.items():
            if source is state and target not in found:
                found.add(target)
                left.append(target)
    return found


def test_every_state_is_reached_from_idle() -> None:
    assert reachable(State.IDLE) == set(State)


def test_idle_is_reached_from_every_state() -> None:
    for state in State:
        assert State.IDLE in reachable(state), state


@pytest.mark.parametrize("state", sorted(set(State) - RESTING, key=lambda state: state.value))
def test_every_state_that_does_work_has_an_exit_for_failure(state: State) -> None:
    exits = [TRANSITIONS[state, event] for event in FAILURES if (state, event) in TRANSITIONS]
    assert exits
    assert all(target in RESTING or target is State.ROLLING_BACK for target in exits)


@pytest.mark.parametrize("state", list(State))
def test_every_state_resumes_where_an_update_can_go_on(state: State) -> None:
    resumed = RESUME[state]
    assert resumed in RESTING or resumed in (State.ACTIVATING, State.PROBATION, State.ROLLING_BACK)
    assert RESUME[resumed] is resumed, "a second power cut during recovery resumes to the same"


@pytest.mark.parametrize("state", sorted(RESTING, key=lambda state: state.value))
def test_a_resting_device_can_poll_install_and_roll_back(state: State) -> None:
    for event in (Event.POLL, Event.INSTALL, Event.ROLL_BACK):
        advance(state, event)


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_only_activating_leads_to_probation_and_only_a_test_leads_there() -> None:
    assert {source for (source, _), target in TRANSITIONS.items() if target is State.PROBATION} == {
        State.ACTIVATING
    }
    assert {source for (source, _), target in TRANSITIONS.items() if target is State.ACTIVATING} == {
        State.TESTING,
        State.SHADOWING,
    }


@pytest.mark.parametrize(
    ("state", "event"), [pair for pair in product(State, Event) if pair not in TRANSITIONS]
)
def test_a_pair_that_is_not_listed_raises(state: State, event: Event) -> None:
    with pytest.raises(RuntimeError, match=f"{event.value} cannot happen in state {state.value}"):
        advance(state, event)


def test_busy_resting_and_probation_are_all_there_is() -> None:
    assert BUSY | RESTING | {State.PROBATION} == set(State)
    assert not BUSY & RESTING


def test_the_runbook_explains_every_state_and_result() -> None:
    explained = set(re.findall(r"^\| `([a-z_]+)` \|", DOCS.read_text(), re.MULTILINE))
    assert {state.value for state in State} <= explained
    assert {result.value for result in Result} <= explained

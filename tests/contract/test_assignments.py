from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract import assignments
from edge_agent.contract.assignments import (
    Assignments,
    Candidate,
    Cohort,
    ModelAssignment,
    Release,
    assigned,
    place,
)
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadAssignments
from edge_agent.contract.version import Version

OLD = Release(Version("1.0.0"), Digest.of_bytes(b"old"))
NEW = Release(Version("2.0.0"), Digest.of_bytes(b"new"))


def document(**changes):
    entry = ModelAssignment(stable=OLD, candidate=Candidate(NEW, Cohort(devices=("d1",)), rollout="r1"))
    return Assignments(serial=7, models={"demo": msgspec.structs.replace(entry, **changes)})


def test_the_cohort_gets_the_candidate_and_everybody_else_the_stable_release():
    assert assigned(document(), "demo", "d1").release == NEW
    assert assigned(document(), "demo", "d2").release == OLD
    assert assigned(document(), "other", "d1") is None


def test_held_and_killed_reach_the_device():
    share = assigned(document(held=("d2",), killed=True), "demo", "d2")
    assert (share.held, share.killed) == (True, True)
    assert not assigned(document(held=("d2",)), "demo", "d1").held


def test_the_document_reads_back_as_it_was_written():
    written = document(minimum_version=Version("0.9.0"))
    assert assignments.parse(assignments.encode(written)) == written


@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.text(min_size=1, max_size=8), max_size=30, unique=True))
def test_a_growing_share_only_ever_adds_devices(a, b, devices):
    small, large = sorted((a, b))
    before = {device for device in devices if device in Cohort(share=small, salt="r1")}
    after = {device for device in devices if device in Cohort(share=large, salt="r1")}
    assert before <= after


def test_places_are_uniform_and_another_roll_out_begins_with_others():
    devices = [f"unit-{number:04}" for number in range(5000)]
    places = sorted(place("r1", device) for device in devices)
    # Kolmogorov-Smirnov distance from uniform: 1.63 / sqrt(n) is the 1 % point.
    distance = max(abs(value - (rank + 0.5) / 5000) for rank, value in enumerate(places))
    assert distance < 1.63 / 5000**0.5
    first = {device for device in devices if place("r1", device) < 0.1}
    second = {device for device in devices if place("r2", device) < 0.1}
    assert len(first & second) < 0.3 * len(first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 9}, "format version 9"),
        ({"models": {"demo": {"stable": {"version": "1.0.0", "digest": "x"}}}}, "digest 'x'"),
        ({"models": {"../x": {}}}, "model name"),
        ({"serial": "one"}, "serial"),
    ],
)
def test_a_wrong_document_is_refused(change, says):
    content = msgspec.json.decode(assignments.encode(document()))
    with pytest.raises(BadAssignments, match=says):
        assignments.parse(msgspec.json.encode(content | change))


def test_nothing_below_the_floor_can_be_assigned():
    with pytest.raises(BadAssignments, match="below minimum_version"):
        assignments.parse(assignments.encode(document(minimum_version=Version("1.5.0"))))


def test_the_killed_switch_survives_encoding():
    assert assignments.parse(assignments.encode(document(killed=True))).models["demo"].killed

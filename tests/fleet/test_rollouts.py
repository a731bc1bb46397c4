"""Whole roll-outs on simulated devices: real updaters, stores, TUF, git and sockets."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.version import Version
from fleet import controller, simulate, status
from fleet.controller import Controller
from fleet.errors import RolloutError
from fleet.folder import Fleet
from fleet.machine import Event, Phase
from fleet.simulate import NAME, Profile, Site, simulated_bundle
from fleet.status import Record
from tests.support.services import eventually

V1, V2, V3, V4 = (Version(f"{number}.0.0") for number in (1, 2, 3, 4))
DEVICES = 6
POLICY = """\
name: test
policy:
  canary: {devices: 2, stratify_by: [line]}
  waves: []
  interval_seconds: 0.2
  max_unreachable: 0.5
  in_progress_timeout_seconds: 60
  progress_deadline_seconds: 100
  analysis: {initial_delay_seconds: 0.2, count: 2}
"""


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[tuple[Fleet, Site]]:
    """Six devices on 1.0.0; 2.0.0 is good, 3.0.0 fails most parts, 4.0.0 raises on most rows."""
    profiles = {V3: Profile(fail=0.6), V4: Profile(fallback=0.8)}
    with simulate.site(tmp_path, DEVICES, profiles, POLICY) as (fleet, site):
        for version in (V1, V2, V3, V4):
            fleet.repository.publish(simulated_bundle(tmp_path / "bundles" / version, version))
        fleet.assign_stable(NAME, V1, Phase.SUCCEEDED, "test")
        _settled(site, V1)
        yield fleet, site


def _versions(site: Site) -> dict[str, str]:
    return {device: str(release.version) if release else "" for device, release in site.running().items()}


def _settled(site: Site, version: Version) -> None:
    eventually(lambda: set(_versions(site).values()) == {version}, f"every device on {version}", 60)


def _run(fleet: Fleet, version: Version) -> Record:
    record = controller.start(fleet, NAME, version)
    for step in Controller(fleet).run(record.id):
        record = step
    return record


def _trailers(fleet: Fleet) -> list[list[str]]:
    log = subprocess.run(
        ["git", "log", "--reverse", "--format=%(trailers:key=Phase,key=Rollout-Id,valueonly,separator=%x20)"],
        cwd=fleet.folder.root,
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split() for line in log.stdout.splitlines()]


def _failed_updates(site: Site) -> float:
    return sum(
        serving.metrics.registry.get_sample_value(
            "edge_update_results_total", {"model": NAME, "result": "failed_unable_to_rollback"}
        )
        or 0.0
        for serving in site.serving.values()
    )


def test_a_good_release_reaches_everybody_and_a_bad_one_is_taken_back(plant: tuple[Fleet, Site]) -> None:
    fleet, site = plant
    good = _run(fleet, V2)
    assert (good.phase, good.settled) == (Phase.SUCCEEDED, True)
    _settled(site, V2)
    assert fleet.repository.assignments().models[NAME].stable == good.candidate
    assert controller.previous_stable(fleet, NAME).version == V1

    bad = _run(fleet, V3)
    assert bad.phase is Phase.ROLLED_BACK
    assert any("fail_ratio" in entry.reason for entry in bad.history)
    assert set(_versions(site).values()) == {V2}
    entry = fleet.repository.assignments().models[NAME]
    assert (entry.stable, entry.candidate) == (good.candidate, None)
    assert _failed_updates(site) == 0

    # Every decision is a commit, in order, and the tree holds nothing that is not committed.
    phases = [trailer for trailer in _trailers(fleet) if bad.id in trailer]
    assert phases == [[bad.id, phase] for phase in ("Pending", "Progressing", "RollingBack", "RolledBack")]
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "repository", "rollouts"],
        cwd=fleet.folder.root, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert changed == ""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=fleet.folder.root, check=True, capture_output=True, text=True
    ).stdout
    assert "keys/" not in tracked
    assert "blobs/" not in tracked

    with pytest.raises(RolloutError, match=r"3\.0\.0 was rolled back by .*; --again tries it again"):
        controller.start(fleet, NAME, V3)


def test_a_device_that_takes_the_candidate_back_itself_ends_the_roll_out(plant: tuple[Fleet, Site]) -> None:
    fleet, site = plant
    record = _run(fleet, V4)
    assert record.phase is Phase.ROLLED_BACK
    reasons = " ".join(entry.reason for entry in record.history)
    assert "failed_rollback_complete" in reasons or "fallback_ratio" in reasons
    _settled(site, V1)
    assert _failed_updates(site) == 0


def test_only_the_canary_runs_a_candidate_that_waits_for_a_person(plant: tuple[Fleet, Site]) -> None:
    fleet, site = plant
    record = controller.start(fleet, NAME, V2)
    steps = Controller(fleet)
    steps.step(record.id)
    record = controller.command(fleet, record.id, Event.PAUSED, "lunch")
    assert record.phase is Phase.PAUSED
    canary = set(record.plan.canary)
    eventually(
        lambda: {d for d, v in _versions(site).items() if v == V2} == canary, "the canary on 2.0.0", 60
    )
    for _ in range(3):
        record = steps.step(record.id)
    assert (record.phase, record.reason) == (Phase.PAUSED, "lunch")
    assert {device for device, version in _versions(site).items() if version == V2} == canary
    with pytest.raises(RolloutError, match="is Paused; finish it"):
        controller.start(fleet, NAME, V3)
    with pytest.raises(RolloutError, match="it cannot be paused now"):
        controller.command(fleet, record.id, Event.PAUSED, "again")

    # Another controller, which has seen nothing, ends what a person stopped.
    controller.command(fleet, record.id, Event.ABORTED, "not today")
    for step in Controller(fleet).run(record.id):
        record = step
    assert record.phase is Phase.ABORTED
    _settled(site, V1)


def test_a_person_can_promote_and_later_go_back_everywhere(plant: tuple[Fleet, Site]) -> None:
    fleet, site = plant
    record = controller.start(fleet, NAME, V2)
    steps = Controller(fleet)
    steps.step(record.id)
    controller.command(fleet, record.id, Event.PROMOTED, "we know it")
    for step in steps.run(record.id):
        record = step
    assert record.phase is Phase.SUCCEEDED
    back = controller.previous_stable(fleet, NAME)
    fleet.assign_stable(NAME, back.version, Phase.ROLLED_BACK, "test")
    _settled(site, V1)


def test_a_device_that_is_cut_off_neither_blocks_nor_fails(plant: tuple[Fleet, Site]) -> None:
    fleet, site = plant
    record = controller.start(fleet, NAME, V2)
    outside = next(device for device in site.serving if device not in record.plan.canary)
    site.cut(outside)
    for step in Controller(fleet).run(record.id):
        record = step
    assert record.phase is Phase.SUCCEEDED
    assert record.failed == {}
    assert _versions(site)[outside] == V1


def test_a_crash_between_record_and_signature_is_repaired_by_the_next_step(
    plant: tuple[Fleet, Site],
) -> None:
    fleet, site = plant
    record = controller.start(fleet, NAME, V2)
    Controller(fleet).step(record.id)
    record = status.load(fleet.folder.rollouts, record.id)
    # The controller died after it wrote the phase and before it signed.
    status.save(
        fleet.folder.rollouts,
        controller.moved(record, Event.FAILED, "power cut", status.Evidence(), record.started + 1),
    )
    assert fleet.repository.assignments().models[NAME].candidate is not None
    for step in Controller(fleet).run(record.id):
        record = step
    assert record.phase is Phase.ROLLED_BACK
    assert fleet.repository.assignments().models[NAME].candidate is None
    _settled(site, V1)

"""The canary is chosen in proportion, by a hash, with its reason, and says what it can show."""

from __future__ import annotations

import pytest

from edge_agent.contract.assignments import place
from fleet.config import CanaryConfig, Policy
from fleet.errors import RolloutError
from fleet.inventory import Device
from fleet.plan import plan, power, rules_out


def _devices(**sites: int) -> list[Device]:
    return [
        Device(id=f"{site}-{number:03}", labels={"site": site})
        for site, count in sites.items()
        for number in range(count)
    ]


def _policy(devices: int, *by: str, waves: tuple[float, ...] = (0.1,)) -> Policy:
    return Policy(canary=CanaryConfig(devices=devices, stratify_by=by), waves=waves)


def test_the_same_roll_out_gives_the_same_plan_whatever_the_order_of_the_inventory() -> None:
    devices = _devices(eu=60, us=40)
    assert plan("r-1", devices, _policy(10, "site")) == plan("r-1", devices[::-1], _policy(10, "site"))


def test_another_roll_out_begins_with_other_devices() -> None:
    devices = _devices(eu=100)
    assert plan("r-1", devices, _policy(10)).canary != plan("r-2", devices, _policy(10)).canary


def test_strata_are_represented_in_proportion_and_each_at_least_once() -> None:
    chosen = plan("r-1", _devices(big=80, mid=18, tiny=2), _policy(10, "site"))
    counts = {
        site: sum(device.startswith(site) for device in chosen.canary) for site in ("big", "mid", "tiny")
    }
    assert counts == {"big": 8, "mid": 1, "tiny": 1} or counts == {"big": 7, "mid": 2, "tiny": 1}
    assert any(
        reason.startswith("site=tiny: 1 of 2, first by hash of r-1: tiny-") for reason in chosen.reasons
    )


def test_inside_a_stratum_the_hash_decides_not_the_name() -> None:
    devices = _devices(eu=50)
    order = sorted((device.id for device in devices), key=lambda device: place("r-9", device))
    assert plan("r-9", devices, _policy(5)).canary == tuple(sorted(order[:5]))


def test_waves_grow_and_end_with_everyone() -> None:
    made = plan("r-1", _devices(eu=200), _policy(10, waves=(0.01, 0.25, 0.5)))
    sizes = [wave.devices for wave in made.waves]
    assert sizes == sorted(set(sizes))
    assert (made.waves[0].name, made.waves[0].devices) == ("canary", 10)
    assert (made.waves[-1].name, made.waves[-1].devices, made.waves[-1].share) == ("everyone", 200, 1.0)
    covered = sum(f"eu-{n:03}" in made.cohort("r-1", 2) for n in range(200))
    assert covered == made.waves[2].devices


def test_a_fleet_smaller_than_the_canary_is_one_wave() -> None:
    made = plan("r-1", _devices(eu=3), _policy(10))
    assert [wave.name for wave in made.waves] == ["everyone"]
    assert len(made.canary) == 3


@pytest.mark.parametrize(("devices", "bound"), [(10, 0.259), (30, 0.095), (60, 0.049), (100, 0.030)])
def test_zero_failures_rule_out_what_the_exact_bound_says(devices: int, bound: float) -> None:
    assert rules_out(devices) == pytest.approx(bound, abs=5e-4)


def test_the_power_statement_says_what_is_missing() -> None:
    assert "10 of 500 devices" in power(10, 500)
    assert "25.9%" in power(10, 500)
    assert "for 5 % it takes 59" in power(10, 500)
    assert "it takes" not in power(60, 500)


def test_impossible_plans_say_why() -> None:
    with pytest.raises(RolloutError, match=r"devices\.yaml is empty"):
        plan("r-1", [], _policy(10))
    with pytest.raises(RolloutError, match="'soc', which no device has; labels: site"):
        plan("r-1", _devices(eu=3), _policy(1, "soc"))

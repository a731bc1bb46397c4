"""fleet.yaml and devices.yaml: what people mistype is named, with what they may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet import config, folder, inventory
from fleet.errors import FleetConfigError


def _config(tmp_path: Path, text: str) -> config.FleetConfig:
    (tmp_path / "fleet.yaml").write_text(text)
    return config.load(tmp_path / "fleet.yaml")


def _devices(tmp_path: Path, text: str) -> tuple[inventory.Device, ...]:
    (tmp_path / "devices.yaml").write_text(text)
    return inventory.load(tmp_path / "devices.yaml")


def test_the_template_says_the_defaults(tmp_path: Path) -> None:
    made = _config(tmp_path, config.TEMPLATE.format(name="plant"))
    assert made == config.FleetConfig(name="plant")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: {}", r"unknown key polcy; did you mean policy\?"),
        (
            "policy: {canary: {device: 3}}",
            r"unknown key policy\.canary\.device; did you mean policy\.canary\.devices",
        ),
        ("policy: {canary: {devices: 0}}", r"`int` >= 1 .*policy\.canary\.devices"),
        (
            "policy: {analysis: {metrics: [{name: fail_ratio, failure_abov: 1}]}}",
            r"did you mean policy\.analysis\.metrics\.failure_above",
        ),
        ("policy: {analysis: {metrics: [{name: fail_ratio}]}}", "fail_ratio has no condition"),
        ("policy: {analysis: {metrics: [{name: mood, failure_above: 1}]}}", "mood"),
        ("policy: {waves: [0.5, 0.1]}", "must grow"),
        ("prometheus: {adress: x}", r"did you mean prometheus\.address"),
        ("a: [", "is not YAML"),
        ("- 1", "Expected `object`, got `array`"),
    ],
)
def test_a_wrong_fleet_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FleetConfigError, match=message) as caught:
        _config(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_devices_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    made = _devices(tmp_path, "devices: [{id: b, address: 'http://h:1'}, {id: a, labels: {site: eu}}]")
    assert [device.id for device in made] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [{id: a}, {id: a}]", "id a is there twice"),
        ("devices: [{id: 'a/b'}]", "id 'a/b': expected"),
        ("devices: [{id: a, adress: x}]", "did you mean devices.address"),
        ("devices: [{id: a, address: 'file:///etc/passwd'}]", "expected a URL"),
        ("devices: [{id: a, labels: {site: 3}}]", "Expected `str`"),
    ],
)
def test_a_wrong_inventory_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FleetConfigError, match=message):
        _devices(tmp_path, text)


def test_a_folder_without_a_fleet_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FleetConfigError, match=r"is no fleet .* -C DIR, or make one: edge-fleet init DIR"):
        folder.find(tmp_path)


def test_a_file_of_brackets_is_one_line_not_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("[" * 100_000)
    with pytest.raises(FleetConfigError, match="nested deeper than 32 levels"):
        config.load(path)

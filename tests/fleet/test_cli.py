"""The command line as an operator uses it: what it prints, what it exits with, what it leaves alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from edge_agent.contract.bundle import pack
from fleet.cli import main
from tests.fleet.releases import bundle


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def plant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(capsys, "init", tmp_path / "plant")[0] == 0
    return tmp_path / "plant"


def test_init_makes_a_fleet_and_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "init", tmp_path / "plant")
    assert code == 0
    assert "move" in out
    assert "offline off this machine" in out
    for name in (
        "fleet.yaml",
        "devices.yaml",
        "repository/metadata/1.root.json",
        ".git",
        "keys/online/rollout.pem",
    ):
        assert (tmp_path / "plant" / name).exists(), name
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=tmp_path / "plant", check=True, capture_output=True, text=True
    ).stdout.split()
    assert not any(name.startswith("keys") for name in tracked)


def test_init_leaves_an_existing_fleet_alone(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in plant.rglob("*") if path.is_file()}
    code, _, err = run(capsys, "init", plant)
    assert (code, err.count("\n")) == (1, 1)
    assert "exists already" in err
    assert before == {path: path.read_bytes() for path in plant.rglob("*") if path.is_file()}


def test_the_first_release_is_assigned_directly_a_folder_or_a_tar(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = bundle(tmp_path / "b1", "1.0.0")
    pack(first, tmp_path / "pump-1.0.0.tar")
    code, out, _ = run(capsys, "-C", plant, "publish", tmp_path / "pump-1.0.0.tar", "--stable", "--json")
    assert code == 0
    assert json.loads(out) == {
        "model": "pump", "version": "1.0.0", "digest": first.digest, "new": True, "files": 2,
        "bytes": first.manifest.size, "stable": True, "pushed_bytes": None,
    }  # fmt: skip
    code, _, err = run(capsys, "-C", plant, "publish", bundle(tmp_path / "b2", "2.0.0").path, "--stable")
    assert code == 1
    assert "--stable is for the first one" in err


def test_a_roll_out_of_the_first_release_needs_no_canary(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b1", "1.0.0").path)
    code, out, _ = run(capsys, "-C", plant, "rollout", "start", "1.0.0")
    assert code == 0
    assert "first release of the model" in out


def test_a_roll_out_is_planned_shown_paused_and_aborted(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plant / "devices.yaml").write_text("devices: [{id: a}, {id: b}, {id: c}]")
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b1", "1.0.0").path, "--stable")
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b2", "2.0.0").path)
    code, out, _ = run(capsys, "-C", plant, "rollout", "start", "2.0.0")
    assert code == 0
    assert "power" in out
    assert "edge-fleet rollout run pump-2.0.0-1" in out
    code, out, _ = run(capsys, "-C", plant, "rollout", "status", "--json")
    assert json.loads(out)["phase"] == "Pending"
    code, _, err = run(capsys, "-C", plant, "rollout", "resume")
    assert (code, "is Pending: it cannot be resumed now" in err) == (1, True)
    code, out, _ = run(capsys, "-C", plant, "rollout", "abort", "--reason", "wrong day")
    assert (code, "Aborted" in out, "wrong day" in out) == (0, True, True)
    assert run(capsys, "-C", plant, "rollout", "run")[0] == 1  # it did not succeed


def test_devices_shows_the_unreachable_apart(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b1", "1.0.0").path, "--stable")
    (plant / "devices.yaml").write_text("devices: [{id: a, labels: {site: eu}}]")
    code, out, _ = run(capsys, "-C", plant, "devices")
    assert code == 0
    assert "a       pump" in out
    assert "unreachable: no address in devices.yaml" in out
    assert "site=eu" in out


def test_refresh_signs_what_is_due_and_says_when_it_expires(
    plant: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "-C", plant, "refresh")
    assert (code, "nothing was due" in out) == (0, True)
    code, out, _ = run(capsys, "-C", plant, "refresh", "--force", "--offline", "--json")
    assert set(json.loads(out)["signed"]) == {"root", "targets", "snapshot", "timestamp", "rollout"}


def test_rollback_goes_where_it_is_told_and_else_asks(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b1", "1.0.0").path)
    run(capsys, "-C", plant, "publish", bundle(tmp_path / "b2", "2.0.0").path, "--stable")
    code, _, err = run(capsys, "-C", plant, "rollback")
    assert (code, "say where to go with --to VERSION" in err) == (1, True)
    code, out, _ = run(capsys, "-C", plant, "rollback", "--to", "1.0.0", "--json")
    assert code == 0
    assert json.loads(out)["from"] == "2.0.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("publish", "nowhere"), "nowhere"),
        (("rollout", "status"), "there was no roll-out yet"),
        (("rollout", "status", "../x"), "is no roll-out id"),
        (("rollout", "start", "1.0"), "expected MAJOR.MINOR.PATCH"),
        (("rollout", "start", "1.0.0"), "run edge-fleet publish first"),
        (("rollback",), "run edge-fleet publish first"),
        (("devices",), "nothing is assigned yet"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    plant: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, "-C", plant, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("edge-fleet: ")
    assert message in err


def test_elsewhere_is_no_fleet_and_wrong_usage_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "-C", tmp_path, "devices")
    assert (code, "is no fleet" in err) == (1, True)
    with pytest.raises(SystemExit, match="2"):
        main(["rollout", "dance"])


def test_no_verb_but_simulate_needs_onnxruntime(plant: Path, tmp_path: Path) -> None:
    bundle(tmp_path / "b1", "1.0.0")
    story = f"""
import sys
sys.modules["onnxruntime"] = None   # as if it were not installed
from fleet.cli import main
assert main(["-C", {str(plant)!r}, "publish", {str(tmp_path / "b1")!r}, "--stable"]) == 0
assert main(["-C", {str(plant)!r}, "devices"]) == 0
assert main(["-C", {str(plant)!r}, "refresh", "--force"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", story], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_serve_prints_its_url_answers_and_ends_on_sigterm(plant: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "fleet.cli", "-C", str(plant), "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert child.stdout is not None
        url = child.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{url}/metadata/timestamp.json", timeout=10) as answer:
            assert answer.read() == (plant / "repository/metadata/timestamp.json").read_bytes()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.communicate()


def test_simulate_carries_out_a_good_and_a_bad_roll_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", "--devices", "5", "--bad-version", "3.0.0")
    assert code == 0
    assert "FAIL" not in out
    assert "simulated-2.0.0-1 ends Succeeded" in out
    assert "simulated-3.0.0-1 ends RolledBack" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--devices", "2"), "give at least 3"), (("--bad-version", "2.0.0"), "must be above 2.0.0")],
)
def test_a_simulation_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, "simulate", *arguments)
    assert (code, message in err) == (1, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing", "nothing cannot be read: No such file or directory; give a bundle folder or .tar"),
        (".", "manifest.json: No such file or directory; give a bundle folder or .tar"),
        ("damaged", "; it is damaged, copy it again"),
    ],
)
def test_what_is_no_bundle_is_not_published_and_said_in_one_line(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    member = sorted(bundle(tmp_path / "damaged", "1.0.0").manifest.members)[0]
    (tmp_path / "damaged" / member).write_bytes(b"1")
    code, _, err = run(capsys, "-C", plant, "publish", tmp_path / given)
    assert (code, err.count("\n")) == (1, 1)
    assert said in err
    assert not list((plant / "repository" / "targets").rglob("releases/*/*"))


def test_a_port_that_is_none_is_a_mistake_of_usage(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["-C", str(plant), "serve", "--port", "99999"])
    assert caught.value.code == 2
    assert "'99999': expected a port, 0 to 65535" in capsys.readouterr().err

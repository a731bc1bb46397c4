"""Two agent processes, one store: the second answers from what the first installs, and goes on without it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.assignments import Assignments, ModelAssignment, Release
from fleet.repository import Keys, Repository
from tests.support.agents import AgentProcess, Stream, run_cli
from tests.support.bundles import tiny_bundle
from tests.support.services import Mosquitto, eventually, require

ROW = [0.1, 0.2, 0.3, 0.4]
DEVICE = "unit-1"


class Site:
    """A repository, and agents that share one store."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        self.repository = Repository.create(folder / "repository", Keys(folder / "keys"))
        (folder / "root.json").write_bytes(self.repository.root())
        self.first, self.second = (self._agent(name, config) for name in ("first", "second"))

    def _agent(self, name: str, config: dict[str, Any]) -> AgentProcess:
        updates = {
            "source": str(self.repository.path),
            "root": str(self.folder / "root.json"),
            "interval_seconds": 0.2,
            "probation": {"seconds": 0.3, "requests": 1, "max_seconds": 1.0},
        }
        shared = {"store": str(self.folder / "store"), "updates": updates}
        return AgentProcess(self.folder / name, DEVICE, **shared, **config)

    def publish(self, version: str) -> Release:
        return self.repository.publish(tiny_bundle(self.folder / version, version=version)).release

    def assign(self, release: Release, *, killed: bool = False) -> None:
        serial = self.repository.assignments().serial + 1
        models = {"demo": ModelAssignment(stable=release, killed=killed)}
        self.repository.assign(Assignments(serial=serial, models=models))

    def both(self) -> None:
        """Two agents, the first with a model."""
        self.assign(self.publish("1.0.0"))
        self.first.start()
        self.first.wait_for(version="1.0.0", source="model")
        self.second.start()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.first.stop()
        site.second.stop()


def test_the_second_answers_and_follows_the_first_from_release_to_release(site: Site) -> None:
    site.both()
    site.second.wait_for(version="1.0.0", source="model")
    assert site.second.get("/v2/health/ready")[0] == 200
    assert (writes(site.first), writes(site.second)) == (1, 0)
    site.assign(site.publish("2.0.0"))
    site.second.wait_for(version="2.0.0", source="model")
    assert event(site.second, "store_read_only")["reason"].startswith(f"store {site.folder / 'store'} is in")


def test_the_second_leaves_the_first_its_commands_and_its_store(site: Site) -> None:
    site.both()
    started = json.loads(status(site.first))["uptime_seconds"]
    assert site.second.stop() == 0
    assert json.loads(status(site.first))["uptime_seconds"] >= started, "the control socket is the first's"
    site.assign(site.publish("2.0.0"))
    site.first.wait_for(version="2.0.0", source="model")


def test_the_kill_switch_holds_for_both(site: Site) -> None:
    site.both()
    release = site.publish("2.0.0")
    site.assign(release)
    site.second.wait_for(version="2.0.0", source="model")
    site.assign(release, killed=True)
    site.second.wait_for(source="fallback", reason="killed")
    site.assign(release)
    site.second.wait_for(source="model")


def test_the_first_is_killed_under_load_and_the_second_loses_nothing_and_goes_on_updating(site: Site) -> None:
    site.both()
    with Stream(site.second, ROW, rate=200.0) as stream:
        site.first.kill()
        eventually(lambda: writes(site.second) == 1, "the second has the store")
        site.assign(site.publish("2.0.0"))
        site.second.wait_for(version="2.0.0", source="model")
        eventually(lambda: state(site.second) == "committed", "the update is committed")
    assert stream.refused == 0
    assert stream.wrong == []
    assert {source for source, _, _ in stream.answers} == {"model"}
    assert event(site.second, "store_taken")
    assert json.loads(status(site.second))["updates"]["models"]["demo"]["last_result"] == "succeeded"


def test_the_first_dies_in_an_update_and_the_second_brings_it_to_its_end(site: Site) -> None:
    site.both()
    site.assign(site.publish("2.0.0"))
    with Stream(site.second, ROW, rate=200.0) as stream:
        eventually(lambda: state(site.first) not in ("committed", "idle"), "the update is under way")
        site.first.kill()
        site.second.wait_for(version="2.0.0", source="model")
        eventually(lambda: state(site.second) == "committed", "the update is committed")
    assert (stream.refused, stream.wrong) == (0, [])
    assert {source for source, _, _ in stream.answers} == {"model"}


def test_roles_change_hands_as_often_as_agents_come_and_go(site: Site) -> None:
    site.both()
    here, there = site.second, site.first
    for number in range(2, 5):
        assert there.stop() == 0
        eventually(lambda here=here: writes(here) == 1, "the other has the store")  # type: ignore[misc]
        there.start()
        assert writes(there) == 0
        site.assign(site.publish(f"{number}.0.0"))
        there.wait_for(version=f"{number}.0.0", source="model")
        here, there = there, here


def test_a_store_that_refuses_is_served_and_taken_when_it_no_longer_does(site: Site) -> None:
    site.assign(site.publish("1.0.0"))
    site.first.start()
    site.first.wait_for(version="1.0.0", source="model")
    site.first.stop()
    lock = site.folder / "store" / "lock"
    lock.unlink()
    lock.mkdir()  # what cannot be opened for writing: the same to an agent as a disk that is read-only
    site.first.start()
    site.first.wait_for(version="1.0.0", source="model")
    assert writes(site.first) == 0
    lock.rmdir()
    eventually(lambda: writes(site.first) == 1, "the store is taken")
    site.assign(site.publish("2.0.0"))
    site.first.wait_for(version="2.0.0", source="model")


def test_nothing_to_serve_in_a_store_in_use_is_an_error_in_one_line(site: Site) -> None:
    site.first.start()
    done = run_cli("edge-agent", "run", "--config", site.second.config)
    assert done.returncode == 1
    assert "is in use by another agent" in json.loads(done.stderr.splitlines()[-1])["message"]


def test_only_the_one_with_the_store_speaks_mqtt(tmp_path: Path, mosquitto: Mosquitto) -> None:
    site = Site(tmp_path, mqtt={"host": mosquitto.host, "port": mosquitto.port})
    try:
        site.both()
        eventually(lambda: asked(mosquitto), "an answer over MQTT")
        # Both under one client id would throw each other out for ever.
        assert [agent.log.read_text().count("mqtt: connected") for agent in (site.first, site.second)] == [
            1,
            0,
        ]
        site.first.kill()
        eventually(lambda: writes(site.second) == 1, "the second has the store")
        eventually(lambda: asked(mosquitto), "the second answers over MQTT")
    finally:
        site.first.stop()
        site.second.stop()


def writes(agent: AgentProcess) -> float:
    """Whether it holds the store, by its own metrics."""
    return sample(agent, "edge_store_writable")


def state(agent: AgentProcess) -> str:
    """The state of its update machine; '' before it has one."""
    text = agent.get("/metrics")[1].decode()
    lines = [line for line in text.splitlines() if line.startswith("edge_update_state{")]
    found = [line.split('state="')[1].split('"')[0] for line in lines if line.endswith(" 1.0")]
    return found[0] if found else ""


def sample(agent: AgentProcess, name: str) -> float:
    text = agent.get("/metrics")[1].decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))


def status(agent: AgentProcess) -> str:
    done = run_cli("edge-agent", "status", "--json", "--config", agent.config)
    assert done.returncode == 0, done.stderr
    return done.stdout


def event(agent: AgentProcess, name: str) -> dict[str, Any]:
    """The last event of this name in its log."""
    lines = [json.loads(line) for line in agent.log.read_text().splitlines() if line.startswith("{")]
    found: dict[str, Any] = [line for line in lines if line.get("event") == name][-1]
    return found


def asked(broker: Mosquitto) -> bool:
    """Whether one request over MQTT is answered by the model."""
    done = subprocess.run(
        [
            require("mosquitto_rr"), "-h", broker.host, "-p", str(broker.port), "-V", "mqttv5", "-q", "1",
            "-t", f"edge/{DEVICE}/predict", "-e", "edge/answers/test", "-W", "2",
            "-m", json.dumps({"features": ROW}),
        ],
        capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0 and json.loads(done.stdout)["source"] == "model"

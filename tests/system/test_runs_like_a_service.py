"""What a service manager sees: ready, alive, reloaded, stopped; exit codes; one JSON line per event."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.agents import AgentProcess, run_cli
from tests.support.bundles import tiny_bundle
from tests.support.services import Mosquitto, eventually, free_port

SECONDS = 30.0
UNIT = Path(__file__).parents[2] / "systemd" / "edge-agent.service"


class Manager:
    """The other end of sd_notify(3)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(SECONDS)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def until(self, field: str, value: str = "1") -> dict[str, str]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            message = self.next()
            if message.get(field) == value:
                return message
        raise AssertionError(f"no {field}={value}")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    yield manager
    manager.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path / "agent")
    yield agent
    agent.stop()


def _rewrite(agent: AgentProcess, **changes: Any) -> None:
    content = yaml.safe_load(agent.config.read_text())
    agent.config.write_text(json.dumps(content | changes))


def _hang_up(agent: AgentProcess) -> None:
    os.kill(agent.pid, signal.SIGHUP)


def _events(agent: AgentProcess, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in agent.log.read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def test_the_service_manager_is_told_when_it_is_ready_alive_and_stopping(
    agent: AgentProcess, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    agent.start()
    ready = manager.until("READY")
    assert f"http://127.0.0.1:{agent.port}" in ready["STATUS"]
    first = manager.until("WATCHDOG")
    begun = time.monotonic()
    manager.until("WATCHDOG")
    assert first == {"WATCHDOG": "1"}
    assert time.monotonic() - begun < 5.0  # every 0.2 s on an idle machine
    assert agent.stop() == 0
    manager.until("STOPPING")


def test_a_watchdog_of_another_process_is_not_fed(
    agent: AgentProcess, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    agent.start()
    manager.until("READY")
    agent.stop()
    assert "STOPPING" in manager.next()


def test_every_line_it_writes_is_one_json_object(agent: AgentProcess, tmp_path: Path) -> None:
    agent.start()
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.wait_for(source="model")
    agent.stop()
    lines = [json.loads(line) for line in agent.log.read_text().splitlines()]
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)
    assert all(("event" in line) or ("message" in line) for line in lines)
    (started,) = _events(agent, "agent_started")
    assert (started["device"], started["url"]) == (agent.device, f"http://127.0.0.1:{agent.port}")
    assert len(_events(agent, "agent_stopping")) == 1


def test_a_wrong_configuration_changes_nothing_and_a_right_one_is_taken_up(
    agent: AgentProcess, manager: Manager
) -> None:
    agent.start()
    manager.until("READY")
    before = agent.config.read_text()

    for wrong in ("htttp: {}", "http: {port: -1}", "]", "http: {host: 0.0.0.0}", "mqtt: {password_file: /x}"):
        agent.config.write_text(wrong)
        _hang_up(agent)
        manager.until("RELOADING")
        manager.until("READY")
        assert agent.get("/v2/health/live")[0] == 200
    refusals = _events(agent, "configuration_refused")
    assert len(refusals) == 5
    assert all(refusal["level"] == "error" for refusal in refusals)
    assert "did you mean http?" in refusals[0]["reason"]
    assert "mqtt.password_file /x" in refusals[4]["reason"]

    agent.config.write_text(before)
    _rewrite(
        agent,
        http={"port": agent.port, "requests_per_second": 0.01, "request_burst": 2},
        log_level="warning",
        drift={"enabled": False},
    )
    _hang_up(agent)
    message = manager.until("RELOADING")
    assert int(message["MONOTONIC_USEC"]) > 0
    manager.until("READY")
    assert [agent.get("/v2")[0] for _ in range(3)] == [200, 200, 429]

    _rewrite(agent, http={"port": agent.port}, log_level="info")
    _hang_up(agent)
    manager.until("READY")
    assert [agent.get("/v2")[0] for _ in range(3)] == [200, 200, 200]
    (last,) = _events(agent, "configuration_reloaded")  # the first came while only warnings were logged
    assert sorted(last["changed"]) == ["drift", "http", "log_level"]
    assert last["at_next_start"] == ["drift"]


def test_the_port_can_be_changed_while_it_runs(agent: AgentProcess, manager: Manager) -> None:
    agent.start()
    manager.until("READY")
    before, agent.port = agent.port, free_port()
    _rewrite(agent, http={"port": agent.port})
    _hang_up(agent)
    manager.until("RELOADING")
    assert str(agent.port) in manager.until("READY")["STATUS"]
    assert agent.get("/v2/health/live")[0] == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", before), timeout=SECONDS)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _rewrite(agent, http={"port": taken.getsockname()[1]})
        _hang_up(agent)
        manager.until("READY")
    (refused,) = _events(agent, "configuration_refused")
    assert "is taken" in refused["reason"]
    assert agent.get("/v2/health/live")[0] == 200


def test_a_broker_can_be_added_and_taken_away_while_it_runs(
    agent: AgentProcess, manager: Manager, mosquitto: Mosquitto
) -> None:
    def status() -> str:
        done = subprocess.run(
            ["mosquitto_sub", "-p", str(mosquitto.port), "-t", "edge/unit-1/status", "-C", "1", "-W", "5"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip()

    agent.start()
    manager.until("READY")
    _rewrite(agent, mqtt={"host": mosquitto.host, "port": mosquitto.port})
    _hang_up(agent)
    eventually(lambda: status() == "online", "online", SECONDS)
    _rewrite(agent, mqtt=None)
    _hang_up(agent)
    eventually(lambda: status() == "offline", "offline", SECONDS)
    assert agent.get("/v2/health/live")[0] == 200


def test_a_password_file_that_cannot_be_read_is_told_at_the_start(
    agent: AgentProcess, tmp_path: Path
) -> None:
    _rewrite(agent, mqtt={"password_file": str(tmp_path / "absent")})
    done = run_cli("edge-agent", "run", "--config", agent.config)
    assert done.returncode == 1
    assert f"mqtt.password_file {tmp_path / 'absent'}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_health_sees_the_disk_and_the_metrics_queue(agent: AgentProcess, tmp_path: Path) -> None:
    # Nobody listens there: every snapshot stays in a queue that is soon full.
    _rewrite(
        agent,
        remote_write={
            "url": f"http://127.0.0.1:{free_port()}/write",
            "interval_seconds": 0.05,
            "max_queue_bytes": 40_000,
        },
    )
    agent.start()

    def reasons() -> list[str]:
        reasons: list[str] = json.loads(agent.get("/status")[1])["health"]["reasons"]
        return reasons

    eventually(lambda: any("metrics queue" in reason for reason in reasons()), "a full queue", SECONDS)


def test_a_fault_of_ours_exits_with_3_and_a_traceback(tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom edge_agent import cli\n"
        "json.dump = None\n"  # the library is broken, not the configuration
        f"sys.exit(cli.main(['status', '--json', '--store', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "TypeError" in done.stderr
    assert "fault of edge-agent" in done.stderr


def test_the_unit_says_what_the_agent_does() -> None:
    unit = UNIT.read_text()
    for line in ("Type=notify", "ExecReload=/bin/kill -HUP $MAINPID", "ORT_DISABLE_TELEMETRY=1"):
        assert line in unit
    assert "WatchdogSec=" in unit
    assert "StateDirectory=edge-agent" in unit


def test_systemd_keeps_its_state_where_the_unit_says(tmp_path: Path) -> None:
    environment = {**os.environ, "STATE_DIRECTORY": str(tmp_path / "state")}
    done = run_cli("edge-agent", "status", "--json", env=environment)
    assert str(tmp_path / "state") in done.stdout + done.stderr


def test_stops_in_good_order_say_nothing_against_a_release_and_kills_do(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "agent", updates={"probation": {"requests": 1000000, "max_restarts": 2}})
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    for _ in range(5):
        agent.start()
        agent.wait_for(source="model")
        assert agent.stop() == 0
    for _ in range(2):
        agent.start()
        agent.wait_for(source="model")
        agent.kill()
    agent.start()
    agent.wait_for(source="model")
    agent.kill()
    agent.start()
    assert agent.wait_for(source="fallback")["reason"] == "rejected"
    assert agent.stop() == 0

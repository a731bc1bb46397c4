"""The desk: compose file, broker, Prometheus and Grafana agree with the agent and with each other."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_agent import config
from tests.deploy.files import DOCKER, ROOT, documents, unknown_in
from tests.support.services import Mosquitto, require

COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/edge-agent.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + [
    note["expr"] for note in DASHBOARD["annotations"]["list"]
]


@pytest.mark.parametrize("path", sorted(DOCKER.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_yaml(path: Path) -> None:
    assert all(documents(path))


def test_the_agents_configuration_is_one() -> None:
    (content,) = documents(DOCKER / "agent.yaml")
    settings = config.from_mapping(content, "docker/agent.yaml")
    assert settings.mqtt is not None
    assert settings.mqtt.host in COMPOSE["services"]
    assert settings.http.port == 8080
    assert settings.device == COMPOSE["services"]["agent"]["hostname"]
    assert f"store:{settings.store}" in COMPOSE["services"]["agent"]["volumes"]


def test_compose_mounts_what_exists() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists() or "BUNDLES" in volume, f"{name}: {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name}: {source}"
    build = COMPOSE["services"]["agent"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()


def test_compose_listens_on_loopback_only_and_pins_its_images() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


def test_the_agents_container_may_do_little() -> None:
    agent = COMPOSE["services"]["agent"]
    assert agent["read_only"] is True
    assert agent["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in agent["security_opt"]
    assert {"mem_limit", "pids_limit"} <= agent.keys()


def test_prometheus_scrapes_the_agent_and_takes_late_samples() -> None:
    (prometheus,) = documents(DOCKER / "prometheus.yml")
    jobs = {job["job_name"]: job["static_configs"] for job in prometheus["scrape_configs"]}
    assert jobs["edge-agent"] == [{"targets": ["agent:8080"], "labels": {"device": "desk-1"}}]
    assert prometheus["storage"]["tsdb"]["out_of_order_time_window"] == "24h"
    assert "--web.enable-remote-write-receiver" in COMPOSE["services"]["prometheus"]["command"]


def test_promtool_accepts_the_configuration_of_prometheus() -> None:
    _promtool("check", "config", str(DOCKER / "prometheus.yml"))


def test_mosquitto_accepts_its_configuration(tmp_path: Path) -> None:
    settings = (DOCKER / "mosquitto.conf").read_text()
    broker = Mosquitto(tmp_path, settings)
    try:
        broker.start()
    finally:
        broker.stop()


def test_grafana_finds_the_data_source_and_the_dashboard() -> None:
    (source,) = documents(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")
    (provider,) = documents(DOCKER / "grafana/provisioning/dashboards/edge.yaml")
    (datasource,) = source["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
    used = set(re.findall(r'"uid": "([^"]+)"', json.dumps(DASHBOARD["panels"])))
    assert used == {datasource["uid"]}
    folder = provider["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in COMPOSE["services"]["grafana"]["volumes"]


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_metrics_that_exist(query: str) -> None:
    assert list(unknown_in(query)) == []


def test_the_dashboards_variables_ask_for_metrics_that_exist() -> None:
    for variable in DASHBOARD["templating"]["list"]:
        selector = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert selector is not None
        assert list(unknown_in(f"sum by ({selector[2]}) ({selector[1]})")) == []


def test_a_query_for_something_unknown_would_be_noticed() -> None:
    assert list(unknown_in('rate(edge_answer_total{source="model"}[5m])')) == ["metric edge_answer_total"]
    assert list(unknown_in("edge_inference_duration_seconds")) == ["metric edge_inference_duration_seconds"]
    assert list(unknown_in('edge_answers_total{cause="ok"}')) == ["label cause of edge_answers_total"]
    assert list(unknown_in("sum by (region) (edge_batch_rows_sum)"))


def test_promtool_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = tmp_path / "queries.yml"
    queries = [query.replace("$__rate_interval", "5m") for query in QUERIES]
    rules.write_text(
        yaml.safe_dump(
            {
                "groups": [
                    {
                        "name": "dashboard",
                        "rules": [
                            {"record": f"q{number}", "expr": query} for number, query in enumerate(queries)
                        ],
                    }
                ]
            }
        )
    )
    _promtool("check", "rules", str(rules))


def _promtool(*arguments: str) -> None:
    program = require("promtool", package="prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

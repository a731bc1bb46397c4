"""The kustomize tree: what it refers to exists, and the agent in the pod can start with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_agent import __version__, app, config
from tests.deploy.files import K3S, ROOT, documents, unknown_in
from tests.support.services import require

RINGS = ("canary", "stable")


def _resources(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization before its transformers."""
    found: list[dict[str, Any]] = []
    (kustomization,) = documents(folder / "kustomization.yaml")
    for name in kustomization["resources"]:
        path = folder / name
        assert path.exists(), f"{path} is named in {folder}/kustomization.yaml"
        found += _resources(path) if path.is_dir() else documents(path)
    return found


def _the(kind: str) -> dict[str, Any]:
    (found,) = [item for item in _resources(K3S / "base") if item["kind"] == kind]
    return found


@pytest.mark.parametrize("path", sorted(K3S.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_yaml(path: Path) -> None:
    assert all(documents(path))


@pytest.mark.parametrize("ring", RINGS)
def test_an_overlay_resolves_to_the_same_objects(ring: str) -> None:
    (kustomization,) = documents(K3S / "overlays" / ring / "kustomization.yaml")
    kinds = [item["kind"] for item in _resources(K3S / "overlays" / ring)]
    assert sorted(kinds) == [
        "Deployment", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "Service", "ServiceAccount",
    ]  # fmt: skip
    (image,) = kustomization["images"]
    assert image["newTag"] == __version__
    (container,) = _the("Deployment")["spec"]["template"]["spec"]["containers"]
    assert image["name"] == container["image"]


@pytest.mark.parametrize("ring", RINGS)
def test_kubectl_builds_the_overlay(ring: str) -> None:
    done = subprocess.run(
        [_kubectl(), "kustomize", str(K3S / "overlays" / ring)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    template = built["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["edge.inference/ring"] == ring
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == built["ConfigMap"]["metadata"]["name"]
    assert (
        volumes["store"]["persistentVolumeClaim"]["claimName"]
        == (built["PersistentVolumeClaim"]["metadata"]["name"])
    )
    labels = template["metadata"]["labels"].items()
    for selector in (
        built["Deployment"]["spec"]["selector"]["matchLabels"],
        built["Service"]["spec"]["selector"],
        built["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    settings = yaml.safe_load(built["ConfigMap"]["data"]["agent.yaml"])
    assert config.from_mapping(settings, ring).store == "/var/lib/edge-agent"


def test_the_config_map_holds_what_the_agent_reads() -> None:
    (kustomization,) = documents(K3S / "base/kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    for name in generator["files"]:
        assert (K3S / "base" / name).is_file()
    (content,) = documents(K3S / "base/agent.yaml")
    settings = config.from_mapping(content, "k3s/base/agent.yaml")
    pod = _the("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    assert container["args"][-1] == f"{mounts['config']}/agent.yaml"
    assert settings.updates.root == f"{mounts['config']}/root.json"
    assert settings.store == mounts["store"]
    assert settings.http.port == container["ports"][0]["containerPort"]
    json.loads((K3S / "base/root.json").read_text())


def test_the_device_is_named_after_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = _the("Deployment")["spec"]["template"]["spec"]["containers"]
    ((name, source),) = [(entry["name"], entry["valueFrom"]) for entry in container["env"]]
    assert source == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    monkeypatch.setenv(name, "line-7-unit-21")
    (content,) = documents(K3S / "base/agent.yaml")
    assert config.from_mapping(content, "agent.yaml").device == "line-7-unit-21"
    assert config.from_mapping({**content, "device": "bench"}, "agent.yaml").device == "bench"


def test_the_pod_meets_the_restricted_standard() -> None:
    pod = _the("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert _the("ServiceAccount")["automountServiceAccountToken"] is False
    assert _the("ServiceAccount")["metadata"]["name"] == pod["serviceAccountName"]


def test_the_probes_ask_what_the_agent_answers() -> None:
    (container,) = _the("Deployment")["spec"]["template"]["spec"]["containers"]
    paths = {
        name: container[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {
        "startupProbe": "/v2/health/live",
        "livenessProbe": "/v2/health/live",
        "readinessProbe": "/v2/health/ready",
    }


def test_a_new_pod_answers_before_the_old_one_ends() -> None:
    """Two agents share the store for that long; what else two pods on one node may not share, they do not."""
    deployment, claim = _the("Deployment")["spec"], _the("PersistentVolumeClaim")["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert claim["accessModes"] == ["ReadWriteOnce"], "not ReadWriteOncePod"
    assert not pod.get("hostNetwork"), "both pods listen on the same port"
    assert not any("hostPort" in port for port in container["ports"])


def test_a_pod_that_ends_has_time_to() -> None:
    pod = _the("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert float(seconds) + app.DRAIN_SECONDS < pod["terminationGracePeriodSeconds"]


def test_the_alerts_ask_for_metrics_that_exist() -> None:
    (rules,) = documents(K3S / "monitoring/alerts.yml")
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert list(unknown_in(rule["expr"])) == [], rule["alert"]


def test_promtool_accepts_the_central_prometheus() -> None:
    program = require("promtool", package="prometheus")
    done = subprocess.run(
        [program, "check", "config", str(K3S / "monitoring/prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _kubectl() -> str:
    # Not in Debian in a version that knows the fields used here: wherever it is absent, CI too, the tests
    # above still resolve every reference.
    path = shutil.which("kubectl")
    if path is None:
        pytest.skip("kubectl is not installed: https://kubernetes.io/docs/tasks/tools/")
    return path

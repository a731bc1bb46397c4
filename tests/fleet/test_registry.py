"""Publishing into an OCI registry: what lies there, what garbage collection leaves, and what is said."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.digest import Digest
from edge_agent.contract.registry import ARTIFACT_TYPE, EMPTY, MANIFEST_TYPE, Layer, artifact, tag
from edge_agent.contract.version import Version
from fleet import folder
from fleet.cli import main
from fleet.errors import FleetConfigError, RegistryError
from fleet.folder import Fleet
from fleet.registry import Registry, RegistryConfig, ReleaseFile
from tests.support.bundles import tiny_bundle
from tests.support.registry import NAME, PASSWORD, USER, OciRegistry, Tokens

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[OciRegistry]:
    with OciRegistry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def fleet(tmp_path: Path, registry: OciRegistry) -> Fleet:
    return fleet_with(tmp_path / "fleet", registry.address)


def fleet_with(path: Path, address: str, **more: str) -> Fleet:
    folder.create(path)
    with (path / "fleet.yaml").open("a") as file:
        file.write(f"registry: {json.dumps({'address': address, **more})}\n")
    return folder.opened(path)


def get(registry: OciRegistry, path: str) -> bytes:
    request = urllib.request.Request(
        f"http://{registry.host}/v2/{NAME}/{path}", headers={"Accept": MANIFEST_TYPE}
    )
    with _OPENER.open(request, timeout=10) as answer:
        data: bytes = answer.read()
    return data


def test_publish_pushes_the_release_and_its_parcels_under_one_artifact(
    tmp_path: Path, registry: OciRegistry, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    for version, features in (("1.0.0", 4), ("1.1.0", 5)):
        bundle = tiny_bundle(tmp_path / version, "demo", version, features=features)
        assert main(["-C", str(fleet.folder.root), "publish", str(bundle.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pushed_bytes"] >= bundle.manifest.size // 2
    document = json.loads(get(registry, "manifests/demo_1.1.0"))
    assert document["artifactType"] == ARTIFACT_TYPE
    named = {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in document["layers"]}
    assert set(named) >= {"manifest.json", *bundle.manifest.members}
    assert named["manifest.json"]["digest"] == bundle.digest
    for layer in document["layers"]:
        assert Digest.of_bytes(get(registry, f"blobs/{layer['digest']}")) == layer["digest"]
    parcels = [layer for layer in document["layers"] if layer["mediaType"].endswith("+zstd")]
    assert parcels
    assert {layer["annotations"].get("io.github.edge-inference.parcel.base") for layer in parcels} - {None}


def test_the_garbage_collection_of_the_registry_keeps_what_an_artifact_names(
    tmp_path: Path, registry: OciRegistry, fleet: Fleet
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", "demo", "1.0.0")
    assert main(["-C", str(fleet.folder.root), "publish", str(bundle.path)]) == 0
    (tmp_path / "stray").write_bytes(b"stray")
    stray = Layer("application/octet-stream", Digest.of_bytes(b"stray"), 5, "stray")
    damaged = Layer("application/octet-stream", Digest.of_bytes(b"right"), 5, "damaged")
    place = Registry(RegistryConfig(address=registry.address))
    files = [ReleaseFile(layer, tmp_path / "stray") for layer in (stray, damaged)]
    with pytest.raises(RegistryError, match="DIGEST_INVALID"):  # so there is a blob, and no artifact of it
        place.push("demo", Version("9.9.9"), files)
    assert registry.blob_file(stray.digest).exists()
    registry.stop()
    registry.collect_garbage()
    assert not registry.blob_file(stray.digest).exists(), "it does collect"
    for member in bundle.manifest.members.values():
        assert Digest.of_file(registry.blob_file(member.digest)) == member.digest


def test_pushing_again_moves_nothing_and_a_new_registry_gets_everything(
    tmp_path: Path, registry: OciRegistry, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(fleet.folder.root)
    for version in ("1.0.0", "1.1.0"):
        bundle = tiny_bundle(tmp_path / version, "demo", version)
        assert main(["-C", root, "publish", str(bundle.path)]) == 0
    capsys.readouterr()
    assert main(["-C", root, "push", "--json"]) == 0
    assert [one["bytes"] for one in json.loads(capsys.readouterr().out)] == [0, 0]
    with OciRegistry(tmp_path / "mirror") as mirror:
        config = fleet.folder.config
        config.write_text(config.read_text().replace(registry.address, mirror.address))
        assert main(["-C", root, "push", "1.0.0"]) == 0
        assert "pushed to" in capsys.readouterr().out
        assert json.loads(get(mirror, "manifests/demo_1.0.0"))["layers"]


def test_a_release_that_cannot_be_pushed_is_not_signed(
    tmp_path: Path, registry: OciRegistry, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.stop()
    bundle = tiny_bundle(tmp_path / "bundle", "demo", "1.0.0")
    assert main(["-C", str(fleet.folder.root), "publish", str(bundle.path)]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert not fleet.repository.releases()
    registry.start()
    assert main(["-C", str(fleet.folder.root), "publish", str(bundle.path)]) == 0
    assert fleet.repository.releases()


@pytest.mark.parametrize("kind", ["token", "password"])
def test_whoever_may_not_push_is_told_so(tmp_path: Path, kind: str) -> None:
    (tmp_path / "password").write_text(f"{USER}:{PASSWORD}")
    bundle = tiny_bundle(tmp_path / "bundle", "demo", "1.0.0")
    with (
        Tokens(tmp_path / "tokens") as tokens,
        OciRegistry(
            tmp_path / "registry", tokens=tokens if kind == "token" else None, password=kind == "password"
        ) as registry,
    ):
        fleet = fleet_with(tmp_path / "fleet", registry.address)
        with pytest.raises(RegistryError, match="401" if kind == "token" else "wants a password"):
            push(fleet, bundle.path)
        right = fleet_with(tmp_path / "right", registry.address, credentials_file=str(tmp_path / "password"))
        push(right, bundle.path)


def push(fleet: Fleet, path: Path) -> None:
    place = fleet.registry()
    assert place is not None
    file = path / "manifest.json"
    layer = Layer("application/json", Digest.of_file(file), file.stat().st_size, "manifest.json")
    place.push("demo", Version("1.0.0"), [ReleaseFile(layer, file)])


@pytest.mark.parametrize(
    "config",
    [
        RegistryConfig(address="https://host/x"),
        RegistryConfig(address="oci://host/x", ca_file="/nowhere.pem"),
        RegistryConfig(address="oci://host/x", credentials_file="/nowhere"),
    ],
)
def test_what_fleet_yaml_says_wrong_is_named(config: RegistryConfig) -> None:
    with pytest.raises(FleetConfigError, match="registry\\."):
        Registry(config)


def test_two_releases_never_share_a_tag() -> None:
    assert tag("a", Version("1.0.0-2.0.0")) != tag("a-1.0.0", Version("2.0.0"))
    long = "a" * 64
    versions = [Version("1.0.0-" + "b" * 57 + end) for end in ("c", "d")]
    tags = {tag(long, version) for version in versions}
    assert len(tags) == 2
    assert all(len(one) <= 128 for one in tags)


def test_the_same_release_is_the_same_artifact() -> None:
    layer = Layer("x/y", Digest.of_bytes(EMPTY), 2, "file")
    assert artifact("demo", Version("1.0.0"), [layer]) == artifact("demo", Version("1.0.0"), [layer])

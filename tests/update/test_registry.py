"""Members from an OCI registry: a real one, with passwords, tokens and TLS; and what may go wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import from_mapping
from edge_agent.contract.bundle import MODEL
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Manifest, parse
from edge_agent.contract.registry import Layer
from edge_agent.contract.repository import blob_path
from edge_agent.errors import ConfigError
from edge_agent.store.state import State
from edge_agent.update.fetch import fetch_members
from edge_agent.update.oci import RegistryBlobs
from edge_agent.update.source import Access, SourceFailed, open_source
from fleet.registry import Registry, RegistryConfig, ReleaseFile
from tests.support.bundles import tiny_bundle
from tests.support.certificates import Authority
from tests.support.registry import PASSWORD, USER, Door, OciRegistry, Tokens
from tests.update.devices import Device, Publisher

TIMEOUT = 20.0


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[OciRegistry]:
    with OciRegistry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def door(registry: OciRegistry) -> Iterator[Door]:
    with Door(registry) as door:
        yield door


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return tiny_bundle(tmp_path / "bundle", "demo", "1.0.0").manifest


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(f"{USER}:{PASSWORD}\n")
    return file


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    with Tokens(tmp_path / "tokens") as tokens:
        yield tokens


@pytest.fixture
def guarded(tmp_path: Path, tokens: Tokens, manifest: Manifest, password: Path) -> Iterator[OciRegistry]:
    """A registry that wants a token, with the bundle's members in it."""
    with OciRegistry(tmp_path / "guarded", tokens=tokens) as registry:
        push(tmp_path / "bundle", registry, credentials_file=str(password))
        yield registry


def push(folder: Path, registry: OciRegistry, **access: str) -> None:
    """Put a bundle's members where devices look for them."""
    manifest = parse((folder / "manifest.json").read_bytes())
    files = [
        ReleaseFile(Layer("application/octet-stream", one.digest, one.size, name), folder / name)
        for name, one in manifest.members.items()
    ]
    Registry(RegistryConfig(address=registry.address, **access)).push(  # type: ignore[arg-type]
        manifest.name, manifest.version, files
    )


def read(address: str, digest: Digest, offset: int = 0, **access: str) -> bytes:
    with RegistryBlobs(address, TIMEOUT, Access(**access)).stream(blob_path(digest), offset) as stream:
        assert stream.offset == offset
        return b"".join(stream.chunks)


def reason(address: str, digest: Digest, **access: str) -> str:
    with pytest.raises(SourceFailed) as caught:
        read(address, digest, **access)
    return caught.value.reason


@pytest.mark.parametrize("in_process", [True, False])
def test_a_device_takes_members_from_a_registry(
    tmp_path: Path, registry: OciRegistry, in_process: bool
) -> None:
    publisher = Publisher(tmp_path / "fleet")
    place = Registry(RegistryConfig(address=registry.address))

    def publish(number: int, version: str) -> None:
        bundle = tiny_bundle(tmp_path / f"b{number}", "demo", version, features=4 + number)
        release = publisher.repository.publish(
            bundle, lambda files: place.push(bundle.name, bundle.manifest.version, files)
        )
        publisher.assign(release.release)
        shutil.rmtree(publisher.path / "blobs")  # nobody has them but the registry
        (publisher.path / "blobs").mkdir()

    device = Device(tmp_path / "store", publisher, blobs=registry.address, in_process=in_process)

    async def scenario() -> None:
        for number, version in enumerate(("1.0.0", "2.0.0")):
            publish(number, version)
            await device.follow()
            assert (device.version(), device.state()) == (version, State.COMMITTED)

    asyncio.run(scenario())
    device.store.close()


def test_a_half_download_is_resumed_by_range(
    tmp_path: Path, registry: OciRegistry, door: Door, manifest: Manifest
) -> None:
    push(tmp_path / "bundle", registry)
    data = (tmp_path / "bundle" / MODEL).read_bytes()
    for folder in ("staged", "partial"):
        (tmp_path / folder).mkdir()
    (tmp_path / "partial" / manifest.members[MODEL].digest.hex).write_bytes(data[:100])
    blobs = RegistryBlobs(door.address, TIMEOUT, Access())
    moved = fetch_members(blobs, manifest, [MODEL], tmp_path / "staged", tmp_path / "partial", lambda _: None)
    assert moved == len(data) - 100
    assert (tmp_path / "staged" / MODEL).read_bytes() == data
    assert [wanted for _, wanted, _ in door.asked] == ["bytes=100-"]


def test_whatever_is_wrong_with_a_registry_has_a_name_and_leaves_what_runs_alone(
    tmp_path: Path, registry: OciRegistry, door: Door
) -> None:
    publisher = Publisher(tmp_path / "fleet")
    publisher.assign(publisher.publish("1.0.0"))
    push(publisher.folder / "bundle-1", registry)
    device = Device(tmp_path / "store", publisher, blobs=door.address)

    async def says() -> str:
        device.clock.sleep(2000)
        outcome = await device.updater.run_once()
        assert device.version() == "1.0.0"
        assert device.serving.swaps == ["1.0.0"]
        return outcome.reason

    async def scenario() -> None:
        await device.follow()
        publisher.assign(publisher.publish("2.0.0", features=5))
        assert await says() == "not_found", "it was never pushed"
        push(publisher.folder / "bundle-2", registry)
        for status, reason in (
            (401, "unauthorized"),
            (403, "denied"),
            (429, "throttled"),
            (500, "unreachable"),
        ):
            door.status = status
            assert await says() == reason
        door.status = None
        door.cut_after = 10
        assert await says() == "truncated"
        door.cut_after = None
        blob = registry.blob_file(
            parse((publisher.folder / "bundle-2/manifest.json").read_bytes()).members[MODEL].digest
        )
        right = blob.read_bytes()
        blob.write_bytes(bytes(len(right)))
        assert await says() == "blob_mismatch"
        registry.stop()
        door.status = 502
        assert await says() == "unreachable"
        door.status = None
        blob.write_bytes(right)
        registry.start()
        device.clock.sleep(2000)
        await device.follow()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())
    device.store.close()


def test_a_registry_that_is_not_there_is_unreachable(tmp_path: Path, manifest: Manifest) -> None:
    assert reason("oci+http://127.0.0.1:1/plant", manifest.members[MODEL].digest) == "unreachable"


@pytest.mark.parametrize("form", ["line", "docker"])
def test_a_token_is_asked_for_where_the_registry_wants_one(
    guarded: OciRegistry, tokens: Tokens, manifest: Manifest, password: Path, form: str
) -> None:
    if form == "docker":
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        password.write_text(json.dumps({"auths": {f"https://{guarded.host}": {"auth": pair}}}))
    digest = manifest.members[MODEL].digest
    tokens.scopes.clear()
    data = read(guarded.address, digest, credentials=str(password))
    assert Digest.of_bytes(data) == digest
    assert tokens.scopes == ["repository:plant/models:pull"], "and no more than that"


def test_without_the_right_password_a_token_opens_nothing(
    guarded: OciRegistry, tokens: Tokens, manifest: Manifest, password: Path
) -> None:
    digest = manifest.members[MODEL].digest
    assert reason(guarded.address, digest) == "unauthorized", "an anonymous token"
    password.write_text(f"{USER}:wrong")
    tokens.refuses = True
    assert reason(guarded.address, digest, credentials=str(password)) == "unauthorized"


def test_a_token_that_is_too_old_is_asked_for_anew(
    guarded: OciRegistry, tokens: Tokens, manifest: Manifest, password: Path
) -> None:
    path = blob_path(manifest.members[MODEL].digest)
    blobs = RegistryBlobs(guarded.address, TIMEOUT, Access(credentials=str(password)))
    tokens.lifetime = -3600
    with pytest.raises(SourceFailed), blobs.stream(path, 0):
        pass
    tokens.lifetime = 300
    with blobs.stream(path, 0) as stream:
        assert b"".join(stream.chunks)


def test_a_password_is_enough_where_the_registry_asks_for_one(
    tmp_path: Path, manifest: Manifest, password: Path
) -> None:
    with OciRegistry(tmp_path / "registry", password=True) as registry:
        push(tmp_path / "bundle", registry, credentials_file=str(password))
        digest = manifest.members[MODEL].digest
        assert read(registry.address, digest, credentials=str(password))
        assert reason(registry.address, digest) == "unauthorized"


def test_a_registry_with_a_private_authority(tmp_path: Path, manifest: Manifest) -> None:
    authority = Authority(tmp_path / "ca")
    with OciRegistry(tmp_path / "registry", tls=authority) as registry:
        push(tmp_path / "bundle", registry, ca_file=str(authority.certificate))
        digest = manifest.members[MODEL].digest
        assert read(registry.address, digest, 10, ca_file=str(authority.certificate))
        assert reason(registry.address, digest) == "unreachable", "a certificate nobody knows"


def test_blobs_may_lie_elsewhere_and_no_password_goes_there(
    tmp_path: Path, manifest: Manifest, password: Path
) -> None:
    with (
        OciRegistry(tmp_path / "registry", password=True) as registry,
        OciRegistry(tmp_path / "storage") as plain,
        Door(registry) as door,
        Door(plain) as storage,
    ):
        push(tmp_path / "bundle", registry, credentials_file=str(password))
        push(tmp_path / "bundle", plain)
        digest = manifest.members[MODEL].digest
        blobs = RegistryBlobs(door.address, TIMEOUT, Access(credentials=str(password)))
        with blobs.stream(blob_path(digest), 0) as stream:
            whole = b"".join(stream.chunks)
        door.elsewhere = f"http://{storage.host}"
        with blobs.stream(blob_path(digest), 7) as stream:
            assert b"".join(stream.chunks) == whole[7:]
        assert door.asked[-1][2] is not None, "the registry was told who asks"
        path, wanted, authorization = storage.asked[-1]
        assert (path.endswith("?signature=abc"), wanted, authorization) == (True, "bytes=7-", None)


def test_nothing_leads_from_tls_to_plain_http(tmp_path: Path, manifest: Manifest) -> None:
    authority = Authority(tmp_path / "ca")
    with OciRegistry(tmp_path / "registry") as plain, Door(plain) as door:
        door.elsewhere = f"http://{plain.host}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("door"))
        door.secure(context)
        address = door.address.replace("oci+http", "oci")
        with pytest.raises(SourceFailed, match="without TLS"):
            read(address, manifest.members[MODEL].digest, ca_file=str(authority.certificate))


def test_a_registry_holds_no_signed_metadata() -> None:
    with pytest.raises(ConfigError, match=r"updates\.blobs"):
        open_source("oci://registry.example/plant", TIMEOUT)


@pytest.mark.parametrize(
    "address",
    ["oci://", "oci://host", "oci://host/", "oci://host/UPPER", "oci://u:p@host/x", "oci://host/a?b"],
)
def test_an_address_that_makes_no_sense_is_refused_at_the_start(address: str) -> None:
    with pytest.raises(ConfigError, match=r"updates\.blobs"):
        from_mapping({"updates": {"blobs": address}}, "agent.yaml")


@pytest.mark.parametrize(
    "content",
    ["", "a\nb:c", "{", '{"auths": []}', '{"credsStore": "desktop"}', '{"auths": {"h": {"auth": "?"}}}'],
)
def test_credentials_that_cannot_be_used_are_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "credentials"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"updates\.credentials_file"):
        RegistryBlobs("oci://h/x", TIMEOUT, Access(credentials=str(file)))

"""Metadata is believed only where the signatures say so; whatever is refused, serving goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Targets

from edge_agent.config import EngineConfig
from edge_agent.contract.assignments import Assignments, ModelAssignment, Release, encode
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import FILE_NAME
from edge_agent.contract.repository import ASSIGNMENTS_TARGET, manifest_target
from edge_agent.contract.version import Version
from edge_agent.store.state import Result
from edge_agent.update.messages import Check, Failed, ReadManifest, Setup
from edge_agent.update.worker import Worker
from fleet.repository import Repository
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Iterator[Device]:
    device = Device(tmp_path / "store", publisher)
    yield device
    device.store.close()


async def settled(device: Device, publisher: Publisher) -> None:
    publisher.assign(publisher.publish("1.0.0"))
    await device.follow()


async def assert_refused(device: Device, reason: str) -> None:
    """The next check is refused for ``reason``; what was installed serves on."""
    outcome = await device.updater.run_once()
    assert (outcome.result, outcome.reason) == (Result.REJECTED, reason), outcome.message
    assert device.version() == "1.0.0"
    assert device.serving.swaps == ["1.0.0"]
    assert device.result_count("rejected") == 1
    trouble = device.updater.status()["trouble"]
    assert trouble["reason"] == reason
    device.clock.sleep(3600)
    await device.updater.run_once()
    assert device.result_count("rejected") == 1, "counted once, not at every look"


def test_metadata_signed_by_another_key_is_refused(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        path = publisher.path / "metadata" / "timestamp.json"
        forged = Metadata.from_bytes(path.read_bytes())
        forged.signed.version += 1
        forged.signatures.clear()
        forged.sign(CryptoSigner.generate_ed25519())
        forged.to_file(str(path))
        await assert_refused(device, "signature")

        publisher.repository.refresh(force=True)  # signs over the forgery with the right key
        publisher.assign(publisher.publish("2.0.0"))
        await device.updater.run_once()
        assert device.version() == "2.0.0"
        assert device.updater.status()["trouble"] is None

    asyncio.run(scenario())


def test_a_tampered_metadata_file_is_refused(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        publisher.assign(publisher.publish("2.0.0"))
        newest = max(
            (publisher.path / "metadata").glob("*.rollout.json"), key=lambda p: int(p.name.split(".")[0])
        )
        content = json.loads(newest.read_bytes())
        content["signed"]["targets"][ASSIGNMENTS_TARGET]["length"] += 1
        newest.write_text(json.dumps(content))
        await assert_refused(device, "signature")

    asyncio.run(scenario())


def test_older_metadata_than_seen_is_refused(device: Device, publisher: Publisher, tmp_path: Path) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        shutil.copytree(publisher.path, tmp_path / "old")
        publisher.repository.refresh(force=True)
        await device.updater.run_once()
        shutil.rmtree(publisher.path)
        (tmp_path / "old").rename(publisher.path)
        await assert_refused(device, "rolled_back_metadata")

    asyncio.run(scenario())


def test_older_metadata_is_refused_after_a_restart_too(
    device: Device, publisher: Publisher, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        shutil.copytree(publisher.path, tmp_path / "old")
        publisher.repository.refresh(force=True)
        await device.updater.run_once()
        await device.restart()
        shutil.rmtree(publisher.path)
        (tmp_path / "old").rename(publisher.path)
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "rolled_back_metadata")

    asyncio.run(scenario())


def test_expired_metadata_is_refused_and_serving_goes_on(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        past = Repository(
            publisher.path, publisher.repository.keys, clock=lambda: datetime.now(UTC) - timedelta(days=30)
        )
        past.refresh(force=True)
        await assert_refused(device, "expired")

    asyncio.run(scenario())


def test_metadata_that_expires_while_nothing_changes_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        publisher = Publisher(tmp_path / "fleet", timestamp_days=1)
        device = Device(tmp_path / "store", publisher)
        await settled(device, publisher)
        device.clock.sleep(2 * 86400)
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "expired")
        assert device.version() == "1.0.0"
        assert device.updater.status()["metadata_expires"] < device.clock.now()
        expiry = device.metrics.registry.get_sample_value("edge_update_metadata_expiry_timestamp_seconds")
        assert expiry == device.updater.status()["metadata_expires"]
        device.store.close()

    asyncio.run(scenario())


def test_another_fleets_repository_is_refused(device: Device, publisher: Publisher, tmp_path: Path) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        other = Publisher(tmp_path / "other-fleet")
        other.assign(other.publish("6.6.6"))
        other.sign()
        shutil.rmtree(publisher.path)
        shutil.copytree(other.path, publisher.path)
        await assert_refused(device, "signature")

    asyncio.run(scenario())


def test_the_cache_is_believed_only_through_the_configured_root(
    device: Device, publisher: Publisher, tmp_path: Path
) -> None:
    """A root that somebody put into the store is not what trust starts from."""

    async def scenario() -> None:
        await settled(device, publisher)
        evil = Publisher(tmp_path / "evil")
        evil.assign(evil.publish("6.6.6"))
        history = device.store.layout.tuf / "root_history"
        (history / "1.root.json").write_bytes(evil.root.read_bytes())
        (history / "2.root.json").write_bytes(evil.root.read_bytes())
        publisher.assign(publisher.publish("2.0.0"))
        await device.updater.run_once()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


def test_damaged_trusted_metadata_is_fetched_again(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        for path in device.store.layout.tuf.rglob("*.json"):
            path.write_bytes(b"\0" * 10)
        publisher.assign(publisher.publish("2.0.0"))
        await device.updater.run_once()
        assert device.version() == "2.0.0"

    asyncio.run(scenario())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json"])
def test_a_missing_or_broken_root_says_what_to_do(
    tmp_path: Path, publisher: Publisher, content: bytes | None
) -> None:
    root = tmp_path / "root.json"
    if content is not None:
        root.write_bytes(content)
    device = Device(tmp_path / "store", publisher, root=str(root))
    outcome = asyncio.run(device.updater.run_once())
    assert (outcome.result, outcome.reason) == (Result.REJECTED, "bad_root")
    assert "updates.root" in outcome.message
    device.store.close()


def test_keys_are_rotated_without_touching_the_device(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        publisher.repository.refresh_offline()
        publisher.assign(publisher.publish("2.0.0"))
        await device.updater.run_once()
        assert device.version() == "2.0.0"
        assert (device.store.layout.tuf / "root_history" / "2.root.json").exists()

    asyncio.run(scenario())


# Two powers: the roll-out key alone introduces nothing


def sign_as_rollout(publisher: Publisher, targets: dict[str, bytes], assignments: Assignments) -> None:
    """What somebody who stole the online keys can do: sign whatever they like in the rollout role."""
    repository = publisher.repository
    rollout: Targets = repository._rollout()
    for path, data in {**targets, ASSIGNMENTS_TARGET: encode(assignments)}.items():
        rollout.targets[path] = repository._write_target(path, data)
    rollout.version += 1
    repository._sign("rollout", rollout)
    repository._sign_snapshot(repository._snapshot(), rollout=rollout.version)


def test_the_rollout_key_cannot_introduce_a_release(
    device: Device, publisher: Publisher, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        evil = tiny_bundle(tmp_path / "evil", version="6.6.6")
        for member, entry in evil.manifest.members.items():
            shutil.copy(evil.path / member, publisher.path / "blobs" / "sha256" / entry.digest.hex)
        release = Release(Version("6.6.6"), evil.digest)
        sign_as_rollout(
            publisher,
            {manifest_target("demo", release.version): (evil.path / FILE_NAME).read_bytes()},
            Assignments(serial=99, models={"demo": ModelAssignment(stable=release)}),
        )
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "unknown_release")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_the_rollout_key_cannot_change_a_release(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        publisher.publish("2.0.0")
        other = Release(Version("2.0.0"), Digest.of_bytes(b"another"))
        sign_as_rollout(publisher, {}, Assignments(serial=99, models={"demo": ModelAssignment(stable=other)}))
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "digest_mismatch")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_assignments_that_cannot_be_read_are_refused(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        sign_as_rollout(publisher, {}, Assignments(serial=99, format=7))
        await assert_refused(device, "bad_assignments")

    asyncio.run(scenario())


def test_a_target_that_is_not_what_was_signed_is_refused(device: Device, publisher: Publisher) -> None:
    async def scenario() -> None:
        await settled(device, publisher)
        publisher.assign(publisher.publish("2.0.0"))
        for path in (publisher.path / "targets" / "releases" / "demo").glob("*.2.0.0.json"):
            path.write_bytes(path.read_bytes()[:-1] + b" ")
        outcome = await device.updater.run_once()
        assert (outcome.result, outcome.reason) == (Result.REJECTED, "mismatch")
        assert device.version() == "1.0.0"

    asyncio.run(scenario())


def test_trusted_metadata_is_kept_byte_for_byte(tmp_path: Path, publisher: Publisher) -> None:
    """What the worker verified is in the store before it answers, and nothing half-written is left."""
    publisher.assign(publisher.publish("1.0.0"))
    tuf, scratch = tmp_path / "tuf", tmp_path / "scratch"
    tuf.mkdir()
    scratch.mkdir()
    setup = Setup(
        device="unit-1", source=str(publisher.path), root=str(publisher.root), models=(), tuf=str(tuf),
        partial="", scratch=str(scratch), timeout=5.0, engine=EngineConfig(),
    )  # fmt: skip
    worker = Worker(setup)
    reply = worker.handle(Check(), lambda _: None)
    assert not isinstance(reply, Failed)
    metadata = publisher.path / "metadata"
    assert (tuf / "timestamp.json").read_bytes() == (metadata / "timestamp.json").read_bytes()
    assert (tuf / "root_history" / "1.root.json").read_bytes() == (metadata / "1.root.json").read_bytes()
    assert (tuf / "rollout.json").exists()
    assert not [path for path in tuf.rglob("*") if path.name.startswith(".")]
    missing = worker.handle(
        ReadManifest("demo", Release(Version("9.9.9"), Digest.of_bytes(b"")), str(scratch)), lambda _: None
    )
    assert isinstance(missing, Failed)
    assert (missing.kind, missing.reason) == ("rejected", "unknown_release")

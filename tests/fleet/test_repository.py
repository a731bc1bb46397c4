"""What a stock TUF client sees of a release repository, and what nobody can do with only the online keys."""

from __future__ import annotations

import datetime
import functools
import shutil
import stat
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tuf.api.exceptions import ExpiredMetadataError
from tuf.ngclient import Updater

from edge_agent.contract import assignments as documents
from edge_agent.contract import manifest as manifests
from edge_agent.contract.assignments import Assignments, Candidate, Cohort, ModelAssignment, Release
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadAssignments, BadBundle
from edge_agent.contract.repository import (
    ASSIGNMENTS_TARGET,
    METADATA,
    ROLLOUT_ROLE,
    TARGETS,
    blob_path,
    manifest_target,
)
from edge_agent.contract.version import Version
from fleet.errors import KeyMissing, RepositoryError
from fleet.repository import OFFLINE, ExpiryConfig, Keys, Repository
from tests.fleet.releases import bundle


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository", Keys(tmp_path / "keys"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(repository: Repository) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(repository.path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _client(tmp_path: Path, url: str, root: bytes, name: str = "client") -> Updater:
    for folder in ("metadata", "targets"):
        (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
    return Updater(
        str(tmp_path / name / "metadata"),
        f"{url}/{METADATA}/",
        str(tmp_path / name / "targets"),
        f"{url}/{TARGETS}/",
        bootstrap=root,
    )


def _fetch(client: Updater, target: str) -> bytes:
    info = client.get_targetinfo(target)
    assert info is not None, target
    return Path(client.download_target(info)).read_bytes()


def _stable(repository: Repository, release: Release, serial: int) -> Assignments:
    return Assignments(serial, {"pump": ModelAssignment(release)})


def test_a_stock_client_reads_manifest_and_assignments(
    repository: Repository, url: str, tmp_path: Path
) -> None:
    published = repository.publish(bundle(tmp_path / "b1", "1.0.0"))
    repository.assign(_stable(repository, published.release, 2))
    client = _client(tmp_path, url, repository.root())
    manifest = manifests.parse(_fetch(client, manifest_target("pump", Version("1.0.0"))))
    document = documents.parse(_fetch(client, ASSIGNMENTS_TARGET))
    assert document.models["pump"].stable == published.release
    for member in manifest.members.values():
        assert Digest.of_file(repository.path / blob_path(member.digest)) == member.digest


def test_the_manifest_target_s_hash_is_the_bundle_s_digest(repository: Repository, tmp_path: Path) -> None:
    first = bundle(tmp_path / "b1", "1.0.0")
    repository.publish(first)
    assert repository.releases() == {"pump": (Release(Version("1.0.0"), first.digest),)}


def test_a_client_follows_many_changes_with_its_old_state(
    repository: Repository, url: str, tmp_path: Path
) -> None:
    for number in range(1, 4):
        release = repository.publish(bundle(tmp_path / f"b{number}", f"{number}.0.0")).release
        repository.assign(_stable(repository, release, number + 1))
        repository.refresh(force=True)
        client = _client(tmp_path, url, repository.root())
        document = documents.parse(_fetch(client, ASSIGNMENTS_TARGET))
        assert document == repository.assignments()
        assert document.models["pump"].stable == release
    repository.refresh_offline()
    client = _client(tmp_path, url, repository.root())
    assert documents.parse(_fetch(client, ASSIGNMENTS_TARGET)).serial == 4


def test_the_rollout_key_cannot_introduce_a_release(repository: Repository, url: str, tmp_path: Path) -> None:
    path = manifest_target("pump", Version("6.6.6"))
    rollout = repository._rollout()
    rollout.targets[path] = repository._write_target(path, b"{}")
    rollout.version += 1
    repository._sign(ROLLOUT_ROLE, rollout)
    repository._sign_snapshot(repository._snapshot(), rollout=rollout.version)
    client = _client(tmp_path, url, repository.root())
    assert client.get_targetinfo(ASSIGNMENTS_TARGET) is not None
    assert client.get_targetinfo(path) is None


def test_assigning_needs_no_offline_key_and_publishing_does(repository: Repository, tmp_path: Path) -> None:
    published = repository.publish(bundle(tmp_path / "b1", "1.0.0"))
    shutil.move(tmp_path / "keys" / "offline", tmp_path / "safe")
    repository.assign(_stable(repository, published.release, 2))
    before = sorted(repository.path.rglob("*"))
    with pytest.raises(KeyMissing, match=r"targets key .*targets\.pem.* bring it"):
        repository.publish(bundle(tmp_path / "b2", "2.0.0"))
    assert sorted(repository.path.rglob("*")) == before


def test_publishing_twice_changes_nothing(repository: Repository, tmp_path: Path) -> None:
    first = bundle(tmp_path / "b1", "1.0.0")
    assert repository.publish(first).new
    before = {path: path.stat().st_mtime_ns for path in repository.path.rglob("*") if path.is_file()}
    again = repository.publish(first)
    assert (again.new, again.blobs) == (False, 0)
    assert before == {path: path.stat().st_mtime_ns for path in repository.path.rglob("*") if path.is_file()}


def test_only_changed_members_are_written(repository: Repository, tmp_path: Path) -> None:
    assert repository.publish(bundle(tmp_path / "b1", "1.0.0")).blobs == 2
    assert repository.publish(bundle(tmp_path / "b2", "2.0.0")).blobs == 1


def test_a_release_is_never_changed(repository: Repository, tmp_path: Path) -> None:
    first = repository.publish(bundle(tmp_path / "b1", "1.0.0"))
    with pytest.raises(RepositoryError, match=r"pump 1\.0\.0 is published with digest .* use a new version"):
        repository.publish(bundle(tmp_path / "b2", "1.0.0", model=b"other"))
    assert repository.releases() == {"pump": (first.release,)}


def test_a_tampered_bundle_is_not_published(repository: Repository, tmp_path: Path) -> None:
    first = bundle(tmp_path / "b1", "1.0.0")
    first.member("rules.yaml").write_bytes(b"default: pass\n")
    with pytest.raises(BadBundle, match=r"rules\.yaml"):
        repository.publish(first)
    assert repository.releases() == {}
    assert not list((repository.path / "blobs/sha256").iterdir())


def test_assignments_name_published_releases_and_grow(repository: Repository, tmp_path: Path) -> None:
    release = repository.publish(bundle(tmp_path / "b1", "1.0.0")).release
    stranger = Release(Version("9.0.0"), Digest.of_bytes(b"x"))
    with pytest.raises(RepositoryError, match=r"pump 9\.0\.0 .* is not a published release"):
        repository.assign(_stable(repository, stranger, 2))
    with pytest.raises(RepositoryError, match="serial 1 is not above 1"):
        repository.assign(_stable(repository, release, 1))
    entry = ModelAssignment(release, Candidate(release, Cohort(("d1",))), minimum_version=Version("1.0.1"))
    with pytest.raises(BadAssignments, match="minimum_version"):
        repository.assign(Assignments(2, {"pump": entry}))
    assert repository.assignments().serial == 1


def test_online_metadata_is_signed_again_before_it_expires(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    clock = [now]
    expiry = ExpiryConfig(timestamp_days=1, snapshot_days=4, rollout_days=40)
    repository = Repository.create(
        tmp_path / "repository", Keys(tmp_path / "keys"), expiry, clock=lambda: clock[0]
    )
    assert repository.refresh() == ()
    clock[0] = now + datetime.timedelta(hours=13)
    assert repository.refresh() == ("timestamp",)
    clock[0] = now + datetime.timedelta(days=3)
    assert repository.refresh() == ("snapshot", "timestamp")
    clock[0] = now + datetime.timedelta(days=21)
    assert repository.refresh() == ("snapshot", "timestamp", "rollout")
    assert repository.expires()["timestamp"] > clock[0]


def test_a_client_refuses_expired_metadata(tmp_path: Path) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=8)  # the timestamp lives seven
    repository = Repository.create(tmp_path / "repository", Keys(tmp_path / "keys"), clock=lambda: past)
    handler = functools.partial(_Quiet, directory=str(repository.path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        client = _client(tmp_path, f"http://127.0.0.1:{server.server_address[1]}", repository.root())
        with pytest.raises(ExpiredMetadataError):
            client.refresh()
        server.shutdown()
        thread.join()


def test_keys_are_private_and_never_overwritten(repository: Repository, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for path in (keys, *keys.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        if path.name != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
    before = {role: Keys(keys).file(role).read_bytes() for role in OFFLINE}
    with pytest.raises(RepositoryError, match="already"):
        Repository.create(repository.path, Keys(keys))
    with pytest.raises(RepositoryError, match="never overwritten"):
        Repository.create(tmp_path / "second", Keys(keys))
    assert before == {role: Keys(keys).file(role).read_bytes() for role in OFFLINE}

"""A branch of a git repository as a source: the git program, real repositories, real updates."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent.errors import ConfigError
from edge_agent.update.git import GitSource
from edge_agent.update.source import Access, SourceFailed, WithBlobs, open_source
from tests.support.git_server import GitServer
from tests.update.devices import Device, Publisher, StaticServer

TIMEOUT = 20.0


def git(folder: Path, *arguments: str) -> str:
    identity = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, env={**os.environ, **identity}, check=True, capture_output=True
    )
    return done.stdout.decode().strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "Change")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A GitOps repository with one commit."""
    folder = tmp_path / "origin"
    (folder / "repository" / "metadata").mkdir(parents=True)
    (folder / "repository" / "metadata" / "timestamp.json").write_bytes(b"one")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path, origin: Path) -> GitSource:
    return opened(tmp_path, f"git+file://{origin}")


def opened(tmp_path: Path, url: str, **access: int) -> GitSource:
    source = open_source(url, TIMEOUT, Access(cache=str(tmp_path / "copy"), **access))  # type: ignore[arg-type]
    assert isinstance(source, GitSource)
    return source


def test_a_look_sees_a_commit_that_changes_something_and_only_that(origin: Path, source: GitSource) -> None:
    first = source.look(None)
    assert source.look(first) == first
    (origin / "README").write_text("elsewhere\n")
    commit(origin)
    second = source.look(first)
    assert (second.digest, second.etag != first.etag) == (first.digest, True)
    (origin / "repository" / "metadata" / "timestamp.json").write_bytes(b"two")
    commit(origin)
    assert source.look(second).digest != first.digest


def test_the_copy_holds_one_commit_and_no_working_tree(
    tmp_path: Path, origin: Path, source: GitSource
) -> None:
    for content in (b"two", b"three"):
        (origin / "repository" / "metadata" / "timestamp.json").write_bytes(content)
        commit(origin)
    source.look(None)
    assert git(tmp_path / "copy", "rev-list", "--count", "refs/edge/current") == "1"
    assert not list(tmp_path.glob("copy/**/timestamp.json"))


def test_branch_and_folder_are_in_the_url(tmp_path: Path, origin: Path) -> None:
    git(origin, "checkout", "--quiet", "-b", "plant/eu")
    (origin / "releases").mkdir()
    (origin / "releases" / "file").write_bytes(b"here")
    commit(origin)
    source = opened(tmp_path, f"git+file://{origin}#plant/eu:releases")
    assert source.read("file", 100) == b"here"


def test_files_are_read_in_parts_and_within_limits(origin: Path, source: GitSource) -> None:
    data = bytes(range(256)) * 4096
    (origin / "repository" / "large").write_bytes(data)
    commit(origin)
    with source.stream("large", 300_000) as stream:
        assert stream.offset == 300_000
        assert b"".join(stream.chunks) == data[300_000:]
    with source.stream("large", 0) as stream:
        next(stream.chunks)  # and no more: whoever reads may stop
    with pytest.raises(SourceFailed) as caught:
        source.read("large", 1000)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "path", ["absent", "../repository/metadata/timestamp.json", "/etc/passwd", "metadata"]
)
def test_what_is_not_a_file_of_the_branch_is_not_found(source: GitSource, path: str) -> None:
    with pytest.raises(SourceFailed) as caught:
        source.read(path, 100)
    assert caught.value.reason in ("not_found", "unreachable")


def test_a_link_in_the_repository_leads_nowhere(tmp_path: Path, origin: Path, source: GitSource) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (origin / "repository" / "link").symlink_to(secret)
    commit(origin)
    assert source.read("link", 1000) == str(secret).encode()  # git's blob of a link is its text


@pytest.mark.parametrize("what", ["repository", "branch"])
def test_what_cannot_be_fetched_is_a_source_that_failed(tmp_path: Path, origin: Path, what: str) -> None:
    url = f"git+file://{tmp_path}/nowhere" if what == "repository" else f"git+file://{origin}#nowhere"
    with pytest.raises(SourceFailed):
        opened(tmp_path, url).look(None)


def test_a_broken_copy_is_fetched_again(tmp_path: Path, origin: Path, source: GitSource) -> None:
    source.look(None)
    shutil.rmtree(tmp_path / "copy" / "objects")
    (tmp_path / "copy" / "refs" / "edge" / "current").unlink(missing_ok=True)
    with pytest.raises(SourceFailed):
        source.look(None)
    assert source.look(None).etag == git(origin, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "url", ["git+ssh://host/x.git", "git+https://", "git+ext::sh -c true", "git+file://"]
)
def test_other_git_urls_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"updates\.source"):
        opened(tmp_path, url)


@pytest.mark.parametrize("in_process", [True, False])
def test_a_device_follows_a_branch_and_takes_members_from_elsewhere(tmp_path: Path, in_process: bool) -> None:
    publisher = Publisher(tmp_path / "fleet")
    publisher.assign(publisher.publish("1.0.0"))
    (tmp_path / "fleet" / ".gitignore").write_text("/keys/\n/repository/blobs/\n/bundle-*/\n")
    git(tmp_path / "fleet", "init", "--quiet")
    commit(tmp_path / "fleet")
    server = StaticServer(publisher.path)
    device = Device(
        tmp_path / "store", publisher, source=f"git+file://{tmp_path}/fleet#main", blobs=server.url,
        in_process=in_process,
    )  # fmt: skip

    async def scenario() -> None:
        await device.follow()
        assert device.version() == "1.0.0"
        publisher.assign(publisher.publish("2.0.0"))
        await device.updater.run_once()
        assert device.version() == "1.0.0", "2.0.0 is not committed yet"
        commit(tmp_path / "fleet")
        await device.follow()
        assert device.version() == "2.0.0"

    try:
        asyncio.run(scenario())
    finally:
        server.stop()
    assert server.requests
    assert all(path.startswith("/blobs/") for _, path, _ in server.requests)


def test_members_may_come_from_a_second_source(tmp_path: Path) -> None:
    for name in ("signed", "blobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    source = open_source(str(tmp_path / "signed"), TIMEOUT, Access(blobs=str(tmp_path / "blobs")))
    assert isinstance(source, WithBlobs)
    assert source.read("file", 10) == b"signed"
    with source.stream("file", 0) as stream:
        assert b"".join(stream.chunks) == b"blobs"


@pytest.mark.parametrize("files", [1, 50])
def test_a_server_that_sends_too_much_fills_no_disk(tmp_path: Path, origin: Path, files: int) -> None:
    """Whether as one file or as many: the pack is what is limited. It is asked for once."""
    for number in range(files):
        (origin / "repository" / f"noise-{number}").write_bytes(os.urandom((3 << 20) // files))
    commit(origin)
    with GitServer(origin) as server:
        source = opened(tmp_path, f"git+{server.url}", cache_bytes=1 << 20)
        for _ in range(3):
            with pytest.raises(SourceFailed) as caught:
                source.look(None)
            assert caught.value.reason == "too_large"
            assert not (tmp_path / "copy").exists()
        assert server.fetches == 1
        for noise in (origin / "repository").glob("noise-*"):
            noise.unlink()
        commit(origin)
        assert source.look(None).etag == git(origin, "rev-parse", "HEAD"), "a better commit is followed"


def test_what_was_fetched_before_counts(tmp_path: Path, origin: Path) -> None:
    source = opened(tmp_path, f"git+file://{origin}", cache_bytes=1 << 20)
    for _ in range(5):
        (origin / "repository" / "noise").write_bytes(os.urandom(600 << 10))
        commit(origin)
        source.look(None)
        assert sum(file.stat().st_size for file in (tmp_path / "copy").rglob("*") if file.is_file()) < 2 << 20


def test_a_file_that_is_tiny_on_the_wire_and_huge_when_unpacked_is_refused_by_its_size(
    tmp_path: Path, origin: Path
) -> None:
    with (origin / "repository" / "zeros").open("wb") as file:
        file.truncate(300 << 20)  # more than a git process may hold in memory
    commit(origin)
    with GitServer(origin) as server:
        source = opened(tmp_path, f"git+{server.url}", cache_bytes=4 << 20)
        assert source.read("metadata/timestamp.json", 10) == b"one"
        with pytest.raises(SourceFailed) as caught:
            source.read("zeros", 1 << 20)
        assert caught.value.reason == "too_large"
        with source.stream("zeros", 0) as stream:
            assert next(stream.chunks)[:1] == b"\0"


def test_thousands_of_branches_are_not_read_into_memory(tmp_path: Path, origin: Path) -> None:
    head = git(origin, "rev-parse", "HEAD")
    names = sorted(f"refs/heads/{number}/refs/heads/main" for number in range(40_000))
    (origin / ".git" / "packed-refs").write_text("".join(f"{head} {name}\n" for name in names))
    with pytest.raises(SourceFailed) as caught:
        opened(tmp_path, f"git+file://{origin}").look(None)
    assert caught.value.reason == "too_large"

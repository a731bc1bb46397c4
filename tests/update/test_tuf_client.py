"""The entry point of the public TUF conformance suite does what the suite will ask of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.update.devices import Publisher, StaticServer

CLIENT = Path(__file__).parents[1] / "support" / "tuf_client.py"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StaticServer]:
    publisher = Publisher(tmp_path / "fleet")
    publisher.assign(publisher.publish("1.0.0"))
    server = StaticServer(publisher.path)
    yield server
    server.stop()


def run(*arguments: object) -> int:
    command = [sys.executable, str(CLIENT), *map(str, arguments)]
    return subprocess.run(command, check=False, timeout=60, capture_output=True).returncode


def test_init_refresh_and_download(tmp_path: Path, server: StaticServer) -> None:
    trusted, targets = tmp_path / "trusted", tmp_path / "targets"
    trusted.mkdir()
    targets.mkdir()
    root = tmp_path / "fleet" / "root.json"
    assert run("--metadata-dir", trusted, "init", root) == 0
    assert (trusted / "root.json").read_bytes() == root.read_bytes()
    assert not server.requests, "no network yet"

    there = ("--metadata-dir", trusted, "--metadata-url", f"{server.url}/metadata")
    assert run(*there, "refresh") == 0
    names = {path.name for path in trusted.glob("*.json")}
    assert names == {"root.json", "timestamp.json", "snapshot.json", "targets.json"}

    download = (*there, "--target-base-url", f"{server.url}/targets", "--target-dir", targets)
    assert run(*download, "--target-name", "releases/demo/1.0.0.json", "download") == 0
    assert len(list(targets.iterdir())) == 1
    asked = len([path for _, path, _ in server.requests if "/targets/" in path])
    assert run(*download, "--target-name", "releases/demo/1.0.0.json", "download") == 0
    assert len([path for _, path, _ in server.requests if "/targets/" in path]) == asked, "it has it already"
    assert run(*download, "--target-name", "releases/demo/9.9.9.json", "download") == 1


def test_a_repository_that_is_gone_is_exit_code_1(tmp_path: Path, server: StaticServer) -> None:
    (tmp_path / "trusted").mkdir()
    assert run("--metadata-dir", tmp_path / "trusted", "init", tmp_path / "fleet" / "root.json") == 0
    nowhere = f"{server.url}/nowhere"
    assert run("--metadata-dir", tmp_path / "trusted", "--metadata-url", nowhere, "refresh") == 1

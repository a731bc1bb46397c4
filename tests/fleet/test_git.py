"""Commits of exactly what was decided, whatever the environment and a person's staging area hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fleet.errors import GitError
from fleet.git import Git


@pytest.fixture
def git(tmp_path: Path) -> Git:
    (tmp_path / "fleet").mkdir()
    return Git.init(tmp_path / "fleet")


def _raw(git: Git, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=git.root, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_commit_has_subject_body_and_trailers_that_git_reads(git: Git) -> None:
    (git.root / "a").write_text("1")
    commit = git.commit(
        [git.root / "a"], "pump 2.0.0: RollingBack", "why", {"Rollout-Id": "r-1", "Reason": "two\nlines"}
    )
    assert commit == _raw(git, "rev-parse", "HEAD")
    trailers = _raw(git, "log", "-1", "--format=%(trailers)").splitlines()
    assert trailers == ["Rollout-Id: r-1", "Reason: two lines"]
    assert git.log()[0].startswith("pump 2.0.0: RollingBack\n\nwhy\n")


def test_nothing_changed_is_no_commit(git: Git) -> None:
    (git.root / "a").write_text("1")
    assert git.commit([git.root / "a"], "first")
    assert git.commit([git.root / "a"], "again") is None
    assert len(git.log()) == 1


def test_what_a_person_has_staged_stays_staged(git: Git) -> None:
    (git.root / "a").write_text("1")
    (git.root / "devices.yaml").write_text("devices: []")
    _raw(git, "add", "devices.yaml")
    git.commit([git.root / "a"], "a decision")
    assert _raw(git, "show", "--name-only", "--format=") == "a"
    assert _raw(git, "status", "--porcelain") == "A  devices.yaml"


def test_a_hook_s_environment_does_not_lead_elsewhere(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = Git.init(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.root / "index"))
    (git.root / "a").write_text("1")
    assert git.commit([git.root / "a"], "here")
    assert not (other.root / "index").exists()
    assert not any((other.root / ".git/refs/heads").iterdir())


def test_a_machine_without_identity_commits_as_edge_fleet(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (git.root / "a").write_text("1")
    git.commit([git.root / "a"], "x")
    assert _raw(git, "log", "-1", "--format=%an <%ae>") == "edge-fleet <edge-fleet@localhost>"


def test_an_identity_in_the_environment_is_used(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "ada@plant")
    (git.root / "a").write_text("1")
    git.commit([git.root / "a"], "x")
    assert _raw(git, "log", "-1", "--format=%an %ce") == "Ada ada@plant"


def test_a_failure_shows_the_command_and_what_git_said(tmp_path: Path) -> None:
    git = Git(tmp_path)
    (tmp_path / "a").write_text("1")
    with pytest.raises(
        GitError, match=r"`git add -- a` ended with 128: fatal: not a git repository"
    ) as caught:
        git.commit([tmp_path / "a"], "x")
    assert caught.value.returncode == 128

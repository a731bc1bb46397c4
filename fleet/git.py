"""git, by its command line: every decision of the fleet is a commit.

Invariants: commands are argument lists, never a shell line; variables that would point git at another
repository (set by hooks and by some IDEs) are removed; a commit holds exactly the paths it was asked to hold,
and what a person has staged besides stays staged.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fleet.errors import GitError

# What a hook or another tool may leave in the environment and must not reach us (pre-commit's no_git_env).
_KEEP: Final = ("GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG_", "GIT_SSH", "GIT_SSL_", "GIT_EXEC_PATH")
_TIMEOUT: Final = 120.0  # seconds; a commit takes milliseconds, a hook of the operator's may take longer


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(_KEEP)}
    return {**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}


class Git:
    """The git repository whose top folder is ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def init(cls, root: Path) -> Git:
        """Make ``root`` a repository with the branch ``main``; an existing one is left as it is.

        Raises:
            GitError: git is missing or refused.
        """
        self = cls(root)
        if not (root / ".git").exists():
            self._run("init", "--quiet", "--initial-branch=main")
        return self

    def commit(
        self,
        paths: Sequence[Path],
        subject: str,
        body: str = "",
        trailers: Mapping[str, str] | None = None,
    ) -> str | None:
        """Commit exactly ``paths`` (files or folders); None if nothing in them changed, else the commit's id.

        Raises:
            GitError: git is missing or refused.
        """
        names = [str(path.relative_to(self.root)) for path in paths if path.exists()]
        self._run("add", "--", *names)
        # The changed files by name: an empty folder among the paths would be an error to commit.
        changed = self._run("diff", "--cached", "--name-only", "--no-renames", "-z", "--", *names).split(
            "\0"
        )[:-1]
        if not changed:
            return None
        lines = [subject, ""]
        if body:
            lines += [body, ""]
        # A trailer is one line, whatever its value was.
        lines += [f"{key}: {' '.join(value.split())}" for key, value in (trailers or {}).items()]
        self._run(*self._identity(), "commit", "--quiet", "--file=-", "--", *changed, text="\n".join(lines))
        return self._run("rev-parse", "HEAD").strip()

    def log(self, count: int = 20) -> list[str]:
        """The latest commit messages, newest first.

        Raises:
            GitError: git is missing or refused.
        """
        return [
            entry.strip("\n") for entry in self._run("log", f"-{count}", "--format=%B%x00").split("\0")[:-1]
        ]

    def _identity(self) -> list[str]:
        """A machine without a git identity commits as edge-fleet instead of failing."""
        if all(name in os.environ for name in ("GIT_COMMITTER_EMAIL", "GIT_AUTHOR_EMAIL")):
            return []
        if self._run("config", "--default=", "user.email").strip():
            return []
        return ["-c", "user.name=edge-fleet", "-c", "user.email=edge-fleet@localhost"]

    def _run(self, *arguments: str, text: str | None = None) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=_environment(),
                input=text if text is not None else "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
            )
        except FileNotFoundError as error:
            raise GitError(command, 127, "git is not installed, or the folder is gone") from error
        except subprocess.TimeoutExpired as error:
            raise GitError(command, 124, f"no end after {_TIMEOUT:.0f} s") from error
        if done.returncode:
            raise GitError(command, done.returncode, done.stderr or done.stdout)
        return done.stdout

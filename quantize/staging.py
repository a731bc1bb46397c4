"""Where a bundle grows before it gets its name.

Invariants: the folder is on the file system of the output folder, so that a rename is all that publishing
takes; it is gone at the end, whatever happened, and so are output folders that were made for nothing. What a
killed process left behind (``kill -9``, power) is removed by the next run in the same output folder: a folder
whose lock nobody holds has no owner.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from edge_agent.contract.manifest import FILE_NAME as MANIFEST
from quantize.errors import OutputError

SUFFIX: Final = ".staging"
_LOCK: Final = "lock"
_YOUNG: Final = 60.0  # seconds: locking follows making at once


@contextmanager
def staging(out: Path, label: str) -> Iterator[Path]:
    """A folder on the file system of ``out``, removed at the end, whatever happens.

    Raises:
        OutputError: ``out`` cannot be made or written, the disk is full.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    # The name is known before the folder exists: an interrupt at any moment finds what to remove.
    stage = out / f".{label}.{secrets.token_hex(8)}{SUFFIX}"
    lock = None
    try:
        if (out / MANIFEST).exists():
            raise OutputError(f"output folder {out} is a bundle: choose the folder that it is in with --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            sweep(out)
            stage.mkdir(mode=0o700)
            lock = os.open(stage / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"output folder {out}: {_why(error)}: choose another with --out") from error
        try:
            yield stage
        except OSError as error:
            raise OutputError(f"output folder {out}: {_why(error)}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        _remove_empty(made)


def sweep(out: Path) -> int:
    """Remove the staging folders in ``out`` that no living process holds; returns how many."""
    swept = 0
    for stage in out.glob(f".*{SUFFIX}"):
        if not stage.is_dir() or stage.is_symlink():
            continue
        with suppress(OSError):  # somebody else's, or swept by somebody else just now
            try:
                lock = os.open(stage / _LOCK, os.O_RDWR)
            except FileNotFoundError:
                # Made a moment ago by a process that is about to lock it, or killed before it could.
                if time.time() - stage.stat().st_mtime > _YOUNG:
                    shutil.rmtree(stage)
                    swept += 1
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage)
                swept += 1
            finally:
                os.close(lock)
    return swept


def _why(error: OSError) -> str:
    return str(error.strerror or error)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty: the bundle is in it
            folder.rmdir()

"""Durable changes to files: each call has happened wholly and survives a power cut, or has not happened.

Invariants, for every method of ``Disk``:

- a reader never sees half of a file, a link or a folder: everything is made under a unique temporary name
  and renamed into place;
- when the call has returned, the change is on the medium: file contents are fsynced before the rename, the
  folder after it;
- a failed fsync is a failed call. For a file it is never retried: after an error the kernel may have dropped
  the pages and a second fsync would lie (https://www.usenix.org/conference/atc20/presentation/rebello), so
  the file goes. A folder's entries are the file system's journal, which stops rather than lies: ``settle``
  asks again before anybody relies on them;
- every ``OSError`` becomes a ``StoreError`` that says what, which path and what to do, and the temporary
  file is gone again.

The order is the one RAUC installs artifacts in: content, fsync, rename, fsync of the folder, and only
then the pointer. Temporary names are unique, so a leftover of a crash never blocks the next attempt;
``sweep`` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from edge_agent.errors import StoreError

TEMPORARY: Final = ".tmp-"  # prefix of names that a crash may leave behind

# errno -> (one word for metrics, what to do)
_ADVICE: Final = {
    errno.ENOSPC: ("disk_full", "free some space"),
    errno.EDQUOT: ("disk_full", "free some space or raise the quota"),
    errno.EROFS: ("read_only", "mount the file system read-write or choose another store"),
    errno.EACCES: ("permission", "let the agent's user read and write there or choose another store"),
    errno.EPERM: ("permission", "let the agent's user write there, on a file system with hard links"),
    errno.EIO: ("io", "the medium is failing: check it and the kernel log"),
}


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` inside into a ``StoreError`` with a reason and advice."""
    try:
        yield
    except OSError as error:
        reason, advice = _ADVICE.get(error.errno or 0, ("store", "check the store's file system"))
        raise StoreError(
            f"cannot {action} {path}: {error.strerror or error}; {advice}", reason=reason
        ) from error


class Disk:
    """The one place where the store changes the disk."""

    def before(self, call: str, path: Path) -> None:
        """Called before every system call that changes something. A test counts, fails or dies here."""

    def write_durable(self, path: Path, data: bytes) -> None:
        """Create or replace a file.

        Raises:
            StoreError: the file is as it was, unless only the folder's fsync failed.
        """

        def fill(temporary: Path) -> None:
            self.before("open", temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                rest = memoryview(data)
                while rest:
                    self.before("write", temporary)
                    rest = rest[os.write(descriptor, rest) :]
                self.before("fsync", temporary)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        with explained("write", path):
            self._replace(path, fill)

    def replace_symlink(self, link: Path, target: Path) -> None:
        """Point ``link`` at ``target`` (stored as given, relative to the link's folder).

        Raises:
            StoreError: the link is as it was, unless only the folder's fsync failed.
        """

        def point(temporary: Path) -> None:
            self.before("symlink", temporary)
            temporary.symlink_to(target)

        with explained("switch", link):
            self._replace(link, point)

    def replace_link(self, path: Path, source: Path) -> None:
        """Make ``path`` a hard link to ``source``, whatever was there before.

        Raises:
            StoreError: what was there is as it was, unless only the folder's fsync failed.
        """

        def link(temporary: Path) -> None:
            self.before("link", temporary)
            temporary.hardlink_to(source)

        with explained("link", path):
            # rename(2) between two links of one file does nothing and leaves both: ask first.
            if not (path.exists() and path.samefile(source)):
                self._replace(path, link)

    def adopt(self, source: Path, path: Path) -> None:
        """Move a file into place, its content on the medium first. It becomes read-only.

        Raises:
            StoreError: nothing moved, unless only the folder's fsync failed.
        """
        with explained("store", path):
            self.before("chmod", source)
            source.chmod(0o444)
            self._sync(source)
            self.before("rename", path)
            source.replace(path)
            self._sync(path.parent)

    def publish_dir(self, source: Path, path: Path) -> None:
        """Move a finished folder into place; its files are durable already, ``path`` does not exist.

        Raises:
            StoreError: nothing moved, unless only the folder's fsync failed.
        """
        with explained("store", path):
            self._sync(source)
            self.before("rename", path)
            source.rename(path)
            self._sync(path.parent)

    def make_durable_dir(self, path: Path) -> None:
        """Create a folder and its parents; nothing happens if it exists.

        Raises:
            StoreError: it cannot be made.
        """
        with explained("create", path):
            if path.is_dir():
                return
        if path.parent != path:
            self.make_durable_dir(path.parent)
        with explained("create", path):
            self.before("mkdir", path)
            path.mkdir(exist_ok=True)
            self._sync(path.parent)

    def settle(self, folder: Path) -> None:
        """Make the entries of a folder durable: what somebody else renamed into it may be visible only.

        Raises:
            StoreError: nobody knows what of it survives a power cut.
        """
        with explained("make durable", folder):
            self._sync(folder)

    def remove(self, path: Path) -> None:
        """Remove a file or a link, durably; nothing happens if it is not there.

        Raises:
            StoreError: it is still there.
        """
        with explained("remove", path):
            self.before("unlink", path)
            path.unlink(missing_ok=True)
            self._sync(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it. Not durable: a removal that comes back is only garbage again.

        Raises:
            StoreError: something of it is still there.
        """
        with explained("remove", path):
            self.before("rmtree", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self, folder: Path) -> None:
        """Remove the temporary entries that a crash left in ``folder``.

        Raises:
            StoreError: one of them cannot be removed.
        """
        with explained("read", folder):
            left = [path for path in folder.iterdir() if path.name.startswith(TEMPORARY)]
        for path in left:
            self.remove_tree(path)

    def _replace(self, path: Path, make: Callable[[Path], None]) -> None:
        """``make`` an entry under a name nobody uses, rename it to ``path``, make that durable."""
        temporary = path.parent / unique()
        try:
            make(temporary)
            self.before("rename", path)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._sync(path.parent)

    def _sync(self, path: Path) -> None:
        self.before("fsync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unique(prefix: str = TEMPORARY) -> str:
    """A name nobody has used: 64 random bits."""
    return prefix + secrets.token_hex(8)

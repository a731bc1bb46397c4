"""What a power cut may leave of a store: a model of a disk that keeps only what was fsynced.

Invariants of the model (the idea of ALICE, Pillai et al., OSDI 2014), more pessimistic than any file system:

- what a file holds is certain once the file was fsynced; until then it may be what it was, nothing, a half or
  all of it;
- an entry of a folder (a name and what it stands for) is certain once the *folder* was fsynced; until then
  each entry is old or new by itself: renames may be lost, reordered, or half of one may be lost;
- fsync of a file says nothing about its name, fsync of a folder nothing about what its files hold;
- after a failed fsync the kernel may have dropped the pages: no later fsync brings them back.

The calls are real. ``RecordingDisk`` looks at the whole folder before every call of the seam, so changes made
past the seam are seen, too: as changes that nobody fsynced. ``Medium.states`` gives what a power cut at this
moment may leave, ``Image.write`` makes one of those states a folder again.
"""

from __future__ import annotations

import errno
import os
import random
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.store.fs import TEMPORARY, Disk

LOCK = "lock"  # rewritten at every start, for people; not part of any state

_FLOOR = "clock_floor"
_UNIQUE = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]+|(?<=^staging/)[0-9a-f]+")
_TIMES = re.compile(rb"[0-9]{10}(\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Inode:
    """A file, a link (``target``) or a folder, apart from what it holds."""

    kind: int  # stat.S_IFREG, S_IFLNK, S_IFDIR
    mode: int = 0
    target: str = ""


@dataclass(slots=True)
class Image:
    """A folder tree: what every inode is, which entries a folder has, what a file holds."""

    root: int = 0
    inodes: dict[int, Inode] = field(default_factory=dict)
    entries: dict[int, dict[str, int]] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Paths relative to the root, folders before what is in them."""
        waiting = [("", self.root)]
        while waiting:
            path, number = waiting.pop()
            for name, child in sorted(self.entries.get(number, {}).items()):
                below = f"{path}/{name}" if path else name
                if below == LOCK:
                    continue
                yield below, child
                if self.inodes[child].kind == stat.S_IFDIR:
                    waiting.append((below, child))

    def fingerprint(self) -> frozenset[tuple[str, int, str, bytes]]:
        """Equal for trees that differ in nothing but unique names and the time of day."""
        found = set()
        for path, number in self.walk():
            inode, content = self.inodes[number], self.contents.get(number, b"")
            if path.endswith((".json", _FLOOR)) or TEMPORARY in path:
                content = _TIMES.sub(b"", content)
            found.add((_UNIQUE.sub("*", path), inode.kind, inode.target, content))
        return frozenset(found)

    def write(self, folder: Path) -> None:
        """Make the tree a folder on a real disk, hard links included."""
        folder.mkdir()
        made: dict[int, Path] = {}
        for path, number in self.walk():
            inode, place = self.inodes[number], folder / path
            if inode.kind == stat.S_IFDIR:
                place.mkdir()
            elif inode.kind == stat.S_IFLNK:
                place.symlink_to(inode.target)
            elif number in made:
                place.hardlink_to(made[number])
            else:
                place.write_bytes(self.contents[number])
                place.chmod(inode.mode)
                made[number] = place


Choice = Mapping[tuple[int, str] | int, int | bytes | None]


class Medium:
    """What is certain of a folder, what is only in memory, and what a power cut may make of both."""

    def __init__(self, root: Path) -> None:
        self._path = root
        self._live = self._scan(Image())
        self._inodes = dict(self._live.inodes)
        self._certain = Image(
            self._live.root,
            entries={number: dict(entries) for number, entries in self._live.entries.items()},
            contents=dict(self._live.contents),
        )
        # (folder, name) or file -> everything it has been since it was last certain
        self._pending: dict[tuple[int, str] | int, list[int | bytes | None]] = {}
        self._dropped: set[int] = set()
        self._carried: set[tuple[int, str] | int] = set()

    @property
    def live(self) -> Image:
        """The folder as every process sees it now."""
        return self._live

    @property
    def certain(self) -> Image:
        """The folder as it is if everything that can be lost is lost."""
        return self._built({key: self._was(key) for key in self._pending})

    def moved(self, folder: Path) -> Medium:
        """The same after a kill: ``folder`` is the live tree written anew, the losses stay possible."""
        other = Medium(folder)
        number_at = dict(other._live.walk())
        numbers = {number: number_at[path] for path, number in self._live.walk()}
        numbers[self._live.root] = other._live.root

        def new(number: int) -> int:
            return numbers.get(number, -number)  # what is no longer seen keeps a number that nobody else has

        other._inodes |= {new(number): inode for number, inode in self._inodes.items()}
        other._certain = Image(
            other._live.root,
            entries={
                new(number): {name: new(child) for name, child in entries.items()}
                for number, entries in self._certain.entries.items()
            },
            contents={new(number): content for number, content in self._certain.contents.items()},
        )
        for key, values in self._pending.items():
            if isinstance(key, tuple):
                other._pending[new(key[0]), key[1]] = [
                    new(value) if isinstance(value, int) else None for value in values
                ]
            else:
                other._pending[new(key)] = list(values)
        other.mark()
        other._dropped = {new(number) for number in self._dropped}
        return other

    def mark(self) -> None:
        """Remember what is pending now: somebody else's, or of a call that failed."""
        self._carried = set(self._pending)

    @property
    def carries(self) -> bool:
        """Whether any of what was pending at ``mark`` still is, of what has not been removed since."""
        return any(
            (key[0] in self._live.entries if isinstance(key, tuple) else key in self._live.contents)
            for key in self._carried & self._pending.keys()
        )

    def observe(self) -> None:
        """Look what has changed since the last look."""
        before, self._live = self._live, self._scan(self._live)
        self._inodes.update(self._live.inodes)
        for number in before.entries.keys() | self._live.entries.keys():
            old, new = before.entries.get(number, {}), self._live.entries.get(number, {})
            for name in old.keys() | new.keys():
                if old.get(name) != new.get(name):
                    self._pending.setdefault((number, name), []).append(new.get(name))
        for number, content in self._live.contents.items():
            if before.contents.get(number) != content:
                self._pending.setdefault(number, []).append(content)

    def flush(self, path: Path) -> None:
        """``path`` was fsynced."""
        number = path.lstat().st_ino
        if number in self._dropped:
            return
        if number in self._live.entries:
            self._certain.entries[number] = dict(self._live.entries[number])
            for key in [key for key in self._pending if isinstance(key, tuple) and key[0] == number]:
                del self._pending[key]
        else:
            self._certain.contents[number] = self._live.contents[number]
            self._pending.pop(number, None)

    def drop(self, path: Path) -> None:
        """The fsync of ``path`` failed: what of it was in memory only will never be on the medium."""
        number = path.lstat().st_ino
        if number in self._live.contents:
            self._dropped.add(number)

    def is_certain(self, path: Path) -> bool:
        """Whether ``path`` and what it holds survive any power cut now; False if it is not there."""
        try:
            folder, number = path.parent.stat().st_ino, path.lstat().st_ino
        except FileNotFoundError:
            return False
        return (folder, path.name) not in self._pending and number not in self._pending

    def states(self, chance: random.Random, mixtures: int = 4) -> Iterator[Image]:
        """What a power cut now may leave: nothing, all, each change alone lost or kept, halves, mixtures.

        Without ``mixtures`` only losses: nothing of what is pending, or all but one change of it.
        """
        options = {key: [self._was(key), *values] for key, values in self._pending.items()}
        for key, values in options.items():
            if isinstance(key, int) and isinstance(values[-1], bytes):
                values.insert(-1, b"")
                values.insert(-1, values[-1][: len(values[-1]) // 2])
        new = {key: values[-1] for key, values in options.items()}
        old = {key: values[0] for key, values in options.items()}
        yield self._built(old)
        for key, values in options.items():
            for value in values[:-1]:
                yield self._built({**new, key: value})
        if not mixtures:
            return
        yield self._built(new)
        for key, values in options.items():
            yield self._built({**old, key: values[-1]})
        folders = {key[0] for key in options if isinstance(key, tuple)}
        for folder in folders:
            here = {key for key in options if isinstance(key, tuple) and key[0] == folder}
            yield self._built({**new, **{key: old[key] for key in here}})
            yield self._built({**old, **{key: new[key] for key in here}})
        for _ in range(mixtures if options else 0):
            yield self._built({key: chance.choice(values) for key, values in options.items()})

    def _was(self, key: tuple[int, str] | int) -> int | bytes | None:
        if isinstance(key, tuple):
            return self._certain.entries.get(key[0], {}).get(key[1])
        return self._certain.contents.get(key, b"")

    def _built(self, choice: Choice) -> Image:
        image = Image(self._certain.root, inodes=self._inodes)
        image.entries = {number: dict(entries) for number, entries in self._certain.entries.items()}
        image.contents = dict(self._certain.contents)
        for key, value in choice.items():
            if not isinstance(key, tuple):
                assert isinstance(value, bytes)
                image.contents[key] = value
            elif isinstance(value, int):
                image.entries.setdefault(key[0], {})[key[1]] = value
            else:
                image.entries.get(key[0], {}).pop(key[1], None)
        for number in self._pending:
            if isinstance(number, int):
                image.contents.setdefault(number, b"")
        return image

    def _scan(self, last: Image) -> Image:
        image = Image(self._path.stat().st_ino)
        image.inodes[image.root] = Inode(stat.S_IFDIR)
        waiting = [(self._path, image.root)]
        while waiting:
            folder, number = waiting.pop()
            entries = image.entries[number] = {}
            for entry in os.scandir(folder):
                path, status = folder / entry.name, entry.stat(follow_symlinks=False)
                child, kind = status.st_ino, stat.S_IFMT(status.st_mode)
                if folder == self._path and entry.name == LOCK:
                    continue
                entries[entry.name] = child
                target = str(path.readlink()) if kind == stat.S_IFLNK else ""
                image.inodes[child] = Inode(kind, stat.S_IMODE(status.st_mode), target)
                if kind == stat.S_IFDIR:
                    waiting.append((path, child))
                elif kind == stat.S_IFREG and child not in image.contents:
                    content = path.read_bytes()
                    known = last.contents.get(child)
                    image.contents[child] = known if known == content else content
        return image


class RecordingDisk(Disk):
    """A disk under observation, which may refuse one call.

    Args:
        root: the folder that exists already and is looked at.
        at_each: called before every call, with its number (from 1) and what is known of the medium.
        medium: what is known already, after a kill; else everything there is on the medium.
        refuse: the number of the call that fails, and the error; a failed fsync loses its file's pages.
        forget: fsyncs of these paths are taken for forgotten: to prove that the model notices.
    """

    def __init__(
        self,
        root: Path,
        at_each: Callable[[int, str, Medium], None] = lambda number, call, medium: None,
        *,
        medium: Medium | None = None,
        refuse: tuple[int, int] | None = None,
        forget: Callable[[Path], bool] = lambda path: False,
    ) -> None:
        self.medium = medium or Medium(root)
        self.calls: list[str] = []
        self.at_each = at_each
        self._refuse = refuse or (0, errno.EIO)
        self._forget = forget

    def before(self, call: str, path: Path) -> None:
        self.medium.observe()
        self.calls.append(call)
        self.at_each(len(self.calls), call, self.medium)
        number, error = self._refuse
        if len(self.calls) == number:
            if call == "fsync":
                self.medium.drop(path)
            raise OSError(error, os.strerror(error))
        if call == "fsync" and not self._forget(path):
            self.medium.flush(path)

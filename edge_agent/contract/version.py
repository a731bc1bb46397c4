"""Versions: MAJOR.MINOR.PATCH[-PRERELEASE], ordered as https://semver.org/ §11 orders them."""

from __future__ import annotations

import functools
import re

from edge_agent.contract.errors import BadVersion

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_FORM = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?")
_MAX_LENGTH = 64  # characters: a version is part of paths, topics and label values


@functools.total_ordering
class Version(str):
    """A semantic version without build metadata. Compares by precedence, not by text."""

    __slots__ = ("_key",)
    _key: tuple[object, ...]

    def __new__(cls, text: str) -> Version:
        """Check the form.

        Raises:
            BadVersion: not MAJOR.MINOR.PATCH[-PRERELEASE].
        """
        match = _FORM.fullmatch(text) if len(text) <= _MAX_LENGTH else None
        if match is None:
            raise BadVersion(f"version {text[:80]!r}: expected MAJOR.MINOR.PATCH, for example 1.4.0")
        self = super().__new__(cls, text)
        major, minor, patch, pre = match.groups()
        # A pre-release sorts before its release; numeric identifiers before alphanumeric ones.
        identifiers = tuple(
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in (pre.split(".") if pre else ())
        )
        self._key = (int(major), int(minor), int(patch), pre is None, identifiers)
        return self

    def __lt__(self, other: str) -> bool:
        return self._key < Version(other)._key

    def __le__(self, other: str) -> bool:
        return self._key <= Version(other)._key

    def __gt__(self, other: str) -> bool:
        return self._key > Version(other)._key

    def __ge__(self, other: str) -> bool:
        return self._key >= Version(other)._key

    __eq__ = str.__eq__
    __ne__ = str.__ne__
    __hash__ = str.__hash__

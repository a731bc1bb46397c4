"""Releases: bundles on their way into the repository, and what the assignments say about them.

The functions on ``Assignments`` are pure; each returns the same document if it says so already, else one with
the next serial. They are the only places where a desired state is written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from edge_agent.contract.assignments import Assignments, Candidate, ModelAssignment, Release
from edge_agent.contract.bundle import Bundle, open_given, unpack_given


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """A bundle from its folder or its one-file form; what was unpacked is removed afterwards.

    Raises:
        BadBundle: not a bundle.
        BadManifest: its manifest is wrong.
        OSError: there is no room to unpack it.
    """
    if path.is_dir():
        yield open_given(path)
        return
    with tempfile.TemporaryDirectory(prefix="edge-fleet-") as folder:
        yield unpack_given(path, Path(folder))


def stable(document: Assignments, model: str) -> Release | None:
    """The stable release of ``model``."""
    entry = document.models.get(model)
    return entry.stable if entry else None


def with_stable(document: Assignments, model: str, release: Release) -> Assignments:
    """``release`` for everybody, no candidate."""
    return _with(document, model, replace(_entry(document, model), stable=release, candidate=None))


def with_candidate(document: Assignments, model: str, candidate: Candidate) -> Assignments:
    """``candidate`` for its cohort; the stable release stays."""
    return _with(document, model, replace(_entry(document, model), candidate=candidate))


def without_candidate(document: Assignments, model: str) -> Assignments:
    """Only the stable release: devices of the cohort go back to it."""
    return _with(document, model, replace(_entry(document, model), candidate=None))


def _entry(document: Assignments, model: str) -> ModelAssignment:
    return document.models.get(model, ModelAssignment())


def _with(document: Assignments, model: str, entry: ModelAssignment) -> Assignments:
    if document.models.get(model) == entry:
        return document
    return replace(document, serial=document.serial + 1, models={**document.models, model: entry})

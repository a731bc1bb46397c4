"""The drift baseline: how each feature and the score were distributed in the calibration data.

Per column: B-1 ascending inner bin edges (quantiles of the reference), the B counts of the reference
rows between them, and the count of missing values. Values equal to an edge belong to the bin above it
(``numpy.searchsorted(edges, x, side="right")``). Histograms are mergeable across devices.
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.errors import BadMember

FILE_NAME: Final = "baseline.msgpack"
FORMAT: Final = 1


class Histogram(msgspec.Struct, frozen=True):
    """The reference distribution of one column. ``len(counts) == len(edges) + 1``."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    missing: int = 0


class Baseline(msgspec.Struct, frozen=True):
    """``baseline.msgpack``: the features in input order, and the score if the model has one."""

    rows: int  # reference rows behind every histogram
    features: tuple[Histogram, ...]
    score: Histogram | None = None
    format: int = FORMAT


def parse(data: bytes) -> Baseline:
    """Read ``baseline.msgpack``.

    Raises:
        BadMember: unreadable, of an unknown format version, or edges and counts do not fit.
    """
    try:
        baseline = wire.from_msgpack(data, Baseline)
    except ValueError as error:
        raise BadMember(f"{FILE_NAME}: {error}") from error
    if baseline.format != FORMAT:
        raise BadMember(f"{FILE_NAME}: format version {baseline.format}, this program reads {FORMAT}")
    for histogram in (*baseline.features, *([baseline.score] if baseline.score else [])):
        if len(histogram.counts) != len(histogram.edges) + 1:
            raise BadMember(
                f"{FILE_NAME}: {histogram.name!r} has {len(histogram.counts)} counts for "
                f"{len(histogram.edges)} edges, expected {len(histogram.edges) + 1}"
            )
        if any(a > b for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)):
            raise BadMember(f"{FILE_NAME}: the edges of {histogram.name!r} do not ascend")
    return baseline


def encode(baseline: Baseline) -> bytes:
    """The bytes of ``baseline.msgpack``."""
    return wire.to_msgpack(baseline)

"""Step 3b: what the search needs to know of a graph and its data, from one pass over two parts of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from quantize.calibrate import Calibration, calibrate
from quantize.cost import Sizes
from quantize.load import Rows
from quantize.plan import Plan, plan_of
from quantize.prepare import PreparedModel
from quantize.recover import channel_axes

_RANGE_MACS: Final = 400e9  # multiply-accumulates of the pass that finds ranges; more rows are drawn from


@dataclass(frozen=True, slots=True)
class Observed:
    """What calibration found: the plan and everything the search needs to know of the tensors."""

    plan: Plan
    ranges: Calibration  # of the rows that find ranges
    held_out: Calibration  # of the rows for choosing
    sizes: Sizes
    rows: Rows  # that found the ranges


def observe(
    model: PreparedModel, ranges: Rows, selection: Rows, sizes: Sizes, *, fast: bool = False
) -> Observed:
    """Find ranges and channels on ``ranges`` and look at the same tensors on ``selection``."""
    plan = plan_of(model.proto)
    most = _RANGE_MACS / (40 if fast else 1)
    ranges, selection = (_drawn(rows, sizes, most) for rows in (ranges, selection))
    axes = {} if fast else channel_axes(model.proto, plan)
    found = calibrate(model, plan.watched, ranges, axes=axes)
    held_out = calibrate(model, plan.watched, selection)
    both = {name for name in found.sketches if name in held_out.sketches}
    found = replace(found, sketches={name: found.sketches[name] for name in sorted(both)})
    return Observed(plan.limited_to(found.ranges()), found, held_out, sizes, ranges)


def _drawn(rows: Rows, sizes: Sizes, macs: float) -> Rows:
    most = max(int(macs / max(sizes.macs, 1.0)), 16)
    return rows if len(rows) <= most else rows.take(np.linspace(0, len(rows) - 1, most).round().astype(int))

"""Step 3: what the tensors of the FP32 graph look like, from one streaming pass.

Invariants: memory depends neither on the number of rows nor on their lengths; lows and highs are exact over
all elements; the same rows in the same order give the same sketches.

A sketch is a histogram over the first 13 bits of a float32: sign, exponent and four bits of the mantissa, so
16 bins an octave from 1e-38 to 1e38, whatever the data. One ``bincount`` a batch fills it, and every way to
choose a range (all of it, a percentile, the least squared error) is read from it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import onnx

from quantize import runtime
from quantize.errors import BadData
from quantize.load import Rows
from quantize.prepare import PreparedModel

_KEPT_BITS: Final = 13
_BINS: Final = 1 << _KEPT_BITS
_STEPS: Final = 255
_SAMPLED: Final = 1 << 16  # elements of a batch that enter a histogram; lows and highs see all
_BATCH_BYTES: Final = 20e6  # of watched tensors in a batch; three are alive at a time
_SHRUNK: Final = np.concatenate([np.linspace(1.0, 0.5, 11), np.geomspace(0.45, 0.05, 9)])


def _centres() -> np.ndarray:
    half = np.uint32(1 << (31 - _KEPT_BITS))
    bits = (np.arange(_BINS, dtype=np.uint32) << np.uint32(32 - _KEPT_BITS)) | half
    with np.errstate(invalid="ignore"):
        centres = bits.view(np.float32).astype(np.float64)
    smallest = np.abs(centres) < 1e-37  # zero and the denormal numbers
    return np.where(smallest, 0.0, centres)


_CENTRES: Final = _centres()


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and largest value that INT8 has to hold."""

    low: float
    high: float

    def widened(self, factor: float) -> Range:
        """``factor`` times as far from zero on both sides."""
        return Range(self.low * factor, self.high * factor)

    def within(self, low: float, high: float) -> Range:
        """Cut to what the tensor can be at all."""
        return Range(max(self.low, low), min(self.high, high))


class Sketch:
    """A log-histogram of one tensor in constant memory (64 KiB), and its exact range."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.elements = 0
        self._counts = np.zeros(_BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count float32 values of any shape; what is not finite is left out."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        self.elements += flat.size
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            flat = flat[np.isfinite(flat)]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        step = -(-flat.size // _SAMPLED)
        # An even step would meet the same channels again and again.
        sampled = np.ascontiguousarray(flat[:: step | 1], np.float32)
        self._counts += np.bincount(sampled.view(np.uint32) >> np.uint32(32 - _KEPT_BITS), minlength=_BINS)
        self.__dict__.pop("_seen", None)

    @cached_property
    def _seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Values in ascending order and how often each was seen."""
        used = np.flatnonzero(self._counts)
        values = np.clip(_CENTRES[used], self.low, self.high)
        order = np.argsort(values, kind="stable")
        return values[order], self._counts[used][order].astype(np.float64)

    @property
    def range(self) -> Range:
        """Everything that was seen."""
        return Range(self.low, self.high)

    def percentile(self, share: float) -> Range:
        """The range without the outermost ``1 - share`` of the values, half of it at each end."""
        values, counts = self._seen
        below = np.cumsum(counts) / counts.sum()
        outside = (1 - share) / 2
        low = values[min(int(np.searchsorted(below, outside)), len(values) - 1)]
        high = values[min(int(np.searchsorted(below, 1 - outside)), len(values) - 1)]
        return Range(float(low), float(high))

    def error(self, found: Range) -> float:
        """Mean squared error of rounding to 255 steps inside ``found`` and clipping outside."""
        values, counts = self._seen
        low, high = min(found.low, 0.0), max(found.high, 0.0)
        step = (high - low) / _STEPS or 1.0
        clipped = values - np.clip(values, low, high)
        rounded = np.where(np.abs(values) < step / 2, values**2, step**2 / 12)
        return float(counts @ np.where(clipped != 0, clipped**2, rounded) / counts.sum())

    def least_error(self) -> Range:
        """The range of the least squared error: both ends are moved inwards in turn until neither helps."""
        best = self.range
        least = self.error(best)
        for _ in range(2):
            for end in ("low", "high"):
                for factor in _SHRUNK[1:]:
                    tried = (
                        Range(self.low * factor, best.high)
                        if end == "low"
                        else Range(best.low, self.high * factor)
                    )
                    error = self.error(tried)
                    if error < least:
                        best, least = tried, error
        return best


@dataclass(slots=True)
class Channels:
    """Per channel of an activation: mean and largest magnitude."""

    total: np.ndarray
    largest: np.ndarray
    count: int = 0

    @property
    def mean(self) -> np.ndarray:
        """(channels,) float64."""
        return self.total / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over one part of the data found."""

    sketches: Mapping[str, Sketch]
    channels: Mapping[str, Channels] = field(default_factory=dict)

    def ranges(self) -> dict[str, Range]:
        """All that was seen, per tensor."""
        return {name: sketch.range for name, sketch in self.sketches.items()}


def calibrate(
    model: PreparedModel,
    tensors: Sequence[str],
    rows: Rows,
    *,
    proto: onnx.ModelProto | None = None,
    axes: Mapping[str, int] | None = None,
) -> Calibration:
    """Run ``rows`` through the FP32 graph and watch ``tensors``.

    Args:
        model: the reference.
        tensors: to sketch; those that are not float32, or always empty, are left out.
        rows: that go through it.
        proto: another form of the same graph, to watch that one.
        axes: the channel axis of those tensors whose channels are wanted.

    Raises:
        BadData: a tensor is never finite: the data and the model do not fit.
    """
    sketches = {name: Sketch() for name in tensors}
    channels: dict[str, Channels] = {}

    def see(name: str, values: np.ndarray) -> None:
        if values.dtype != np.float32:
            return
        if name in sketches:
            sketches[name].add(values)
        axis = None if axes is None else axes.get(name)
        if axis is not None:
            _see_channels(channels, name, values, axis)

    for name, values in watch(model, sorted({*tensors, *(axes or ())}), rows, proto=proto):
        see(name, values)
    for name, sketch in sketches.items():
        if sketch.elements and sketch.low > sketch.high:
            raise BadData(f"data {rows.source}: tensor {name!r} of the model is never a finite number")
    return Calibration({name: found for name, found in sketches.items() if found.elements}, channels)


def _see_channels(channels: dict[str, Channels], name: str, values: np.ndarray, axis: int) -> None:
    axis %= values.ndim
    flat = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    flat = np.where(np.isfinite(flat), flat, 0.0)
    if not len(flat):
        return
    width = flat.shape[1]
    found = channels.setdefault(name, Channels(np.zeros(width), np.zeros(width)))
    found.total += flat.sum(axis=0, dtype=np.float64)
    found.largest = np.maximum(found.largest, np.abs(flat).max(axis=0))
    found.count += len(flat)


def watch(
    model: PreparedModel, tensors: Sequence[str], rows: Rows, *, proto: onnx.ModelProto | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ``tensors`` by name, a batch at a time; a batch holds as many rows as memory allows."""
    if not tensors:
        return
    watched = onnx.ModelProto()
    watched.CopyFrom(proto or model.proto)
    outputs = {value.name for value in watched.graph.output}
    inputs = {value.name for value in watched.graph.input}
    for name in tensors:
        if name not in outputs and name not in inputs:
            watched.graph.output.append(onnx.ValueInfoProto(name=name))  # onnxruntime finds out the type
    session = runtime.open_session(watched)
    rows = model.trim(rows)
    batch = model.batch
    if model.fixed_batch is None:
        first = next(runtime.stream(session, rows.take(np.arange(1)).inputs, 1))
        bytes_a_row = sum(values.nbytes for values in first.values())
        batch = int(np.clip(_BATCH_BYTES / max(bytes_a_row, 1), 1, batch))
    wanted = [name for name in tensors if name not in inputs]
    for found in runtime.stream(session, rows.inputs, batch):
        for name in wanted:
            yield name, found[name]
    for name in sorted(inputs.intersection(tensors)):
        values = rows.inputs[name]
        ragged = values.dtype == object  # rows of different lengths
        for some in (row[None] for row in values) if ragged else (values,):
            yield name, some


# -- choosing a range -------------------------------------------------------------------------------------

Rule = Callable[[Sketch], Range]

# A value outside its range saturates, and rows outside the calibration data are what an anomaly model is for:
# so ranges wider than what was seen compete with narrower ones, which are finer where the values are.
RULES: Final[Mapping[str, Rule]] = {
    "min-max": lambda sketch: sketch.range,
    "min-max x1.5": lambda sketch: sketch.range.widened(1.5),
    "min-max x2": lambda sketch: sketch.range.widened(2.0),
    "min-max x3": lambda sketch: sketch.range.widened(3.0),
    "99.99 %": lambda sketch: sketch.percentile(0.9999),
    "99.9 %": lambda sketch: sketch.percentile(0.999),
    "least error": Sketch.least_error,
}


def ranges_by(rule: str, found: Calibration) -> dict[str, Range]:
    """Every tensor's range by one rule."""
    return {name: RULES[rule](sketch) for name, sketch in found.sketches.items()}


def ranges_each(choices: Iterable[Mapping[str, Range]], held_out: Calibration) -> dict[str, Range]:
    """Of the ranges of every tensor the one with the least error on rows that had no part in finding it."""
    by_rule = list(choices)
    return {
        name: min(
            (ranges[name] for ranges in by_rule), key=held_out.sketches[name].error
        )  # the first of equals
        for name in by_rule[0]
    }

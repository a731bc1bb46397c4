"""Layers solved again for the inputs that are left: least squares on calibration rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx

from quantize.channels import Group, attributes

_RIDGES: Final = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean energy of a channel
_HELD_OUT: Final = 5  # every fifth sample chooses the ridge
_RIDGE_OUTPUTS: Final = 256  # outputs that are enough to choose it
_ROWS: Final = 1024  # in float64 at a time


def ridge(
    inputs: np.ndarray, wanted: np.ndarray, before: np.ndarray, *, with_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights near ``before`` that turn ``inputs`` into ``wanted``.

    Minimises ``|inputs W + b - wanted|^2 + r |W - before|^2``; r is chosen on every fifth sample.

    Args:
        inputs: (samples, in) float32.
        wanted: (samples, out) float32.
        before: (in, out).
        with_bias: whether b may be other than zero.

    Returns:
        W (in, out) and b (out,), float32.
    """
    middle_in = inputs.mean(axis=0, dtype=np.float64) * with_bias
    middle_out = wanted.mean(axis=0, dtype=np.float64) * with_bias
    x = inputs - middle_in.astype(np.float32)
    missing = wanted - middle_out.astype(np.float32) - x @ before.astype(np.float32)
    held = np.arange(len(x)) % _HELD_OUT == 0
    strength = _RIDGES[-1]
    if 0 < held.sum() < len(x):
        outputs = np.linspace(0, missing.shape[1] - 1, min(_RIDGE_OUTPUTS, missing.shape[1])).astype(int)
        strength = _best_ridge(x, missing[:, outputs], held)
    change = next(_changes(x, missing, (strength,)))
    weights = before + change
    return weights.astype(np.float32), (middle_out - middle_in @ weights).astype(np.float32)


def _best_ridge(x: np.ndarray, missing: np.ndarray, held: np.ndarray) -> float:
    """The ridge whose solution on other samples comes closest on ``held``; the smallest of equals."""
    apart, asked = x[held], missing[held]
    errors = [
        float(((apart @ change.astype(np.float32) - asked).astype(np.float64) ** 2).sum())
        for change in _changes(x[~held], missing[~held], _RIDGES)
    ]
    return _RIDGES[int(np.argmin(errors))]


def _changes(x: np.ndarray, missing: np.ndarray, strengths: Sequence[float]) -> Iterator[np.ndarray]:
    """``(X^T X + r I)^-1 X^T M`` for each ridge, in float64; through ``X X^T`` where that is smaller."""
    samples, width = x.shape
    if width > samples:
        wide = x.astype(np.float64)
        gram, right = wide @ wide.T, missing.astype(np.float64)
    else:
        gram, right = np.zeros((width, width)), np.zeros((width, missing.shape[1]))
        for start in range(0, samples, _ROWS):
            part = x[start : start + _ROWS].astype(np.float64)
            gram += part.T @ part
            right += part.T @ missing[start : start + _ROWS].astype(np.float64)
    mean = max(float(np.trace(gram)) / width, 1e-12)
    diagonal = gram.diagonal().copy()
    for strength in strengths:
        np.fill_diagonal(gram, diagonal + strength * mean)
        change = np.linalg.solve(gram, right)
        yield x.T.astype(np.float64) @ change if width > samples else change


def channels_of(values: np.ndarray, group: Group, chance: np.random.Generator, each: int) -> np.ndarray:
    """Samples of a group's channels: (samples, width)."""
    if values.ndim == 2:
        block = values.shape[1] // group.width
        if block == 1:
            return values
        values = values.reshape(len(values), group.width, block)
    elif values.shape[-1] == group.width and values.shape[1] != group.width:
        values = np.moveaxis(values, -1, 1)
    flat = np.moveaxis(values.reshape(len(values), group.width, -1), 1, 2)  # (rows, positions, width)
    picked = _pick(chance, len(flat), flat.shape[1], each)
    return np.take_along_axis(flat, picked[:, :, None], axis=1).reshape(-1, group.width)


def _pick(chance: np.random.Generator, rows: int, positions: int, each: int) -> np.ndarray:
    """Which positions to look at in each row: (rows, at most each)."""
    if positions <= each:
        return np.broadcast_to(np.arange(positions), (rows, positions))
    return chance.integers(0, positions, (rows, each))


def sample(
    values: np.ndarray, node: onnx.NodeProto, chance: np.random.Generator, each: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and outputs there of a layer: (rows, k), (rows * k, outputs)."""
    if values.ndim == 2:
        return np.empty((len(values), 0), int), values
    if node.op_type == "Conv":
        values = np.moveaxis(values, 1, -1)
    flat = values.reshape(len(values), -1, values.shape[-1])
    picked = _pick(chance, len(flat), flat.shape[1], each)
    return picked, np.take_along_axis(flat, picked[:, :, None], axis=1).reshape(-1, flat.shape[2])


def patches(values: np.ndarray, node: onnx.NodeProto, weight: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What a layer reads at the chosen positions: (samples, in)."""
    if node.op_type != "Conv":
        if values.ndim == 2:
            return values
        flat = values.reshape(len(values), -1, values.shape[-1])
        return np.take_along_axis(flat, chosen[:, :, None], axis=1).reshape(-1, flat.shape[2])
    given = attributes(node)
    kernel = weight.shape[2:]
    rank = len(kernel)
    pads = list(given.get("pads", [0] * (2 * rank)))
    strides = list(given.get("strides", [1] * rank))
    dilations = list(given.get("dilations", [1] * rank))
    around = [(0, 0), (0, 0), *((pads[axis], pads[axis + rank]) for axis in range(rank))]
    padded = np.pad(values, around)
    reach = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    every = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
    windows = windows[(*every, *(slice(None, None, step) for step in dilations))]
    grid = windows.shape[2 : 2 + rank]
    place = np.unravel_index(chosen, grid)
    row = np.arange(len(values))[:, None]
    picked = np.moveaxis(windows, 1, 1 + rank)[(row, *place)]  # (rows, k, C, *kernel)
    return np.ascontiguousarray(picked).reshape(-1, weight.shape[1] * math.prod(kernel))

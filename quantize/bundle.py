"""Step 6: the members of the bundle, written to a staging folder and renamed into place.

Invariants:

- nothing appears under its final name before everything is written; after a failure or Ctrl-C the output
  folder is as it was;
- the same inputs and versions give the same bytes: no times, no paths and no latencies enter a member.
  Timings go to ``N-V.report.json`` beside the bundle;
- an existing version is never replaced by another content unless that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.contract import bundle as bundles
from edge_agent.contract.bundle import Bundle
from edge_agent.contract.golden import Agreement, Array, Golden
from edge_agent.contract.manifest import Datatype, Manifest
from quantize import runtime, target
from quantize.config import Impute
from quantize.errors import BadModel, OutputError
from quantize.int8 import Int8Model
from quantize.load import Rows
from quantize.prepare import PreparedModel

GOLDEN_ROWS: Final = 16
_GOLDEN_BYTES: Final = 1 << 20  # of their inputs: a device keeps them as long as the model
_FEWEST_ROWS: Final = 2
_HOLES: Final = 3  # golden rows with missing values
_FAR: Final = 3  # golden rows far outside
# Other CPUs round other last bits. Float graphs: sums in another order, 3e-7 of the range measured between
# x86-64 and ARM64, a thousand times that leaves room for other math libraries. INT8 graphs: an activation may
# land one or two steps of 1/255 of its range away (measured: at most 0.8 % of the range), so 1 %.
_FLOAT_TOLERANCE: Final = 3e-4
_INT8_TOLERANCE: Final = 1e-2
_SPREAD_FACTOR: Final = 3.0  # times the spread between this machine's own ways to run the graph


def publish(stage: Path, out: Path, label: str, *, overwrite: bool) -> tuple[Path, Path, Path]:
    """Move bundle, ``.tar`` and both reports to ``out/N-V``, ``N-V.tar``, ``N-V.report.json`` and ``.html``.

    Raises:
        OutputError: that version is there with another content.
        OSError: the folder cannot be written; ``out`` is as it was.
    """
    moves = {
        stage / "bundle": out / label,
        stage / "bundle.tar": out / f"{label}.tar",
        stage / "report.json": out / f"{label}.report.json",
    }
    folder, tar, report = moves.values()
    moves[stage / "report.html"] = out / f"{label}.report.html"
    if folder.exists() and not overwrite:
        new = bundles.open_bundle(stage / "bundle").digest
        try:
            old = str(bundles.open_bundle(folder).digest)
        except ValueError:
            old = "no bundle"
        if old != new:
            raise OutputError(
                f"{folder} exists with another content ({old[7:19]}, this is {new.short}): "
                "give another --version, or --overwrite"
            )
    aside = stage / "replaced"
    aside.mkdir()
    undo: list[tuple[Path, Path]] = []
    try:
        for source, target in moves.items():
            if target.exists():
                target.rename(aside / target.name)
                undo.append((aside / target.name, target))
            source.rename(target)
            undo.append((target, source))
    except BaseException:
        for moved, back in reversed(undo):
            moved.rename(back)
        raise
    return folder, tar, report


def write(stage: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write folder and ``.tar`` into ``stage`` and prove them.

    Raises:
        OSError: ``stage`` cannot be written.
    """
    folder = stage / "bundle"
    folder.mkdir()
    bundle = bundles.write_bundle(folder, manifest, files)
    bundles.pack(bundle, stage / "bundle.tar")
    os.chmod(folder, 0o755)  # noqa: PTH101, S103 - mkdtemp makes private folders, a bundle is for everyone
    return bundle


# -- golden vectors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vectors:
    """Golden vectors and how far this machine's own ways to run the graph lie apart."""

    golden: Golden
    rows: int
    spread: float  # largest difference, in units of what the tolerance allows: below 1


def golden_of(
    model: PreparedModel, int8: Int8Model, calibration: Rows, impute: Impute, batch: int
) -> Vectors:
    """Inputs from the calibration rows, some with missing values, some far outside, and what comes out.

    Exact where the graph is INT8 from end to end and its ARM64 form gives the same bits here. Else the
    tolerance is what CPUs are known to differ by, or three times what differs on this machine between
    an unfused float graph, the fused one, ``batch`` rows at a time and the graph that ARM runs, whichever is
    more. All but one run a row at a time, as the self-test of a device does.
    """
    inputs = _golden_inputs(model, calibration, impute)
    alone = model.fixed_batch or 1
    whole = runtime.OptimizationLevel.ORT_ENABLE_ALL
    outputs = runtime.run_all(runtime.open_session(int8.path), inputs, alone)
    others = [
        runtime.run_all(runtime.open_session(int8.path, settings=settings, level=level), inputs, rows)
        for settings, level, rows in (
            (None, runtime.OptimizationLevel.ORT_DISABLE_ALL, alone),
            (None, whole, batch),
            (runtime.ARM_GRAPH, whole, alone),
        )
    ]
    part = _INT8_TOLERANCE if int8.precision == "int8" else _FLOAT_TOLERANCE
    floats = {name: values.astype(np.float64) for name, values in outputs.items() if values.dtype.kind == "f"}
    # Of the typical magnitude, not of the largest: rows far outside score a thousand times higher.
    typical = max((float(np.median(np.abs(values))) for values in floats.values()), default=0.0)
    absolute, relative = part * typical, part
    apart = 0.0
    for other in others:
        for name, values in floats.items():
            if other[name].shape != values.shape:
                raise BadModel(
                    f"output {name!r} holds as much as is found, and how much that is depends on rounding: "
                    "export the model without the selection at its end"
                )
            allowed = absolute + relative * np.abs(values)
            difference = np.abs(other[name] - values)
            apart = max(apart, float((difference / np.maximum(allowed, 1e-30)).max(initial=0.0)))
    widened = max(1.0, _SPREAD_FACTOR * apart)
    fused = others[-1]  # what ARM64 runs; unfused graphs compute the same numbers in float
    same = all(np.array_equal(fused[name], values) for name, values in outputs.items())
    exact = same and _pure(int8, inputs, model.fixed_batch)
    golden = Golden(
        inputs=tuple(_array(name, values) for name, values in inputs.items()),
        outputs=tuple(_array(name, values) for name, values in outputs.items()),
        agreement=Agreement.EXACT if exact else Agreement.TOLERANCE,
        absolute=_round(absolute * widened),
        relative=_round(relative * widened),
    )
    return Vectors(golden, len(next(iter(inputs.values()))), apart / widened)


def _pure(int8: Int8Model, inputs: Mapping[str, np.ndarray], fixed_batch: int | None) -> bool:
    """Whether nothing in the graph ARM64 runs could round differently elsewhere: INT8 from end to end."""
    if int8.recipe is None or not int8.recipe.signed:
        return False  # sums of U8S8 saturate on processors without VNNI
    feeds = {name: values[: fixed_batch or 1] for name, values in inputs.items()}
    return target.arm_graph(int8.path, feeds, int8.path.with_suffix(".golden")).pure


def _golden_inputs(model: PreparedModel, calibration: Rows, impute: Impute) -> dict[str, np.ndarray]:
    row = sum(np.asarray(values[0]).nbytes for values in calibration.inputs.values())
    most = int(np.clip(_GOLDEN_BYTES // max(row, 1), _FEWEST_ROWS, GOLDEN_ROWS))
    count, whole = min(most, len(calibration)), model.fixed_batch or 1
    count = max(count // whole, 1) * whole
    index = np.linspace(0, len(calibration) - 1, count).round().astype(int)
    chosen = {name: values[index] for name, values in calibration.inputs.items()}
    inputs = {name: values.copy() for name, values in next(runtime.batches(chosen, count)).items()}
    spec = model.inputs[0]
    if spec.features is None:
        return inputs  # not a table: nothing stands in for a missing value
    rows, everything = inputs[spec.name], calibration.inputs[spec.name]
    width = rows.shape[1]
    if impute is not Impute.NONE and count > _HOLES + _FAR:
        rows[-1, 0] = np.nan
        rows[-2, ::3] = np.nan
        rows[-3, width // 2 :] = np.nan
    if count > _HOLES + _FAR:
        low, high = np.nanmin(everything, axis=0), np.nanmax(everything, axis=0)
        span = np.where(high > low, high - low, 1.0)
        rows[-4] = high + span
        rows[-5] = low - span
        rows[-6, 0] = high[0] + 10 * span[0]
    return inputs


def _array(name: str, values: np.ndarray) -> Array:
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return Array(name, _datatype(values.dtype), values.shape, little.tobytes())


def _datatype(dtype: np.dtype) -> Datatype:
    kinds = {"f": "FP", "i": "INT", "u": "UINT"}
    return Datatype.BOOL if dtype.kind == "b" else Datatype(f"{kinds[dtype.kind]}{dtype.itemsize * 8}")


def _round(value: float) -> float:
    return float(f"{value:.3g}")

"""Public tables of sensor readings through ``quantize-model``, as an ML engineer would do it.

``EDGE_SHARED_DATA=... python -m benchmarks.sensor_tables [NAME ...]`` trains a dense autoencoder on good rows
of each table (numpy, seconds), makes a bundle with defaults and a threshold for one false alarm in a hundred,
and judges FP32, onnxruntime's static and dynamic quantization and the bundle on rows that had no part in any
of it. The tables are public ones (docs/benchmarks.md names them) and are not in the repository: a table that
is not found is named and passed over.

Good rows are shuffled once and cut: half trains, a quarter calibrates, an eighth is for validation together
with half of the bad rows, and an eighth with the other half judges. The network is trained on rows scaled as
``--scale standard`` does by the calibration rows, with noise that it is to take away again. ROC-AUC is
of the mean squared reconstruction error. It says how far quantization moves a model, not how good an
autoencoder can be at the task.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks import autoencoders, machine
from benchmarks.quantize_models import SHARED, outputs, stock_dynamic, stock_static
from edge_agent.contract.bundle import MODEL, RULES, open_bundle
from edge_agent.rules.evaluate import RuleSet
from quantize import cli, compare

STEPS = 1500  # of Adam, whatever the number of rows
ENDS = 30  # cycles before a turbine fails that count as bad
NOISE = 1.0  # standard deviations of a feature
HEALTHY = 125  # cycles before that count as good


@dataclass(frozen=True, slots=True)
class Table:
    """Rows (n, features) float32, perhaps with NaN, and their labels (1 = bad)."""

    rows: np.ndarray
    bad: np.ndarray  # bool


def _labelled(path: str) -> Callable[[], Table]:
    def read() -> Table:
        with np.load(SHARED / path, allow_pickle=False) as arrays:
            return Table(arrays["X"].astype(np.float32), arrays["y"].astype(bool))

    return read


def _turbines() -> Table:
    """Turbofans that ran to failure: the last cycles are bad, the first ones good, those between left out."""
    with np.load(SHARED / "cmapss" / "cmapss_fd001.npz", allow_pickle=False) as arrays:
        columns, rows = [str(name) for name in arrays["columns"]], arrays["train"]
    unit, cycle = rows[:, columns.index("unit")], rows[:, columns.index("cycle")]
    last = {number: cycle[unit == number].max() for number in np.unique(unit)}
    left = np.array([last[number] for number in unit]) - cycle
    told = (left <= ENDS) | (left >= HEALTHY)
    return Table(rows[told][:, 2:].astype(np.float32), left[told] <= ENDS)


@dataclass(frozen=True, slots=True)
class Case:
    """A table and the hidden widths of its autoencoder."""

    name: str
    read: Callable[[], Table]
    widths: tuple[int, ...]


CASES = (
    Case("cardio", _labelled("adbench/6_cardio.npz"), (256, 128, 4, 128, 256)),
    Case("thyroid", _labelled("adbench/38_thyroid.npz"), (256, 128, 3, 128, 256)),
    Case("steel plates", _labelled("adbench/12_fault.npz"), (256, 128, 4, 128, 256)),
    Case("satellite", _labelled("adbench/30_satellite.npz"), (256, 128, 4, 128, 256)),
    Case("shuttle", _labelled("adbench/32_shuttle.npz"), (256, 128, 3, 128, 256)),
    Case("turbofans FD001", _turbines, (256, 128, 4, 128, 256)),
    Case("SECOM", _labelled("secom/secom_431.npz"), (512, 128, 16, 128, 512)),
)


@dataclass(frozen=True, slots=True)
class Split:
    """The parts of a table; no row is in two of them."""

    train: np.ndarray
    calibration: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    fresh: tuple[np.ndarray, np.ndarray]


def split(table: Table) -> Split:
    """Cut, the same way every time."""
    chance = np.random.default_rng(11)
    good, bad = (chance.permutation(np.flatnonzero(table.bad == kind)) for kind in (False, True))
    train, calibration, held, fresh = np.split(good, (np.array([4, 6, 7]) * len(good)) // 8)
    halves = np.array_split(bad, 2)

    def mixed(few: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.concatenate([few, half])
        return table.rows[chosen], table.bad[chosen]

    return Split(table.rows[train], table.rows[calibration], mixed(held, halves[0]), mixed(fresh, halves[1]))


def scaler(calibration: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What ``--impute median --scale standard`` does, here for the FP32 model and the stock files."""
    middle = np.nanmedian(calibration, axis=0)
    filled = np.where(np.isnan(calibration), middle, calibration).astype(np.float64)
    mean, deviation = filled.mean(axis=0), filled.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return lambda rows: ((np.where(np.isnan(rows), middle, rows) - mean) / deviation).astype(np.float32)


def measure(case: Case, folder: Path) -> list[str]:
    """One row of the table."""
    table = case.read()
    parts = split(table)
    scaled = scaler(parts.calibration)
    train = scaled(parts.train)
    epochs = max(STEPS // (len(train) // autoencoders.BATCH), 1)
    network = autoencoders.train(train, case.widths, epochs, noise=NOISE)
    model = folder / "model.onnx"
    autoencoders.write(model, network)
    np.savez(folder / "calibration.npz", X=parts.calibration)
    np.savez(folder / "validation.npz", X=parts.validation[0], y=parts.validation[1].astype(np.int64))
    np.savez(folder / "scaled.npz", x=scaled(parts.calibration))

    rows, bad = parts.fresh
    fed = scaled(rows)

    def scores(path: Path) -> np.ndarray:
        found = outputs(path, {"x": fed})["y"]
        return np.asarray(((found - fed) ** 2).mean(axis=1))

    stock_static(model, folder / "scaled.npz", folder / "static.onnx", fixed=False, states=[])
    stock_dynamic(model, folder / "dynamic.onnx")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    arguments = [str(model), "--calibration", str(folder / "calibration.npz"), "--out", str(folder / "out")]
    arguments += ["--validation", str(folder / "validation.npz"), "--scale", "standard", "--quiet"]
    arguments += ["--threshold", "fpr:0.01", "--name", "table", "--version", "1.0.0", "--json"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(arguments)
    if code:
        return [case.name, f"refused, exit {code}", *[""] * (len(HEAD) - 2)]
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    report = json.loads(said.getvalue())
    bundle = open_bundle(folder / "out" / "table-1.0.0")
    file = bundle.member(MODEL)
    ours = outputs(file, {"x": rows})["score"].reshape(-1)

    reference = scores(model)
    decision = report["decision"]
    expected, failed = reference > decision["threshold_fp32"], ours > decision["threshold"]
    features = bundle.manifest.inputs[0].features
    assert features is not None
    rules = RuleSet.parse(bundle.read(RULES), features).evaluate(rows)
    wide = [f"{len(table.rows)} x {table.rows.shape[1]}", f"{table.bad.mean():.1%}"]
    sizes = [path.stat().st_size / 1e3 for path in (model, file)]
    stock = [scores(folder / f"{kind}.onnx") for kind in ("static", "dynamic")]
    limits = decision["threshold_fp32"], decision["threshold"]
    sqnr = [compare.scores(reference, found, limits, bad).sqnr for found in (*stock, ours)]
    return [
        case.name,
        *wide,
        f"{sizes[0]:.0f} -> {sizes[1]:.0f}",
        f"{compare.auc(bad, reference):.4f}",
        *(f"{compare.auc(bad, found):.4f}" for found in stock),
        f"**{compare.auc(bad, ours):.4f}**",
        " / ".join(f"{found:.0f}" for found in sqnr),
        f"{(expected == failed).mean():.2%}",
        f"{failed[~bad].mean():.1%}",
        f"{(rules.failed == failed).mean():.1%}",
        f"{spent:.1f}",
    ]


HEAD = [
    "table",
    "rows x features",
    "bad",
    "kB, FP32 -> INT8",
    "AUC FP32",
    "stock static",
    "stock dynamic",
    "ours",
    "dB static / dynamic / ours",
    "same decision",
    "good rows failed",
    "rules agree",
    "cpu s",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sensor_tables")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of " + ", ".join(case.name for case in CASES)
    )
    wanted = parser.parse_args().names
    logging.getLogger().setLevel(logging.ERROR)
    lines = []
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines.append(measure(case, Path(folder)))
            except FileNotFoundError as error:
                print(f"{case.name}: {error.filename} is not there; set EDGE_SHARED_DATA")
    print(f"Measured on {machine.describe()}.\n")
    print(machine.table(HEAD, lines))


if __name__ == "__main__":
    main()

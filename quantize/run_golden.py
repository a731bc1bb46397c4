"""Run golden vectors with nothing but numpy and onnxruntime: ``run_golden.py MODEL VECTORS.npz``.

A program of its own, so that a fresh process, or an emulated ARM64 one without this project's packages, can
run it. ``VECTORS.npz`` holds ``in/NAME`` and ``out/NAME`` arrays, ``absolute`` and ``relative``, and how many
``rows`` run at a time. Prints one line of JSON: the worst difference in units of what is allowed, whether the
bits are the same, the CPU. Exit 0: the outputs agree; 1: they do not. With ``--attended``
behind them it ends when its standard input does: with whoever started it, however that ended.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import: it would phone home

import numpy as np
import onnxruntime


def run(
    session: onnxruntime.InferenceSession, names: list[str], feeds: dict[str, np.ndarray], step: int
) -> list[np.ndarray]:
    """``step`` rows at a time: a batch can round differently, and dynamic quantization does."""
    rows = range(0, len(next(iter(feeds.values()))), step)
    answers = [session.run(names, {name: feeds[name][row : row + step] for name in feeds}) for row in rows]
    return [np.concatenate(parts) for parts in zip(*answers, strict=True)]


def main(model: str, vectors: str) -> int:
    """Load, run, compare."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(vectors, allow_pickle=False) as arrays:
        feeds = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in/")}
        wanted = {name[4:]: arrays[name] for name in arrays.files if name.startswith("out/")}
        absolute, relative = float(arrays["absolute"]), float(arrays["relative"])
        step = int(arrays["rows"])
    names = list(wanted)
    worst, identical = 0.0, True
    for name, got in zip(names, run(session, names, feeds, step), strict=True):
        expected = wanted[name]
        identical = identical and got.shape == expected.shape and got.tobytes() == expected.tobytes()
        if got.shape != expected.shape or not (np.isfinite(got) == np.isfinite(expected)).all():
            worst = float("inf")
        elif expected.dtype.kind == "f":
            allowed = absolute + relative * np.abs(expected.astype(np.float64))
            apart = np.abs(got.astype(np.float64) - expected)
            worst = max(worst, float((apart / np.maximum(allowed, 1e-30)).max(initial=0.0)))
        elif not (got == expected).all():
            worst = float("inf")
    agree = identical if absolute == relative == 0 else worst <= 1.0
    cpu = os.environ.get("QEMU_CPU", "")
    print(
        json.dumps(
            {
                "agree": agree,
                "identical": identical,
                "worst": worst if np.isfinite(worst) else None,
                "machine": f"{platform.machine()} {cpu}".strip(),
                "onnxruntime": onnxruntime.__version__,
            }
        )
    )
    return 0 if agree else 1


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    if "--attended" in sys.argv:
        threading.Thread(target=_end_with_input, daemon=True).start()
    sys.exit(main(*sys.argv[1:3]))

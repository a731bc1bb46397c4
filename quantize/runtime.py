"""onnxruntime as quantize uses it: the package's only import of it, one thread, no telemetry.

One thread and a fixed graph give the same bits on the same machine, which the reproducible digest needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

# The official wheels phone home from a background thread unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime

from quantize.errors import BadModel

VERSION: Final[str] = onnxruntime.__version__
BATCH: Final = 64  # rows at a time: memory stays independent of the amount of data
_ERRORS_ONLY: Final = 3

# What makes an x86 build run the graph that ARM will run: S8S8 QDQ fuses there by default, here on demand.
ARM_GRAPH: Final = {"session.qdqisint8allowed": "1"}

OptimizationLevel: Final = onnxruntime.GraphOptimizationLevel


class Tensor(Protocol):
    """What onnxruntime says of an input or output."""

    name: str
    shape: Sequence[int | str]


class Session(Protocol):
    """A loaded model, as far as it is used here (onnxruntime has no types)."""

    def get_inputs(self) -> Sequence[Tensor]:
        """The inputs, in order."""

    def get_outputs(self) -> Sequence[Tensor]:
        """The outputs, in order."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs for these inputs."""


def open_session(
    model: onnx.ModelProto | Path,
    *,
    settings: Mapping[str, str] | None = None,
    level: Any = OptimizationLevel.ORT_ENABLE_ALL,
    optimized: Path | None = None,
) -> Session:
    """Load a model on one thread.

    Args:
        model: a graph in memory, or a file.
        settings: session configuration entries.
        level: how far the graph is optimised.
        optimized: where to write the graph as onnxruntime will run it.

    Raises:
        BadModel: onnxruntime refuses it; says why in its words.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = level
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session: Session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise BadModel(f"onnxruntime cannot load the model: {one_line(error)}") from error
    return session


def run(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run one batch.

    Raises:
        BadModel: onnxruntime raised while running.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:
        raise BadModel(f"onnxruntime cannot run the model: {one_line(error)}") from error


def stream(
    session: Session, inputs: Mapping[str, np.ndarray], batch: int = BATCH
) -> Iterator[dict[str, np.ndarray]]:
    """Run all rows, ``batch`` at a time; yields the outputs of each batch."""
    rows = len(next(iter(inputs.values())))
    for start in range(0, rows, batch):
        yield run(session, {name: values[start : start + batch] for name, values in inputs.items()})


def run_all(session: Session, inputs: Mapping[str, np.ndarray], batch: int = BATCH) -> dict[str, np.ndarray]:
    """Run all rows, ``batch`` at a time, and put the outputs together again."""
    pieces = list(stream(session, inputs, batch))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def one_line(error: BaseException) -> str:
    """An exception's text on one line of bearable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."

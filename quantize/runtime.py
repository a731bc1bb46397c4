"""onnxruntime as quantize uses it: the package's only import of it, one thread a run, no telemetry.

One thread and a fixed graph give the same bits on the same machine, which the reproducible digest needs.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

# The official wheels phone home from a background thread unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime

from edge_agent.contract.bundle import ROWS_APART, ROWS_KEY
from quantize import weights
from quantize.errors import BadModel

VERSION: Final[str] = onnxruntime.__version__
BATCH: Final = 64  # rows at a time: memory stays independent of the amount of data
THREADS: Final = min(2, os.cpu_count() or 1)  # of this process: memory grows with every batch that runs
_SILENT: Final = 4  # what fails is raised; some things are tried to see whether they fail

# What onnxruntime puts before its reason: a file, a line, a function with the types of its parameters.
_SOURCE: Final = re.compile(r"/onnxruntime_src/\S+:\d+ \S[^()]*\(.*?\) (?=[A-Z0-9])")

# What makes an x86 build run the graph that ARM will run: S8S8 QDQ fuses there by default, here on demand.
ARM_GRAPH: Final = {"session.qdqisint8allowed": "1"}

_EXTERNAL_FOLDER: Final = "session.model_external_initializers_file_folder_path"

OptimizationLevel: Final = onnxruntime.GraphOptimizationLevel


class Tensor(Protocol):
    """What onnxruntime says of an input or output."""

    name: str
    shape: Sequence[int | str | None]  # None where a size is not known


class Session(Protocol):
    """A loaded model, as far as it is used here (onnxruntime has no types)."""

    def get_inputs(self) -> Sequence[Tensor]:
        """The inputs, in order."""

    def get_outputs(self) -> Sequence[Tensor]:
        """The outputs, in order."""

    def get_modelmeta(self) -> Any:
        """What the file says of itself; ``custom_metadata_map`` is its ``metadata_props``."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs for these inputs."""


def open_session(
    model: onnx.ModelProto | Path,
    *,
    settings: Mapping[str, str] | None = None,
    level: Any = OptimizationLevel.ORT_ENABLE_ALL,
    optimized: Path | None = None,
    timed: bool = False,
) -> Session:
    """Load a model on one thread.

    Weights that the graph refers to (``weights``) are mapped, not copied.

    Args:
        model: a graph in memory, or a file.
        settings: session configuration entries.
        level: how far the graph is optimised.
        optimized: where to write the graph as onnxruntime will run it.
        timed: whether speed matters more than memory: kernels then keep packed copies of the weights.

    Raises:
        BadModel: onnxruntime refuses it; says why in its words.
        OSError: ``optimized`` cannot be written.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    options.graph_optimization_level = level
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not isinstance(model, Path) and weights.any_shared(model.graph):
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(weights.ROOT))
        if not timed:
            options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session: Session = onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # which prints to stdout and tries the same again
        )
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        if optimized is not None and "serialization failed" in str(error):
            # It could not write the file, and does not say why: Python's own write does.
            optimized.write_bytes(source if isinstance(source, bytes) else Path(source).read_bytes())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(optimized)) from error
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


def batches(inputs: Mapping[str, np.ndarray], batch: int = BATCH) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of at most ``batch`` rows. Rows of other lengths (object arrays) start a new feed."""
    rows = len(next(iter(inputs.values())))
    ragged = [name for name, values in inputs.items() if values.dtype == object]
    start = 0
    while start < rows:
        end = min(start + batch, rows)
        for name in ragged:
            shape = inputs[name][start].shape
            same = (place for place in range(start, end) if inputs[name][place].shape != shape)
            end = next(same, end)
        yield {
            name: np.stack(list(values[start:end])) if name in ragged else values[start:end]
            for name, values in inputs.items()
        }
        start = end


def stream(
    session: Session, inputs: Mapping[str, np.ndarray], batch: int = BATCH
) -> Iterator[dict[str, np.ndarray]]:
    """Run all rows, ``batch`` at a time; yields the outputs of each batch, in order.

    A model with dynamic quantization gets one row at a time, as on the device.

    Two batches run at a time, each on one thread: which core computes a batch does not change its bits.
    """
    if session.get_modelmeta().custom_metadata_map.get(ROWS_KEY) == ROWS_APART:
        batch = 1
    feeds = batches(inputs, batch)
    ahead = list(itertools.islice(feeds, THREADS))
    if len(ahead) < 2:
        yield from (run(session, one) for one in ahead)
        return
    threads = ThreadPoolExecutor(THREADS)
    try:
        waiting = deque(threads.submit(run, session, one) for one in ahead)
        while waiting:
            found = waiting.popleft().result()
            waiting.extend(threads.submit(run, session, one) for one in itertools.islice(feeds, 1))
            yield found
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C waits for the batches that run, not for all


def run_all(session: Session, inputs: Mapping[str, np.ndarray], batch: int = BATCH) -> dict[str, np.ndarray]:
    """Run all rows, ``batch`` at a time, and put the outputs together again.

    Outputs of rows of other lengths are put together along their last dimensions that agree: a step of a
    sequence is then a row.
    """
    pieces = list(stream(session, inputs, batch))
    return {name: _together([piece[name] for piece in pieces]) for name in pieces[0]}


def _together(pieces: list[np.ndarray]) -> np.ndarray:
    if len({piece.shape[1:] for piece in pieces}) == 1:
        return np.concatenate(pieces)
    last = {piece.shape[-1] for piece in pieces}
    if len(last) == 1:
        return np.concatenate([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
    return np.concatenate([piece.ravel() for piece in pieces])


def one_line(error: BaseException) -> str:
    """An exception's text on one line of bearable length, without the places in onnxruntime's sources."""
    text = _SOURCE.sub("", " ".join(str(error).split()))
    return text if len(text) <= 300 else text[:297] + "..."

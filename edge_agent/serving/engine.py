"""The engine: the only import of onnxruntime in the agent.

Invariants:

- telemetry is switched off before onnxruntime is imported: official wheels since 1.29 phone home
  otherwise, and the decision is latched for the process;
- only the CPU provider, no custom operators, no fall-back that re-creates a session behind our back;
- whatever onnxruntime raises becomes an ``EngineError``, also that it is missing or broken: it is imported
  with the first model, so that an agent without it still answers from the rules;
- a row's answer is its own: a model whose file says that rows run together would change each other (dynamic
  quantization takes one scale for a whole run) gets them one at a time.

The default options are the low-jitter profile: one thread that never spins (spinning keeps other cores busy
for nothing), no arena (it only grows), see docs/benchmarks.md.
"""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_agent.config import EngineConfig
from edge_agent.contract.bundle import FOLDED_AT_MOST, ROWS_APART, ROWS_KEY
from edge_agent.errors import EngineError
from edge_agent.serving.tensors import Feeds, Tensor

if TYPE_CHECKING:
    import onnxruntime

try:
    VERSION = importlib.metadata.version("onnxruntime")
except importlib.metadata.PackageNotFoundError:
    VERSION = "not installed"

_LOOPS: Final = (b"Loop", b"Scan", b"SequenceMap")

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Engine:
    """One loaded model, for one caller. ``run`` may be called from any thread, one call at a time."""

    def __init__(
        self, session: onnxruntime.InferenceSession, run_options: Callable[[], onnxruntime.RunOptions]
    ) -> None:
        self._session = session
        self._run_options = run_options
        self.input_names: list[str] = [node.name for node in session.get_inputs()]
        self.output_names: list[str] = [node.name for node in session.get_outputs()]
        metadata = session.get_modelmeta().custom_metadata_map
        self._apart = metadata.get(ROWS_KEY) == ROWS_APART
        self._options: onnxruntime.RunOptions | None = None

    @classmethod
    def load(cls, path: Path, config: EngineConfig) -> Engine:
        """Load a model file.

        Raises:
            EngineError: onnxruntime refuses it, or is not there; says why in its words.
        """
        return cls(*_open(path, config))

    def run(self, feeds: Mapping[str, Tensor]) -> Feeds:
        """Run the model once, or once a row if it wants its rows apart.

        Raises:
            EngineError: onnxruntime raised, or ``abort`` was called meanwhile.
        """
        options = self._run_options()
        options.log_severity_level = 4
        self._options = options
        try:
            if self._apart:
                values = self._one_by_one(feeds, options)
            else:
                values = self._session.run(self.output_names, feeds, options)
        except Exception as error:  # onnxruntime raises its own, unrelated types
            raise EngineError(f"onnxruntime raised: {_first_line(error)}") from error
        finally:
            self._options = None
        return dict(zip(self.output_names, values, strict=True))

    def _one_by_one(self, feeds: Mapping[str, Tensor], options: onnxruntime.RunOptions) -> list[Tensor]:
        rows = len(next(iter(feeds.values())))
        answers = [
            self._session.run(
                self.output_names, {name: tensor[row : row + 1] for name, tensor in feeds.items()}, options
            )
            for row in range(rows)
        ]
        return answers[0] if rows == 1 else [np.concatenate(parts) for parts in zip(*answers, strict=True)]

    def abort(self) -> None:
        """Make a ``run`` that is under way in another thread raise as soon as onnxruntime notices."""
        options = self._options
        if options is not None:
            options.terminate = True

    def warm_up(self, feeds: Mapping[str, Tensor], runs: int) -> float:
        """Run the model ``runs`` times and return the median duration in seconds.

        Raises:
            EngineError: as ``run``.
        """
        durations = []
        for _ in range(max(runs, 1)):
            started = time.perf_counter()
            self.run(feeds)
            durations.append(time.perf_counter() - started)
        return float(np.median(durations))


def may_not_end(path: Path) -> bool:
    """Whether a model has a loop in its graph: how long it runs is then for its input to say.

    ``NodeProto.op_type`` is field 4, a text: its bytes tell, in the graph, in branches and in functions.
    Weights that happen to read so cost a model nothing but its place on the event loop.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(b"\x22" + bytes([len(name)]) + name) >= 0 for name in _LOOPS)


class Sessions:
    """Loaded models by the digest of their file: what several releases have in common is in memory once.

    Two releases that differ in rules or threshold, two lines with the same model under two names: each has an
    ``Engine`` of its own, all of them one session, which onnxruntime lets run in several threads at once. It
    goes with the last of them. Equal weights in different files are not shared: from Python, onnxruntime
    shares initializers only before it packs them, and what counts in memory is the packed copy.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._loaded: weakref.WeakValueDictionary[str, onnxruntime.InferenceSession] = (
            weakref.WeakValueDictionary()
        )
        self._loading = threading.Lock()

    def engine(self, path: Path, digest: str) -> Engine:
        """The engine of a model file, whose bytes were verified against ``digest``.

        Raises:
            EngineError: as ``Engine.load``.
        """
        with self._loading:
            session = self._loaded.get(digest)
            if session is None:
                session, _ = _open(path, self._config)
                self._loaded[digest] = session
        import onnxruntime as ort

        return Engine(session, ort.RunOptions)


def _open(
    path: Path, config: EngineConfig
) -> tuple[onnxruntime.InferenceSession, Callable[[], onnxruntime.RunOptions]]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(f"onnxruntime cannot be imported: {_first_line(error)}; install it") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # what goes wrong is raised, and reported once, by us
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(FOLDED_AT_MOST)
    )
    try:
        for key, value in config.options.items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own, unrelated types
        raise EngineError(
            f"{path.name}: onnxruntime {VERSION} cannot load it: {_first_line(error)}"
        ) from error
    session.disable_fallback()
    return session, ort.RunOptions


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

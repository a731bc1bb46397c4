"""Other frameworks' files to ONNX. The frameworks are extras, imported when such a file comes.

Invariant: nothing in a file is run without ``trust``. A ``.joblib`` or ``.pkl`` is a pickle, which runs
whatever its author wrote, and ``torch.export.load`` unpickles parts of a ``.pt2`` without restriction (torch
2.13); a ``.skops`` file names the types it holds, and those that skops does not know need trust, too.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import onnx

from quantize import runtime
from quantize.errors import BadModel

_OPSETS: Final = {"": 17, "ai.onnx.ml": 3}
# Types of scikit-learn's own networks that skops has not looked at yet. They hold arrays and do nothing.
_HARMLESS: Final = (
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
)
_NORMALITY: Final = "scores"  # the output of skl2onnx that is an outlier detector's decision_function
_PICKLES: Final = (".joblib", ".pkl", ".pickle", ".pt2")


def to_onnx(path: Path, *, trust: bool) -> onnx.ModelProto:
    """Convert a scikit-learn model (``.joblib``, ``.pkl``, ``.skops``) or a PyTorch program (``.pt2``).

    Raises:
        BadModel: the extra is not installed, the file is not trusted or cannot be read or converted.
        OSError: the file cannot be opened.
    """
    with path.open("rb"):
        pass  # the frameworks' own messages for a missing file differ
    if path.suffix in _PICKLES and not trust:
        raise BadModel(
            f"model {path} holds pickles, which run code when read: give --trust if you know its author"
            + ("" if path.suffix == ".pt2" else ", or save it as .skops")
        )
    if path.suffix == ".pt2":
        return _from_torch(path)
    model = _unpickle(path) if path.suffix in _PICKLES else _from_skops(path, trust)
    return _from_sklearn(path, model)


def _unpickle(path: Path) -> Any:
    try:
        import joblib
    except ImportError as error:
        raise _missing(path, "sklearn") from error
    try:
        return joblib.load(path)
    except Exception as error:  # a pickle can raise anything
        raise BadModel(f"model {path} cannot be read: {runtime.one_line(error)}") from error


def _from_skops(path: Path, trust: bool) -> Any:
    try:
        from skops import io as skops
    except ImportError as error:
        raise _missing(path, "sklearn") from error
    try:
        types = skops.get_untrusted_types(file=path)
        unknown = [name for name in types if name not in _HARMLESS]
        if unknown and not trust:
            raise BadModel(
                f"model {path} holds types that skops does not know to be harmless: {', '.join(unknown)}: "
                "give --trust if you know who made it"
            )
        return skops.load(path, trusted=types)
    except BadModel:
        raise
    except Exception as error:  # zip, JSON and skops' own
        raise BadModel(f"model {path} cannot be read: {runtime.one_line(error)}") from error


def _from_sklearn(path: Path, model: Any) -> onnx.ModelProto:
    try:
        from skl2onnx import to_onnx as convert
        from skl2onnx.common.data_types import FloatTensorType
        from sklearn.base import is_outlier_detector
    except ImportError as error:
        raise _missing(path, "sklearn") from error
    width = getattr(model, "n_features_in_", None)
    if width is None:
        raise BadModel(f"model {path} is {type(model).__name__}, expected a fitted scikit-learn estimator")
    options: dict[Any, Any] | None = None
    if hasattr(model, "predict_proba"):
        options = {id(model): {"zipmap": False}}  # a table of probabilities, not a list of dictionaries
    try:
        proto: onnx.ModelProto = convert(
            model,
            initial_types=[("X", FloatTensorType([None, int(width)]))],
            options=options,
            target_opset=_OPSETS,
        )
    except Exception as error:  # one exception type per kind of estimator
        raise BadModel(
            f"model {path} ({type(model).__name__}) cannot be converted: {runtime.one_line(error)}"
        ) from error
    if is_outlier_detector(model):
        _anomaly_score(proto)
    return proto


def _anomaly_score(proto: onnx.ModelProto) -> None:
    """One output: the higher, the further from normal. scikit-learn's ``decision_function`` falls instead."""
    taken = {name for node in proto.graph.node for name in node.output}
    score = "score" if "score" not in taken else "anomaly_score"
    proto.graph.node.append(onnx.helper.make_node("Neg", [_NORMALITY], [score], score))
    (value,) = (value for value in proto.graph.output if value.name == _NORMALITY)
    del proto.graph.output[:]
    value.name = score
    proto.graph.output.append(value)


def _from_torch(path: Path) -> onnx.ModelProto:
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so too late
        import torch
    except ImportError as error:
        raise _missing(path, "torch") from error
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # it deprecates parts of itself while it runs
            program = torch.export.load(path)
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        proto: onnx.ModelProto = exported.model_proto
    except Exception as error:  # torch raises anything
        raise BadModel(f"model {path} cannot be converted: {runtime.one_line(error)}") from error
    return proto


def _missing(path: Path, extra: str) -> BadModel:
    return BadModel(f"model {path} needs an extra: pip install 'edge-inference[{extra}]'")

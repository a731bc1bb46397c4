"""Bodies to tensors and answers to bodies, the same over HTTP and MQTT.

Invariants:

- what comes in is either decoded completely or refused with an ``InvalidInput`` that names the field;
  nothing is allocated by a shape that somebody claims, only by bytes that somebody sent;
- the same answer is the same bytes, whichever transport asks;
- element by element work is done in C: numbers go straight to arrays (``numbers.py``); what that does not
  take goes through msgspec to lists and numpy to arrays; binary tensors need none.

Two bodies are spoken: Open Inference Protocol v2 (JSON, and the binary tensor extension of Triton and KServe,
https://github.com/kserve/open-inference-protocol), and the decision API for people who have a row of numbers.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from edge_agent.contract.manifest import Datatype, Manifest, TensorSpec
from edge_agent.errors import EdgeError, InvalidInput
from edge_agent.serving.decision import confidence, fails
from edge_agent.serving.service import Answer, ModelStatus
from edge_agent.serving.tensors import Tensor, datatype_of, numpy_dtype
from edge_agent.transport import numbers

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"

EXTENSIONS: Final = ("binary_tensor_data", "model_repository", "statistics")
PLATFORM: Final = "onnx_onnxv1"
_STATES: Final = {"ready": "READY", "loading": "LOADING"}  # Triton's words; whatever else is UNAVAILABLE

MAX_DIMENSION: Final = 2**31 - 1  # elements; far beyond any body, and products of it stay printable
MAX_RANK: Final = 8  # dimensions of a tensor; onnxruntime's own models rarely pass 5
MAX_TENSORS: Final = 64  # tensors of one request; a manifest names no more
MAX_ID: Final = 256  # characters of an echoed id

_FLOAT32: Final = numpy_dtype(Datatype.FP32)
_SAFE_SQUARES: Final = 1e76  # numbers whose squares add up to less are below 1e38, which float32 holds
_MISSING_HINT: Final = "NaN and Infinity are not JSON: write null for a missing value"


# ----------------------------------------------------------------------------------------------------
# Requests


class InferRequest(msgspec.Struct, frozen=True, gc=False):
    """An Open Inference Protocol request, decoded.

    Attributes:
        id: to be echoed.
        inputs: tensors by name, of the element type that the request declares.
        deadline: seconds from now, or None.
        outputs: the names asked for, or None for all.
        binary: output names to send as raw bytes; None means all of them.
        source: what the rows come from, for alarms over time.
    """

    id: str | None
    inputs: dict[str, Tensor]
    deadline: float | None
    outputs: tuple[str, ...] | None
    binary: frozenset[str] | None
    source: str = ""


class PredictRequest(msgspec.Struct, frozen=True, gc=False):
    """A decision request, decoded. ``many`` tells a list of rows from one row."""

    id: str | None
    model: str | None
    version: str | None
    inputs: dict[str, Tensor]
    deadline: float | None
    many: bool
    source: str = ""


class Body(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a response. ``json_size`` is set for binary tensors: the length of the JSON before them."""

    data: bytes
    json_size: int | None = None


_Id = Annotated[str, msgspec.Meta(max_length=MAX_ID)]
_Parameters = dict[str, str | int | float | bool]
_Row = list[float | None]


class _Input(msgspec.Struct):
    name: str
    shape: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]], msgspec.Meta(max_length=MAX_RANK)
    ]
    datatype: str
    parameters: _Parameters = {}
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters = {}


class _Infer(msgspec.Struct):
    inputs: Annotated[list[_Input], msgspec.Meta(max_length=MAX_TENSORS)]
    id: _Id | None = None
    parameters: _Parameters = {}
    outputs: Annotated[list[_Output], msgspec.Meta(max_length=MAX_TENSORS)] | None = None


class _PredictRow(msgspec.Struct):
    """The common case: one row by position, decoded in one pass."""

    features: _Row
    id: _Id | None = None
    model: str | None = None
    version: str | None = None
    timeout_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    source: _Id = ""


class _Predict(msgspec.Struct):
    features: msgspec.Raw
    id: _Id | None = None
    model: str | None = None
    version: str | None = None
    timeout_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    source: _Id = ""


# A stranger's 1e300 is refused, which is no news; entering ``numpy.errstate`` costs more than the rest of it.
warnings.filterwarnings("ignore", "overflow encountered in dot", RuntimeWarning)

_INFER: Final = msgspec.json.Decoder(_Infer)
_PREDICT_ROW: Final = msgspec.json.Decoder(_PredictRow)
_PREDICT: Final = msgspec.json.Decoder(_Predict)
_ROW: Final = msgspec.json.Decoder(_Row)
_ROWS: Final = msgspec.json.Decoder(list[_Row])
_NAMED: Final = msgspec.json.Decoder(dict[str, float | None])
_NAMED_ROWS: Final = msgspec.json.Decoder(list[dict[str, float | None]])


def _nested(element: Any) -> tuple[msgspec.json.Decoder[Any], ...]:
    """Decoders of data nested 1, 2, ... MAX_RANK deep."""
    decoders = []
    for _ in range(MAX_RANK):
        element = list[element]
        decoders.append(msgspec.json.Decoder(element))
    return tuple(decoders)


_FLOATS: Final = _nested(float | None)  # null is a missing value, NaN
_INTS: Final = _nested(int)
_BOOLS: Final = _nested(bool)


def decode_infer(body: bytes, json_size: int | None, manifest: Callable[[], Manifest]) -> InferRequest:
    """Decode an Open Inference Protocol request.

    Args:
        body: JSON, or JSON followed by raw tensors.
        json_size: ``Inference-Header-Content-Length`` where given; 0: the body is one raw tensor.
        manifest: of the model asked; looked at for raw requests and requested outputs only.

    Raises:
        InvalidInput: names the field, what was expected and what came.
        UnknownModel: by ``manifest``.
    """
    if json_size == 0:
        return _raw_request(body, manifest())
    if json_size is not None and json_size > len(body):
        raise InvalidInput(
            f"Inference-Header-Content-Length is {json_size}, the whole body has {len(body)} bytes"
        )
    if json_size is None:
        plain = numbers.only_input(body)
        if (
            plain is not None
            and plain.datatype == "FP32"
            and len(plain.shape) <= MAX_RANK
            and min(plain.shape, default=-1) > 0
            and math.prod(plain.shape) == plain.numbers.size
        ):
            array = _cast(plain.numbers, _FLOAT32, "inputs[0].data")
            return InferRequest(None, {plain.name: array.reshape(plain.shape)}, None, None, frozenset())
    head = body if json_size is None else body[:json_size]
    request = _decode(_INFER, head, "body")
    inputs: dict[str, Tensor] = {}
    offset = len(head)
    for index, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise InvalidInput(f"inputs[{index}].name: {tensor.name[:80]!r} is given twice")
        where = f"inputs[{index}]"
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            inputs[tensor.name] = _from_json(tensor, where)
        else:
            inputs[tensor.name], offset = _from_binary(tensor, size, body, offset, where)
    if offset != len(body):
        raise InvalidInput(f"body: {len(body) - offset} bytes after the last tensor, expected none")
    outputs, binary = _requested(request, manifest)
    source = _source(request.parameters) if request.parameters else ""
    return InferRequest(request.id, inputs, _timeout(request.parameters), outputs, binary, source)


def decode_predict(body: bytes, manifest: Callable[[str | None, str | None], Manifest]) -> PredictRequest:
    """Decode a decision request: ``{"features": ...}`` or a bare list.

    ``features`` is one row by position, one row by name, or a list of either. null is a missing value.

    Raises:
        InvalidInput: names the field, what was expected and what came.
        UnknownModel: by ``manifest``.
    """
    values = numbers.only_field(body, "features")
    if values is not None:
        spec = feature_input(manifest(None, None))
        array = _cast(values, numpy_dtype(spec.datatype), "features")
        return PredictRequest(
            None, None, None, {spec.name: array.reshape(-1, array.shape[-1])}, None, array.ndim == 2
        )
    try:
        row = _PREDICT_ROW.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _decode_any_predict(body, manifest)
    spec = feature_input(manifest(row.model, row.version))
    array = _to_array(row.features, numpy_dtype(spec.datatype), "features")
    inputs = {spec.name: array.reshape(1, -1)}
    return PredictRequest(
        row.id, row.model, row.version, inputs, _seconds(row.timeout_ms), many=False, source=row.source
    )


def feature_input(manifest: Manifest) -> TensorSpec:
    """The one input that takes rows of features.

    Raises:
        InvalidInput: the model has no such input; says where to ask instead.
    """
    spec = manifest.inputs[0]
    if len(manifest.inputs) != 1 or len(spec.shape) != 2 or spec.datatype is Datatype.BOOL:
        raise InvalidInput(
            f"model {manifest.name} does not take rows of features; ask /v2/models/{manifest.name}/infer"
        )
    return spec


def _decode_any_predict(
    body: bytes, manifest: Callable[[str | None, str | None], Manifest]
) -> PredictRequest:
    if body.lstrip()[:1] == b"[":
        request = _Predict(features=msgspec.Raw(body))
        where = "body"
    else:
        request = _decode(_PREDICT, body, "body")
        where = "features"
    spec = feature_input(manifest(request.model, request.version))
    dtype = numpy_dtype(spec.datatype)
    features = bytes(request.features)
    values = numbers.rows(features)
    if values is not None:
        array = _cast(values, dtype, where)
        rows = array.reshape(-1, array.shape[-1])
        return PredictRequest(
            request.id, request.model, request.version, {spec.name: rows}, _seconds(request.timeout_ms),
            array.ndim == 2, request.source,
        )  # fmt: skip
    many = True
    opening = features[:256].translate(None, b" \t\r\n")[:2]
    if opening in (b"[[", b"[]"):
        array = _to_array(_decode(_ROWS, features, where), dtype, where)
    elif opening == b"[{":
        rows = _decode(_NAMED_ROWS, features, where)
        array = _to_array(
            [_by_name(row, spec, f"{where}[{index}]") for index, row in enumerate(rows)], dtype, where
        )
    elif opening[:1] == b"{":
        many = False
        array = _to_array([_by_name(_decode(_NAMED, features, where), spec, where)], dtype, where)
    else:
        many = False
        array = _to_array([_decode(_ROW, features, where)], dtype, where)
    if array.ndim != 2:
        raise InvalidInput(f"{where}: expected rows of {spec.shape[1]} numbers, got {array.shape[0]} rows")
    return PredictRequest(
        request.id, request.model, request.version, {spec.name: array}, _seconds(request.timeout_ms), many,
        request.source,
    )  # fmt: skip


def _by_name(row: dict[str, float | None], spec: TensorSpec, where: str) -> _Row:
    names = spec.features
    if names is None:
        raise InvalidInput(f"{where}: this model's features have no names, give a list of {spec.shape[1]}")
    if len(row) != len(names) or any(name not in row for name in names):
        for name in row:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InvalidInput(f"{where}: unknown feature {name[:80]!r}{hint}")
        missing = [name for name in names if name not in row]
        raise InvalidInput(
            f"{where}: {len(missing)} of {len(names)} features are absent, the first is {missing[0]!r}; "
            "null says that a value is missing"
        )
    return [row[name] for name in names]


def _from_json(tensor: _Input, where: str) -> Tensor:
    if tensor.data is msgspec.UNSET:
        raise InvalidInput(f"{where}.data is absent")
    dtype = _dtype(tensor.datatype, where)
    decoders = _FLOATS if dtype.kind == "f" else _BOOLS if dtype.kind == "b" else _INTS
    data = bytes(tensor.data)
    # Flat or nested as deep as the shape: the first characters tell, and the decoder proves it.
    depth = len(tensor.shape) if data[:256].translate(None, b" \t\r\n")[:2] == b"[[" else 1
    if depth == 0:
        raise InvalidInput(f"{where}.shape: expected at least one dimension")
    numbers_of_it = numbers.rows(data) if dtype.kind == "f" and depth <= 2 else None
    if numbers_of_it is not None and numbers_of_it.ndim == depth:
        array = _cast(numbers_of_it, dtype, f"{where}.data")
    else:
        values = _decode(decoders[depth - 1], data, f"{where}.data")
        array = _to_array(values, dtype, f"{where}.data")
    count = math.prod(tensor.shape)
    if array.size != count or (depth > 1 and list(array.shape) != tensor.shape):
        got = f"shape {list(array.shape)}" if depth > 1 else f"{array.size} elements"
        raise InvalidInput(f"{where}.data: shape {tensor.shape} wants {count} elements, got {got}")
    return array.reshape(tensor.shape)


def _from_binary(tensor: _Input, size: object, body: bytes, offset: int, where: str) -> tuple[Tensor, int]:
    field = f"{where}.parameters.binary_data_size"
    if tensor.data is not msgspec.UNSET:
        raise InvalidInput(f"{where}: has data and binary_data_size, expected one of them")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InvalidInput(f"{field}: expected a number of bytes, got {str(size)[:80]!r}")
    if size > len(body) - offset:
        raise InvalidInput(f"{field}: {size} bytes, the body has {len(body) - offset} left for it")
    dtype = _dtype(tensor.datatype, where)
    count = math.prod(tensor.shape)
    if size != count * dtype.itemsize:
        raise InvalidInput(
            f"{field}: {size} bytes, shape {tensor.shape} of {tensor.datatype} wants {count * dtype.itemsize}"
        )
    return np.frombuffer(body, dtype, count, offset).reshape(tensor.shape), offset + size


def _raw_request(body: bytes, manifest: Manifest) -> InferRequest:
    """The whole body is the one tensor of a model with at most one more varying dimension: batch 1."""
    spec = manifest.inputs[0]
    rest = spec.shape[1:] if spec.shape[:1] == (-1,) else spec.shape
    if len(manifest.inputs) != 1 or rest.count(-1) > 1:
        raise InvalidInput(
            f"Inference-Header-Content-Length: 0 sends one raw tensor, model {manifest.name} takes "
            f"{len(manifest.inputs)} of varying sizes: send a JSON header"
        )
    dtype = numpy_dtype(spec.datatype)
    fixed = math.prod(size for size in rest if size != -1) * dtype.itemsize
    if len(body) % fixed or (-1 not in rest and len(body) != fixed):
        raise InvalidInput(
            f"body: {len(body)} bytes, one row of {spec.name!r} has {fixed} "
            f"({spec.datatype.value} {list(rest)})"
        )
    shape = [len(body) // fixed if size == -1 else size for size in rest]
    array = np.frombuffer(body, dtype).reshape([1, *shape] if spec.shape[:1] == (-1,) else shape)
    return InferRequest(None, {spec.name: array}, None, None, None)


def _requested(
    request: _Infer, manifest: Callable[[], Manifest]
) -> tuple[tuple[str, ...] | None, frozenset[str] | None]:
    every = request.parameters.get("binary_data_output", False) is True
    if not request.outputs:
        return None, None if every else frozenset()
    known = {spec.name for spec in manifest().outputs}
    names: list[str] = []
    for index, output in enumerate(request.outputs):
        if output.name not in known:
            raise InvalidInput(
                f"outputs[{index}].name: {output.name[:80]!r} is not an output, the model has "
                f"{', '.join(sorted(known))}"
            )
        if output.name in names:
            raise InvalidInput(f"outputs[{index}].name: {output.name!r} is asked for twice")
        if "shared_memory_region" in output.parameters:
            raise InvalidInput(f"outputs[{index}].parameters: shared memory is not offered here")
        names.append(output.name)
    binary = frozenset(
        output.name for output in request.outputs if output.parameters.get("binary_data", every) is True
    )
    return tuple(names), binary


def _dtype(datatype: str, where: str) -> np.dtype[Any]:
    try:
        return numpy_dtype(Datatype(datatype))
    except ValueError:
        known = ", ".join(item.value for item in Datatype)
        raise InvalidInput(f"{where}.datatype: {datatype[:80]!r}, expected one of {known}") from None


def _timeout(parameters: _Parameters) -> float | None:
    """Triton's ``timeout`` parameter, microseconds."""
    value = parameters.get("timeout")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InvalidInput(f"parameters.timeout: expected microseconds above 0, got {str(value)[:80]!r}")
    return value * 1e-6


def _source(parameters: _Parameters) -> str:
    """What the rows come from, where the request says so; a sequence of Triton's is such a source."""
    value = parameters.get("source")
    if value is None:
        sequence = parameters.get("sequence_id", 0)
        return "" if sequence in (0, "") else str(sequence)[:MAX_ID]
    if not isinstance(value, str) or len(value) > MAX_ID:
        raise InvalidInput(
            f"parameters.source: expected a text of at most {MAX_ID} characters, got {str(value)[:80]!r}"
        )
    return value


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * 1e-3


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes, where: str) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        # "Expected `float | null`, got `str` - at `$[1]`" -> "features[1]: expected ..."
        what, _, path = str(error).partition(" - at `")
        field = path.rstrip("`").replace("$", where, 1) if path else where
        what = what.replace("`", "")
        raise InvalidInput(f"{field.removeprefix('body.')}: {what[:1].lower()}{what[1:]}") from None
    except msgspec.DecodeError as error:
        raise InvalidInput(f"{where}: {_why_malformed(data, str(error))}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidInput(f"{where}: nested too deeply") from None


def _why_malformed(data: bytes, message: str) -> str:
    if not data.strip():
        return "empty, expected JSON"
    if any(token in data for token in (b"NaN", b"nan", b"Infinity", b"-inf")):
        return f"not JSON: {_MISSING_HINT}"
    return "not JSON: " + message.removeprefix("JSON is malformed: ")


def _cast(values: numbers.Numbers, dtype: np.dtype[Any], where: str) -> Tensor:
    """Numbers as the model's element type."""
    if dtype is _FLOAT32:
        flat = values if values.ndim == 1 else values.reshape(-1)
        # One multiplication a number, in C, says that all of them fit.
        try:
            if flat.dot(flat) < _SAFE_SQUARES:
                return values.astype(_FLOAT32)
        except RuntimeWarning:  # where warnings are errors; contextlib.suppress has a cost
            pass
    return _to_array(values, dtype, where)


def _to_array(values: Any, dtype: np.dtype[Any], where: str) -> Tensor:
    try:
        # A value that float32 cannot hold becomes infinity, which no JSON can say: it is caught below.
        with np.errstate(over="ignore"):
            array = np.array(values, dtype)
    except OverflowError as error:
        raise InvalidInput(f"{where}: {error}") from None
    except (ValueError, TypeError):
        raise InvalidInput(f"{where}: the rows have different lengths") from None
    if dtype.kind == "f" and np.isinf(array).any():
        raise InvalidInput(f"{where}: a value is too large for {datatype_of(dtype).value}")
    return array


# ----------------------------------------------------------------------------------------------------
# Answers


def _encode_ours(value: Any) -> Any:
    if isinstance(value, str):  # Version and Digest
        return str(value)
    raise NotImplementedError(type(value))


_ENCODER: Final = msgspec.json.Encoder(enc_hook=_encode_ours)
_DECISIONS: Final = ("pass", "fail")  # by whether it failed


class _Decided(msgspec.Struct, omit_defaults=True):
    """One row's answer of the decision API. Numbers that do not exist are null."""

    decision: str | None
    score: float | None
    threshold: float | None
    confidence: float | None
    source: str
    reason: str
    model: str
    version: str
    latency_ms: float
    outputs: dict[str, Any] | None = None  # of models that decide nothing
    id: str | None = None


class _Tensor(msgspec.Struct):
    """An output of the Open Inference Protocol: in JSON, or as bytes that follow it."""

    name: str
    shape: tuple[int, ...]
    datatype: Datatype
    parameters: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class _Inferred(msgspec.Struct):
    """A response of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str | msgspec.UnsetType
    parameters: dict[str, str]
    outputs: list[_Tensor]


def encode_infer(answer: Answer, request: InferRequest) -> Body:
    """An answer as Open Inference Protocol v2. Non-finite numbers are null in JSON and kept in binary."""
    tensors: list[_Tensor] = []
    raw: list[bytes] = []
    wanted, binary = request.outputs, request.binary
    for name, array in answer.outputs.items():
        if wanted is not None and name not in wanted:
            continue
        datatype = datatype_of(array.dtype)
        if binary is None or name in binary:
            data = array.tobytes() if array.dtype.isnative else array.astype(numpy_dtype(datatype)).tobytes()
            tensors.append(_Tensor(name, array.shape, datatype, {"binary_data_size": len(data)}))
            raw.append(data)
        else:
            tensors.append(_Tensor(name, array.shape, datatype, msgspec.UNSET, array.ravel().tolist()))
    head = _Inferred(
        answer.model,
        answer.version,
        msgspec.UNSET if request.id is None else request.id,
        {"source": answer.source, "reason": answer.reason},
        tensors,
    )
    text = _ENCODER.encode(head)
    if not raw and binary is not None:
        return Body(text)
    return Body(b"".join((text, *raw)), len(text))


def encode_predict(answer: Answer, request: PredictRequest) -> Body:
    """An answer of the decision API: one object for one row, ``{"results": [...]}`` for a list of rows."""
    decision, scores = answer.decision, answer.scores
    source, reason, model, version = answer.source, answer.reason, answer.model, answer.version
    latency = round(answer.seconds * 1e3, 4)
    if decision is not None and scores is not None:
        threshold = decision.threshold
        results = [
            _Decided(
                _DECISIONS[fails(score, decision)], score, threshold, confidence(score, decision),
                source, reason, model, version, latency, None, request.id,
            )
            for score in scores
        ]  # fmt: skip
    else:
        results = [
            _Decided(
                None, None, None, None, source, reason, model, version, latency,
                {name: array[row].tolist() for name, array in answer.outputs.items()}, request.id,
            )
            for row in range(next(iter(request.inputs.values())).shape[0])
        ]  # fmt: skip
    return Body(_ENCODER.encode({"results": results} if request.many else results[0]))


def encode_json(value: Any) -> bytes:
    """Any plain value as JSON."""
    return _ENCODER.encode(value)


def encode_error(error: EdgeError | str) -> bytes:
    """``{"error": "<one sentence>"}``, the form of every refusal."""
    return _ENCODER.encode({"error": str(error)})


# ----------------------------------------------------------------------------------------------------
# Metadata


def server_metadata(version: str) -> dict[str, Any]:
    """Body of ``GET /v2``."""
    return {"name": "edge-agent", "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(manifest: Manifest) -> dict[str, Any]:
    """Body of ``GET /v2/models/{model}``; varying dimensions are -1."""
    return {
        "name": manifest.name,
        "versions": [str(manifest.version)],
        "platform": PLATFORM,
        "inputs": [_spec(spec) for spec in manifest.inputs],
        "outputs": [_spec(spec) for spec in manifest.outputs],
    }


def repository_index(statuses: Sequence[ModelStatus], *, only_ready: bool = False) -> list[dict[str, Any]]:
    """Body of ``POST /v2/repository/index``, with what this agent knows beyond the protocol."""
    index = [
        {
            "name": status.name,
            "version": status.version,
            "state": _STATES.get(status.state, "UNAVAILABLE"),
            "reason": status.reason or ("" if status.state == "ready" else status.state),
            "digest": status.digest,
            "drifting": status.drifting,
        }
        for status in statuses
    ]
    return [entry for entry in index if not only_ready or entry["state"] == "READY"]


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}

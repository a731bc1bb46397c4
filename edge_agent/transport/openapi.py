"""``GET /openapi.json``: every route in OpenAPI 3.1, written by hand.

Invariant: the paths here are the paths of ``routes.py`` that the port answers (a test compares them), and
every status that a route can give is listed.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from edge_agent.contract.manifest import Datatype
from edge_agent.contract.metric_names import MODEL_STATES, REASONS, SOURCES
from edge_agent.transport import codec

_Schema = dict[str, Any]


@functools.cache
def openapi_document(version: str) -> bytes:
    """The document, as JSON. ``version`` is the agent's."""
    return codec.encode_json(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "edge-agent",
                "version": version,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
                "description": (
                    "Inference on this device. POST /predict takes a row of numbers and says pass or fail; "
                    "/v2 is the Open Inference Protocol with binary tensors, as stock clients speak it. "
                    "Every answer says who gave it (source: model or fallback) and why. Every refusal is one "
                    'sentence: {"error": "..."}. Commands (install, rollback, load, unload) are answered '
                    "only on the control socket in the store, through edge-agent."
                ),
            },
            "servers": [{"url": "/"}],
            "tags": [
                {"name": "decisions", "description": "For people who have a row of numbers"},
                {"name": "inference", "description": "Open Inference Protocol v2"},
                {"name": "health", "description": "For probes; never guarded"},
                {"name": "repository", "description": "What is loaded"},
                {"name": "watching", "description": "For technicians and Prometheus"},
            ],
            "security": [{}, {"token": []}, {"certificate": []}],
            "paths": _paths(),
            "components": {
                "securitySchemes": {
                    "token": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "Where http.tokens_file is set; made by: edge-agent token NAME",
                    },
                    "certificate": {
                        "type": "mutualTLS",
                        "description": "Where http.tls.client_ca is set",
                    },
                },
                "schemas": _SCHEMAS,
                "responses": _RESPONSES,
                "parameters": _PARAMETERS,
            },
        }
    )


# ----------------------------------------------------------------------------------------------------
# Words


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Any) -> _Schema:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _list(items: _Schema, **limits: Any) -> _Schema:
    return {"type": "array", "items": items, **limits}


def _or_null(schema: _Schema) -> _Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _text(description: str = "", **more: Any) -> _Schema:
    return {"type": "string", **({"description": description} if description else {}), **more}


def _number(description: str = "", **more: Any) -> _Schema:
    return {"type": "number", **({"description": description} if description else {}), **more}


def _count(description: str = "") -> _Schema:
    return {"type": "integer", "minimum": 0, **({"description": description} if description else {})}


_FLAG: Final[_Schema] = {"type": "boolean"}
_VALUE: Final[_Schema] = {"type": ["number", "null"], "description": "null: a missing value"}
_ROW: Final = _list(_VALUE)
_NAMED_ROW: Final[_Schema] = {"type": "object", "additionalProperties": _VALUE}
_PARAMETER_MAP: Final[_Schema] = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_ID: Final = _text("echoed in the answer", maxLength=codec.MAX_ID)
_DATATYPE: Final = _text(enum=[datatype.value for datatype in Datatype])
_BYTES: Final[dict[str, _Schema]] = {codec.BINARY: {}}

# A tensor's numbers, flat or nested as deep as the shape.
_DATA: Final[_Schema] = {
    "type": "array",
    "description": "row-major, flat or nested like the shape; null in a float tensor: a missing value",
    "items": {"type": ["number", "boolean", "null", "array"]},
}
_DURATION: Final = _object(("count", "ns"), count=_count(), ns=_count("nanoseconds, all together"))

_SCHEMAS: Final[dict[str, _Schema]] = {
    "Error": _object(("error",), error=_text("one sentence: what, which, expected, got")),
    "PredictRequest": {
        "anyOf": [
            _object(
                ("features",),
                features={
                    "description": "one row, or a list of rows; by position, or by feature name",
                    "anyOf": [
                        _ROW,
                        _NAMED_ROW,
                        _list(_list(_VALUE)),
                        _list({"type": "object", "additionalProperties": _VALUE}),
                    ],
                },
                id=_or_null(_ID),
                model=_or_null(_text("needed where several models are served")),
                version=_or_null(_text("refuse to answer with another version")),
                timeout_ms=_or_null(_number("deadline from now", exclusiveMinimum=0)),
                source=_text(
                    "the machine that the row is from, for alarms over time", maxLength=codec.MAX_ID
                ),
            ),
            _list(_list(_VALUE)),
            _list({"type": "object", "additionalProperties": _VALUE}),
            _ROW,
        ],
    },
    "Prediction": _object(
        (
            "decision",
            "score",
            "threshold",
            "confidence",
            "source",
            "reason",
            "model",
            "version",
            "latency_ms",
        ),
        decision=_or_null(
            _text("null: this model decides nothing, see outputs", enum=["pass", "fail", None])
        ),
        score=_or_null(_number()),
        threshold=_or_null(_number("a score above it is a fail")),
        confidence=_or_null(_number("0.5 to 1", minimum=0, maximum=1)),
        source=_text("who answered", enum=list(SOURCES)),
        reason=_text("why it was the rules; ok: the model", enum=list(REASONS)),
        model=_text(),
        version=_text(),
        latency_ms=_number("from the decoded request to the answer", minimum=0),
        outputs={"type": "object", "description": "of models that decide nothing: output name to values"},
        id=_text("as sent"),
    ),
    "Predictions": _object(("results",), results=_list(_ref("Prediction"))),
    "InferRequest": _object(
        ("inputs",),
        id=_or_null(_ID),
        parameters={
            **_PARAMETER_MAP,
            "description": "timeout (microseconds), binary_data_output, source (the machine that the rows "
            "are from, for alarms over time); others are ignored",
        },
        inputs=_list(
            _object(
                ("name", "shape", "datatype"),
                name=_text(),
                shape=_list(
                    {"type": "integer", "minimum": 0, "maximum": codec.MAX_DIMENSION}, maxItems=codec.MAX_RANK
                ),
                datatype=_DATATYPE,
                parameters={
                    **_PARAMETER_MAP,
                    "description": "binary_data_size: the tensor follows the JSON as raw bytes",
                },
                data=_DATA,
            ),
            maxItems=codec.MAX_TENSORS,
        ),
        outputs={
            **_list(_object(("name",), name=_text(), parameters=_PARAMETER_MAP), maxItems=codec.MAX_TENSORS),
            "type": ["array", "null"],
            "description": "absent: every output",
        },
    ),
    "InferResponse": _object(
        ("model_name", "model_version", "parameters", "outputs"),
        model_name=_text(),
        model_version=_text(),
        id=_text(),
        parameters=_object(
            ("source", "reason"), source=_text(enum=list(SOURCES)), reason=_text(enum=list(REASONS))
        ),
        outputs=_list(
            _object(
                ("name", "shape", "datatype"),
                name=_text(),
                shape=_list(_count()),
                datatype=_DATATYPE,
                parameters=_object(binary_data_size=_count("bytes, after the JSON")),
                data=_list({"type": ["number", "boolean", "null"]}),
            )
        ),
    ),
    "Live": _object(("live",), live=_FLAG),
    "Ready": _object(("ready",), ready=_FLAG),
    "ModelReady": _object(("name", "ready"), name=_text(), ready=_FLAG),
    "ServerMetadata": _object(
        ("name", "version", "extensions"), name=_text(), version=_text(), extensions=_list(_text())
    ),
    "TensorMetadata": _object(
        ("name", "datatype", "shape"),
        name=_text(),
        datatype=_DATATYPE,
        shape=_list({"type": "integer", "minimum": -1, "description": "-1 varies"}),
    ),
    "ModelMetadata": _object(
        ("name", "versions", "platform", "inputs", "outputs"),
        name=_text(),
        versions=_list(_text()),
        platform=_text(),
        inputs=_list(_ref("TensorMetadata")),
        outputs=_list(_ref("TensorMetadata")),
    ),
    "RepositoryIndex": _list(
        _object(
            ("name", "version", "state", "reason"),
            name=_text(),
            version=_or_null(_text()),
            state=_text(enum=["READY", "LOADING", "UNAVAILABLE"]),
            reason=_text(),
            digest=_or_null(_text()),
            drifting={"type": ["boolean", "null"], "description": "null: no window is full yet"},
        )
    ),
    "Statistics": _object(
        ("model_stats",),
        model_stats=_list(
            _object(
                ("name", "version", "inference_count", "execution_count", "inference_stats", "batch_stats"),
                name=_text(),
                version=_text(),
                last_inference=_count("milliseconds since 1970; 0: never"),
                inference_count=_count("rows answered"),
                execution_count=_count("runs of the engine"),
                fallback_count=_count("rows answered by the rules"),
                inference_stats={"type": "object", "additionalProperties": _DURATION},
                batch_stats=_list({"type": "object"}),
            )
        ),
    ),
    "Status": _object(
        ("device", "agent", "models", "updates", "health"),
        device=_text(),
        agent=_text("its version"),
        uptime_seconds=_number(minimum=0),
        models=_list(
            _object(
                ("name", "state"),
                name=_text(),
                version=_or_null(_text()),
                digest=_or_null(_text()),
                state=_text(enum=list(MODEL_STATES)),
                reason=_text(),
                split=_or_null({"type": "object", "description": "how a candidate and the release do, A/B"}),
                alarms={
                    "type": "object",
                    "description": "active alarms over time, by source",
                    "additionalProperties": _list(_text()),
                },
            )
        ),
        updates={"type": "object", "description": "where every update stands; edge-agent status --json"},
        health=_object(
            ("live", "ready", "degraded", "reasons"),
            live=_FLAG,
            ready=_FLAG,
            degraded=_FLAG,
            reasons=_list(_text("a sentence for people, most urgent first")),
        ),
    ),
}


def _error(description: str, **headers: str) -> _Schema:
    response: _Schema = {"description": description, "content": {codec.JSON: {"schema": _ref("Error")}}}
    if headers:
        response["headers"] = {
            name.replace("_", "-"): {"schema": {"type": "string"}, "description": text, "required": True}
            for name, text in headers.items()
        }
    return response


_RESPONSES: Final[dict[str, _Schema]] = {
    "400": _error("The request cannot be understood; the sentence names the field"),
    "401": _error("No token or certificate of a client of this device", WWW_Authenticate="Bearer"),
    "403": _error("Answered only on the control socket of the store"),
    "404": _error("No such path, model or version"),
    "408": _error("The request was not complete in time; the connection is closed"),
    "413": _error("The body is over http.max_body_bytes"),
    "415": _error("A Content-Encoding is not taken"),
    "429": _error("Too many requests of this client, or too many rows wait", Retry_After="seconds"),
    "431": _error("Header too large; the connection is closed"),
    "500": _error("A fault of the agent; its log has more"),
    "503": _error(
        "Nothing can answer now: not even the rules, or too many connections", Retry_After="seconds"
    ),
    "504": _error("The deadline passed and no rules could answer"),
}

_PARAMETERS: Final[dict[str, _Schema]] = {
    "model": {"name": "model", "in": "path", "required": True, "schema": _text(minLength=1)},
    "version": {"name": "version", "in": "path", "required": True, "schema": _text(minLength=1)},
    "json_size": {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "description": "bytes of JSON before the raw tensors; 0: the body is one raw tensor",
        "schema": {"type": "integer", "minimum": 0},
    },
}


# ----------------------------------------------------------------------------------------------------
# Paths

_ALWAYS: Final = ("400", "408", "431", "500", "503")  # the connection itself, whatever the path


def _operation(
    identifier: str,
    tag: str,
    summary: str,
    ok: _Schema | None,
    *refusals: str,
    parameters: tuple[str, ...] = (),
    body: _Schema | None = None,
    content: dict[str, Any] | None = None,
    guarded: bool = True,
    description: str = "",
) -> _Schema:
    answer: _Schema = {"description": "Yes" if ok is None else "The answer"}
    if content is None:
        content = {codec.JSON: {"schema": ok}}
    answer["content"] = content
    statuses = sorted({*_ALWAYS, *refusals, *(("401", "429") if guarded else ())})
    operation: _Schema = {
        "operationId": identifier,
        "tags": [tag],
        "summary": summary,
        "responses": {
            "200": answer,
            **{status: {"$ref": f"#/components/responses/{status}"} for status in statuses},
        },
    }
    if description:
        operation["description"] = description
    if not guarded:
        operation["security"] = []
    if parameters:
        operation["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in parameters]
    if body is not None:
        operation["requestBody"] = body
    return operation


def _paths() -> dict[str, _Schema]:
    paths: dict[str, _Schema] = {
        "/predict": {
            "post": _operation(
                "predict",
                "decisions",
                "Pass or fail for one row, or for many",
                None,
                "404",
                "413",
                "415",
                "504",
                body={
                    "required": True,
                    "content": {
                        codec.JSON: {
                            "schema": _ref("PredictRequest"),
                            "examples": {
                                "one row": {"value": {"features": [0.1, 0.2, None], "id": "part-17"}}
                            },
                        }
                    },
                },
                content={
                    codec.JSON: {
                        "schema": {"anyOf": [_ref("Prediction"), _ref("Predictions")]},
                    }
                },
                description='One row in, one object out; a list of rows in, {"results": [...]} out.',
            )
        },
        "/v2": {
            "get": _operation("serverMetadata", "inference", "What this server is", _ref("ServerMetadata"))
        },
        "/v2/health/live": {
            "get": _operation("live", "health", "The process makes progress", _ref("Live"), guarded=False)
        },
        "/v2/health/ready": {
            "get": _with_not_ready(
                _operation(
                    "ready",
                    "health",
                    "Every model can answer, by itself or by its rules",
                    _ref("Ready"),
                    guarded=False,
                ),
                "Ready",
            )
        },
        "/v2/models/stats": {
            "get": _operation("statistics", "inference", "Counts of every model", _ref("Statistics"))
        },
        "/v2/repository/index": {
            "post": _operation(
                "repositoryIndex",
                "repository",
                "Every model and its state",
                _ref("RepositoryIndex"),
                "413",
                "415",
                body={
                    "required": False,
                    "content": {codec.JSON: {"schema": _object(ready=_FLAG)}},
                },
            )
        },
        "/status": {
            "get": _operation(
                "status", "watching", "Models, updates and health, for the page", _ref("Status")
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "watching",
                "Prometheus text exposition",
                None,
                content={"text/plain": {"schema": {"type": "string"}}},
            )
        },
        "/": _page("page", "The technician's page"),
        "/docs": _page("docs", "This document, for people"),
        "/openapi.json": {
            "get": _operation(
                "openapi", "watching", "This document", {"type": "object"}, "429", guarded=False
            )
        },
    }
    for prefix, parameters, suffix in (
        ("/v2/models/{model}", ("model",), ""),
        ("/v2/models/{model}/versions/{version}", ("model", "version"), "Version"),
    ):
        paths |= {
            prefix: {
                "get": _operation(
                    f"modelMetadata{suffix}", "inference", "Inputs and outputs of a model",
                    _ref("ModelMetadata"), "404", parameters=parameters,
                )
            },
            f"{prefix}/ready": {
                "get": _with_not_ready(
                    _operation(
                        f"modelReady{suffix}", "health", "This model can answer", _ref("ModelReady"), "404",
                        parameters=parameters,
                    ),
                    "ModelReady",
                )
            },
            f"{prefix}/stats": {
                "get": _operation(
                    f"modelStatistics{suffix}", "inference", "Counts of one model", _ref("Statistics"), "404",
                    parameters=parameters,
                )
            },
            f"{prefix}/infer": {
                "post": _operation(
                    f"infer{suffix}", "inference", "Tensors in, tensors out", None,
                    "404", "413", "415", "504",
                    parameters=(*parameters, "json_size"),
                    body={
                        "required": True,
                        "content": {codec.JSON: {"schema": _ref("InferRequest")}, **_BYTES},
                    },
                    content={codec.JSON: {"schema": _ref("InferResponse")}, **_BYTES},
                    description=(
                        "JSON, or JSON followed by raw tensors in its order (little-endian, row-major) with "
                        "Inference-Header-Content-Length. The answer is binary where binary_data_output or "
                        "binary_data asks for it."
                    ),
                )
            },
        }  # fmt: skip
    for verb in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": {
                "operationId": f"{verb}Model",
                "tags": ["repository"],
                "summary": f"{verb.capitalize()} a model: on the control socket only, 403 here",
                "parameters": [{"$ref": "#/components/parameters/model"}],
                "responses": {
                    status: {"$ref": f"#/components/responses/{status}"}
                    for status in ("403", *_ALWAYS, "401", "404", "413", "415", "429")
                },
            }
        }
    return paths


def _page(identifier: str, summary: str) -> _Schema:
    content = {"text/html": {"schema": {"type": "string"}}}
    return {"get": _operation(identifier, "watching", summary, None, "429", content=content, guarded=False)}


def _with_not_ready(operation: _Schema, schema: str) -> _Schema:
    """503 of a probe has the probe's own body, or the usual sentence."""
    operation["responses"]["503"] = {
        "description": "Not ready",
        "content": {codec.JSON: {"schema": {"anyOf": [_ref(schema), _ref("Error")]}}},
    }
    return operation

"""The statistics extension of the Open Inference Protocol, from the counters that the metrics keep anyway.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md

Rows are counted, as Triton does: three rows in one request are three inferences. ``fail`` stays 0: a request
that the model cannot answer is answered by the rules (``fallback_count``, ours), and one that is refused
never reaches a model (``edge_requests_total``). ``queue`` and ``compute_infer`` are those of the release
since it was loaded; ``compute_input`` and ``compute_output`` stay 0: joining and splitting are inside
``compute_infer``.
"""

from __future__ import annotations

from typing import Any

from edge_agent.contract import metric_names as names
from edge_agent.errors import Unavailable
from edge_agent.serving.batcher import Timings
from edge_agent.serving.service import Service
from edge_agent.telemetry.metrics import AgentMetrics


def of_models(
    service: Service, metrics: AgentMetrics, model: str | None = None, version: str | None = None
) -> dict[str, Any]:
    """Body of ``GET /v2/models[/{model}[/versions/{version}]]/stats``.

    Raises:
        UnknownModel: no such model, or another version of it.
    """
    asked = [model] if model is not None else [status.name for status in service.statuses()]
    reports = []
    for name in asked:
        try:
            manifest = service.manifest(name, version)
        except Unavailable:  # known, and nothing of it can be read: it has answered nothing
            continue
        timings = service.timings(manifest.name)
        reports.append(_of_release(metrics, timings, manifest.name, str(manifest.version)))
    return {"model_stats": reports}


def _of_release(metrics: AgentMetrics, timings: Timings, model: str, version: str) -> dict[str, Any]:
    labels = {"model": model, "version": version}
    rows = fallback_rows = 0.0
    for family in metrics.registry.collect():
        if family.name == names.ANSWERS.name.removesuffix("_total"):
            for sample in family.samples:
                if sample.name == names.ANSWERS.name and labels.items() <= sample.labels.items():
                    rows += sample.value
                    fallback_rows += sample.value if sample.labels["source"] == "fallback" else 0
    read = metrics.registry.get_sample_value

    def count(metric: names.Metric, suffix: str) -> float:
        return read(f"{metric.name}_{suffix}", labels) or 0.0

    def duration(requests: float, seconds: float) -> dict[str, int]:
        return {"count": round(requests), "ns": round(seconds * 1e9)}

    none = duration(0, 0)
    return {
        "name": model,
        "version": version,
        "last_inference": round(metrics.last_answer(model, version) * 1000),  # ms since 1970; 0: never
        "inference_count": round(rows),
        "execution_count": round(count(names.BATCH_ROWS, "count")),
        "fallback_count": round(fallback_rows),
        "inference_stats": {
            "success": duration(
                count(names.INFERENCE_SECONDS, "count"), count(names.INFERENCE_SECONDS, "sum")
            ),
            "fail": none,
            "queue": duration(timings.requests, timings.waiting),
            "compute_input": none,
            "compute_infer": duration(timings.requests, timings.computing),
            "compute_output": none,
        },
        "batch_stats": [],
    }

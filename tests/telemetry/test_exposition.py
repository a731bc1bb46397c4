"""What Prometheus scrapes, and that answering goes on meanwhile."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.telemetry.metrics import AgentMetrics


def _metrics() -> AgentMetrics:
    metrics = AgentMetrics(CollectorRegistry(), "line-1", "0.0.0")
    release = metrics.for_release("demo", "1.0.0")
    release.all_answered("ok", 3, 1, [0.0002, 0.004])
    release.answered("deadline", 1, 0, 0.02)
    metrics.model_state("demo", "ready")
    return metrics


def _series(text: bytes) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    return [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    ]


def test_the_exposition_in_turns_has_what_the_exposition_has() -> None:
    metrics = _metrics()
    in_turns = asyncio.run(metrics.exposition_in_turns())
    assert _series(in_turns) == _series(metrics.exposition())
    assert b'edge_answers_total{model="demo",reason="ok",source="model",version="1.0.0"} 3.0' in in_turns


def test_others_have_their_turn_while_metrics_are_written() -> None:
    async def turns() -> int:
        writing = asyncio.create_task(_metrics().exposition_in_turns())
        taken = 0
        while not writing.done():
            taken += 1
            await asyncio.sleep(0)
        return taken

    assert asyncio.run(turns()) > 20

"""docs/metrics.md and the code name the same metrics, kinds, labels and values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from edge_agent.contract import metric_names as names
from edge_agent.telemetry.metrics import AgentMetrics

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def documented() -> dict[str, tuple[str, tuple[str, ...], str]]:
    rows = re.findall(
        r"^\| `(\w+)` \| (counter|gauge|histogram) \| (.*?) \| (.*) \|$", DOCUMENT, re.MULTILINE
    )
    assert len({name for name, *_ in rows}) == len(rows)
    return {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows
    }


def test_the_document_lists_exactly_the_metrics_of_the_code() -> None:
    assert documented() == {metric.name: (metric.kind, metric.labels, metric.help) for metric in names.ALL}


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("`source`", names.SOURCES),
        ("`reason` of answers", names.REASONS),
        ("`decision`", names.DECISIONS_MADE),
        ("`state` of models", names.MODEL_STATES),
    ],
)
def test_the_document_lists_the_values_of_closed_labels(label: str, values: tuple[str, ...]) -> None:
    (row,) = re.findall(rf"^\| {label} \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", row)) == values


def test_every_reason_is_explained() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \| (?:model|rules) \|", DOCUMENT, re.MULTILINE)) == names.REASONS


def test_every_query_of_the_document_names_metrics_that_exist() -> None:
    series = {metric.name for metric in names.ALL}
    series |= {f"{name}_{part}" for name in series for part in ("bucket", "sum", "count")}
    used = set(re.findall(r"edge_[a-z_]+", DOCUMENT)) - {"edge_agent"}
    assert used <= series


def test_what_the_agent_exposes_is_what_the_contract_names() -> None:
    metrics = AgentMetrics(CollectorRegistry(), "unit-1", "0.1.0")
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
        if family.name.startswith("edge_")
    }
    assert exposed == {metric.name: metric.kind for metric in names.ALL}

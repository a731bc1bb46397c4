"""The deployment files, and what they say about metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from edge_agent.contract import metric_names

ROOT: Final = Path(__file__).parents[2]
DOCKER: Final = ROOT / "docker"
K3S: Final = ROOT / "k3s"

# What a scrape, a remote write or a histogram adds to the agent's own labels.
ADDED_LABELS: Final = frozenset({"device", "instance", "job", "le", "__name__"})
_SERIES: Final = {
    metric.name + suffix: frozenset(metric.labels)
    for metric in metric_names.ALL
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def documents(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def unknown_in(promql: str) -> Iterator[str]:
    """Metrics and labels in ``promql`` that edge_agent.contract.metric_names does not know."""
    quoted = re.compile(r'"[^"]*"')
    seen: set[str] = set()
    for name, selector in re.findall(r"\b(edge_\w+)(\{[^}]*\})?", quoted.sub('""', promql)):
        if name not in _SERIES:
            yield f"metric {name}"
            continue
        seen |= _SERIES[name]
        for label in re.findall(r"(\w+)\s*[=!]", selector):
            if label not in _SERIES[name] | ADDED_LABELS:
                yield f"label {label} of {name}"
    for labels in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", promql):
        for label in filter(None, map(str.strip, labels.split(","))):
            if label not in seen | ADDED_LABELS:
                yield f"label {label} in {promql}"

"""What every test sees: a quiet onnxruntime, and real services as fixtures.

``mosquitto`` and ``prometheus`` start anew for each test that names them, and are gone after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before any test imports onnxruntime: its official wheels phone home otherwise. Children inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# As quantize-model and the agent have it, which here run in a process that has imported numpy before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.support.services import Mosquitto, Prometheus

_MARKS = {"mosquitto": pytest.mark.broker, "prometheus": pytest.mark.prometheus}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the service they name, so that ``-m 'not prometheus'`` works."""
    for item in items:
        for fixture, mark in _MARKS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


@pytest.fixture
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A running MQTT broker (3.1.1 and 5, anonymous): host, port, stop(), start()."""
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A running Prometheus with a remote-write receiver: url, query(), scrape(), stop(), start()."""
    server = Prometheus(tmp_path_factory.mktemp("prometheus"))
    try:
        server.start()
        yield server
    finally:
        server.stop()

"""An agent that serves the tiny model ``demo`` over HTTP, and a connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundles import tiny_bundle
from tests.transport.agent import Agent, Client, running


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with running() as agent:
        agent.serve(tiny_bundle(tmp_path / "bundle"))
        yield agent


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    client = Client(agent.listen(max_body_bytes=1 << 20).port)
    yield client
    client.close()

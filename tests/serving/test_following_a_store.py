"""An agent without the store's lock follows what another one does with the store."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import MODEL, Bundle
from edge_agent.serving.service import Answer, Service
from edge_agent.standby import Standby
from edge_agent.store.state import UpdateRecord
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics
from tests.support.bundles import tiny_bundle

ROW = {"x": np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)}


class Second:
    """What a second agent has of a store: a view of it and a service."""

    def __init__(self, path: Path) -> None:
        self.store = Store.open_or_read(path)
        assert not self.store.writable
        metrics = AgentMetrics(CollectorRegistry(), "unit-1", "0.0.0")
        self.service = Service(ServingConfig(), EngineConfig(), DriftConfig(), metrics)
        self.standby = Standby(self.store, self.service, self._take_up)

    async def _take_up(self, model: str) -> None:
        await self.service.start(model, self.store.current(model))

    async def answer(self) -> Answer:
        name = self.service.manifest(None).inputs[0].name
        return await self.service.submit(None, None, {name: ROW["x"]})


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        install(store, tiny_bundle(tmp_path / "1.0.0", version="1.0.0"))
        yield store


def install(store: Store, bundle: Bundle) -> Bundle:
    with store.staging() as folder:
        shutil.copytree(bundle.path, folder / "bundle")
        admitted = store.admit(folder / "bundle")
        store.activate(admitted)
    return admitted


def test_a_release_that_cannot_be_loaded_leaves_the_one_before_answering(
    first: Store, tmp_path: Path
) -> None:
    async def scenario() -> None:
        second = Second(tmp_path / "store")
        await second.standby.follow()
        damaged = install(first, tiny_bundle(tmp_path / "2.0.0", version="2.0.0")).member(MODEL)
        content = damaged.read_bytes()
        damaged.chmod(0o644)
        damaged.write_bytes(content[:-1])
        await second.standby.follow()
        answer = await second.answer()
        assert (answer.version, answer.source) == ("1.0.0", "model")
        install(first, tiny_bundle(tmp_path / "3.0.0", version="3.0.0"))
        await second.standby.follow()
        answer = await second.answer()
        assert (answer.version, answer.source) == ("3.0.0", "model"), "another one is tried at once"

    asyncio.run(scenario())


def test_a_store_without_a_release_is_followed_from_its_first_one_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        with Store.open(tmp_path / "store") as first:
            first.save("demo", UpdateRecord())
            second = Second(tmp_path / "store")
            await second.standby.follow()
            assert not second.service.ready()
            install(first, tiny_bundle(tmp_path / "1.0.0", version="1.0.0"))
            await second.standby.follow()
            assert second.service.ready()
            assert (await second.answer()).source == "model"

    asyncio.run(scenario())


def test_waiting_ends_with_the_store_and_what_is_current_then_answers(first: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        second = Second(tmp_path / "store")
        waiting = asyncio.create_task(second.standby.wait())
        await asyncio.sleep(0)
        install(first, tiny_bundle(tmp_path / "2.0.0", version="2.0.0"))
        first.close()
        async with asyncio.timeout(60):
            await waiting
        assert second.store.writable
        await second.standby.follow()
        assert (await second.answer()).version == "2.0.0"
        second.store.close()

    asyncio.run(scenario())

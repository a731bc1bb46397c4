"""Holds by message, through a real broker: only where they are switched on, and nothing old counts."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from edge_agent.config import DriftConfig, EngineConfig, MqttConfig, ServingConfig
from edge_agent.serving.service import Service
from edge_agent.store.state import State
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport.mqtt import MqttTransport
from tests.support.services import Mosquitto
from tests.transport.test_inference_over_mqtt import Peer, connected
from tests.update.devices import Device, Publisher

ROOT = "edge/unit-1"
PATIENCE = 30.0


@contextlib.asynccontextmanager
async def agent(device: Device, broker: Mosquitto, **more: Any) -> AsyncIterator[None]:
    """The MQTT side of an agent, connected."""
    metrics = AgentMetrics(CollectorRegistry(), "unit-1", "0.1.0")
    service = Service(ServingConfig(), EngineConfig(), DriftConfig(), metrics)
    config = MqttConfig(host=broker.host, port=broker.port, **more)
    transport = MqttTransport(config, "unit-1", service, metrics, hold=device.updater.heed)
    running = asyncio.create_task(transport.run())
    async with asyncio.timeout(PATIENCE):
        await transport.connected.wait()
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def away(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def until(device: Device, seconds: float) -> dict[str, str]:
    at = datetime.datetime.fromtimestamp(device.clock.now() + seconds, datetime.UTC)
    return {"until": at.isoformat(), "reason": "batch 17"}


def event(peer: Peer) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(peer.receive().payload)
    return message


def test_a_message_holds_an_update_and_an_empty_one_lets_it_go(tmp_path: Path, mosquitto: Mosquitto) -> None:
    publisher = Publisher(tmp_path / "fleet")
    device = Device(tmp_path / "store", publisher)

    async def scenario() -> None:
        with connected(mosquitto, f"{ROOT}/events") as peer:
            async with agent(device, mosquitto, holds=True):
                await away(lambda: peer.send(f"{ROOT}/hold", until(device, 600)))
                said = await away(lambda: event(peer))
                assert (said["event"], said["held"], said["kind"]) == ("hold", True, "mqtt")
                publisher.assign(publisher.publish("1.0.0"))
                outcome = await device.updater.run_once()
                assert (outcome.state, outcome.reason) == (State.HELD, "mqtt")

                await away(lambda: peer.send(f"{ROOT}/hold", b"nonsense"))
                assert "until" in (await away(lambda: event(peer)))["error"]
                assert (await device.updater.run_once()).state is State.HELD

                await away(lambda: peer.send(f"{ROOT}/hold", b""))
                assert (await away(lambda: event(peer)))["held"] is False
                await device.follow()
                assert device.version() == "1.0.0"

    asyncio.run(scenario())
    device.store.close()


def test_nobody_holds_updates_by_message_unless_it_is_switched_on_nor_by_one_that_was_kept(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    device = Device(tmp_path / "store", Publisher(tmp_path / "fleet"))

    async def scenario() -> None:
        with connected(mosquitto, f"{ROOT}/events") as peer:
            async with agent(device, mosquitto):
                await away(lambda: peer.send(f"{ROOT}/hold", until(device, 600)))
            await away(lambda: peer.send(f"{ROOT}/hold", until(device, 600), retain=True))
            async with agent(device, mosquitto, holds=True):
                # Answered in order: once this one is refused, whatever came before it is done.
                await away(lambda: peer.send(f"{ROOT}/hold", b"nonsense"))
                assert "error" in await away(lambda: event(peer))
            assert peer.silent()

    asyncio.run(scenario())
    assert not list((tmp_path / "store").glob("hold*"))
    device.store.close()


def test_an_answer_cannot_be_sent_to_where_holds_are_read(tmp_path: Path, mosquitto: Mosquitto) -> None:
    device = Device(tmp_path / "store", Publisher(tmp_path / "fleet"))

    async def scenario() -> None:
        with connected(mosquitto, f"{ROOT}/predict/response") as peer:
            async with agent(device, mosquitto, holds=True):
                request = {"ResponseTopic": f"{ROOT}/hold"}
                await away(lambda: peer.send(f"{ROOT}/predict", {"features": [1]}, **request))
                refused = json.loads((await away(peer.receive)).payload)
                assert "a topic of an agent" in refused["error"]

    asyncio.run(scenario())
    device.store.close()

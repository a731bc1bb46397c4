"""The embedded MQTT broker, for machines without mosquitto: ``python -m examples.demo.broker PORT``.

``amqtt`` is pure Python and speaks MQTT 3.1.1 only: answers come on fixed topics, matched by ``id``.
"""

from __future__ import annotations

import asyncio
import sys


async def serve(port: int) -> None:
    """Run the broker on the loopback until cancelled."""
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}", "max_connections": 64}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))

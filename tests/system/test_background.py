"""What runs beside serving may fail without ending it."""

from __future__ import annotations

import asyncio

from edge_agent import app


def test_a_task_that_fails_is_reported_and_begun_again_and_takes_nobody_along(caplog):
    async def story():
        begun = 0
        again = asyncio.Event()

        async def work():
            nonlocal begun
            begun += 1
            if begun == 1:
                raise ZeroDivisionError("a fault of ours")
            again.set()
            await asyncio.Event().wait()

        async with asyncio.TaskGroup() as tasks:
            background = app.Background(tasks)
            background.start("faulty", work)
            await asyncio.wait_for(again.wait(), 30)
            await background.end("faulty")
        assert begun == 2

    asyncio.run(story())
    assert "task faulty failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text

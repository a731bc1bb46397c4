"""The workshop: a staging folder and a worker in it, for as long as one update takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from edge_agent.config import EngineConfig, UpdatesConfig
from edge_agent.store.store import Store
from edge_agent.update.child import Hands, child_process, this_process
from edge_agent.update.messages import Setup
from edge_agent.update.source import Access

_GRACE_SECONDS: Final = 5.0
_GIT_COPY: Final = "git"  # folder of the store: the shallow copy of a git source
_GIT_BESIDE: Final = 64 << 20  # bytes that such a copy may hold beside the members of one release


class Workshop:
    """Where releases are fetched, verified and tested before the store has them.

    Args:
        config: where they come from.
        device: this device's name, as the assignments know it.
        store: where the staging folder lies.
        engine: how the self-test runs the model.
    """

    def __init__(self, config: UpdatesConfig, device: str, store: Store, engine: EngineConfig) -> None:
        self._config = config
        self._device = device
        self._store = store
        self._engine = engine
        self._hands: Hands | None = None  # the worker at work, for an operator to interrupt

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Path, Hands]]:
        """An empty folder that goes afterwards, and a worker that ends.

        Raises:
            StoreError: the disk refused.
        """
        async with self._staging() as scratch, self._worker(scratch) as hands:
            self._hands = hands
            try:
                yield scratch, hands
            finally:
                self._hands = None

    def interrupt(self) -> None:
        """An operator's command does not wait for a download."""
        if self._hands is not None:
            self._hands.abort()

    def access(self) -> Access:
        """How the source is reached."""
        config = self._config
        return Access(
            config.blobs, config.proxy, config.ca_file, config.client_certificate, config.client_key,
            cache=str(self._store.layout.root / _GIT_COPY), cache_bytes=config.max_bundle_bytes + _GIT_BESIDE,
            credentials=config.credentials_file,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _staging(self) -> AsyncIterator[Path]:
        stack = contextlib.ExitStack()
        folder = await asyncio.to_thread(stack.enter_context, self._store.staging())
        try:
            yield folder
        finally:
            await asyncio.to_thread(stack.close)

    def _worker(self, scratch: Path) -> contextlib.AbstractAsyncContextManager[Hands]:
        layout = self._store.layout
        setup = Setup(
            device=self._device, source=self._config.source, root=self._config.root,
            models=self._config.models, tuf=str(layout.tuf), partial=str(layout.partial),
            scratch=str(scratch), timeout=self._config.timeout_seconds, engine=self._engine,
            access=self.access(), blobs=str(layout.blobs),
        )  # fmt: skip
        if self._config.in_process:
            return this_process(setup, self._store.disk)
        # Its own waits end first, with a better message; this is for one that hangs.
        return child_process(setup, silence_seconds=self._config.timeout_seconds + _GRACE_SECONDS)

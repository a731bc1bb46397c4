"""The HTTP listeners: sockets, doors and the life of a server; what a connection does is ``connection.py``.

Invariants:

- no connection is refused while configuration or certificates are renewed, and one that is open goes on as
  it began; what cannot be used changes nothing;
- a stop accepts nothing more, gives what is under way its time, and closes everything;
- time is bounded: one sweep cuts whoever is too slow or idle;
- admin routes exist on the Unix socket only, which its file mode protects.

The domain knows no status codes: ``STATUS_BY_ERROR`` is the one table.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path
from typing import Any, Final

from edge_agent.config import HttpConfig
from edge_agent.errors import ConfigError
from edge_agent.serving.service import Service
from edge_agent.telemetry.logs import EventLog
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport.connection import LINGER_SECONDS, HttpConnection, Shared
from edge_agent.transport.doors import RENEWAL_SECONDS, Doors, Rates, Stamp
from edge_agent.transport.routes import Admin, Routes
from edge_agent.transport.status import OUTCOMES, STATUS_BY_ERROR, outcome, status_of

__all__ = ["OUTCOMES", "STATUS_BY_ERROR", "HttpServer", "outcome", "status_of"]

log = logging.getLogger(__name__)
events = EventLog(__name__)

_BACKLOG: Final = 1024


class HttpServer(Shared):
    """The listeners, and what their connections share. Lives on one event loop.

    ``open_control``, or ``unix_path`` at the start, adds a second listener on a Unix socket (mode 0600) with
    everything and the admin routes. After ``start``: ``port`` and ``url``.
    """

    def __init__(
        self,
        config: HttpConfig,
        service: Service,
        metrics: AgentMetrics,
        *,
        admin: Admin | None = None,
        unix_path: Path | None = None,
    ) -> None:
        super().__init__(config, Routes(service, metrics, admin))
        self.port = config.port
        self.url = ""
        self._unix_path = unix_path
        self._sockets: list[socket.socket] = []  # bound; the listeners accept on duplicates of them
        self._listeners: list[asyncio.Server] = []
        self._control: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # of the configuration or the doors: one after the other

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            ConfigError: the port is taken or not allowed, the host is not ours, the socket path or a file of
                TLS or tokens is unusable.
        """
        self.routes.stopping = False
        doors = await asyncio.to_thread(Doors.build, self.config)
        sockets = await self._bind(self.config)
        await self._listen(self.config, doors, sockets)
        if self._unix_path is not None:
            try:
                await self.open_control(self._unix_path)
            except ConfigError:
                await self.stop(0)
                raise
        self._sweep()
        self._renewal = asyncio.create_task(self._renew(), name="http-renewal")

    async def open_control(self, path: Path) -> None:
        """Listen on a Unix socket, too, with the admin routes; whoever calls this holds the store's lock.

        Raises:
            ConfigError: the path is unusable.
        """
        try:
            unix = _bind_unix(path)
            self._control = await asyncio.get_running_loop().create_unix_server(
                lambda: HttpConnection(self, admin=True), sock=unix
            )
        except OSError as error:
            raise ConfigError(
                f"control socket {path}: {error.strerror or error}; choose another store"
            ) from error
        self._unix_path = path

    async def reconfigure(self, config: HttpConfig) -> None:
        """Go on with another configuration; connections that are open keep the limits they began with.

        Raises:
            ConfigError: as ``start``; then nothing has changed.
        """
        async with self._changing:
            doors = await asyncio.to_thread(Doors.build, config)
            sockets = self._sockets
            if (config.host, config.port) != (self.config.host, self.config.port):
                sockets = await self._bind(config)
            await self._listen(config, doors, sockets)

    async def stop(self, drain_seconds: float) -> None:
        """Stop accepting, give requests under way ``drain_seconds``, close everything."""
        self.routes.stopping = True
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for bound in self._sockets:
            bound.close()
        self._sockets.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
            if self._unix_path is not None:
                self._unix_path.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close_when_idle()
        if self.connections and drain_seconds > 0:
            self._idle.clear()
            try:
                async with asyncio.timeout(drain_seconds):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("http: %d connections cut after %g s", len(self.connections), drain_seconds)
        for connection in list(self.connections):
            connection.abort()
        await self.routes.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    async def _bind(self, config: HttpConfig) -> list[socket.socket]:
        """A socket per address of the host, all on one port."""
        loop = asyncio.get_running_loop()
        bound: list[socket.socket] = []
        port = config.port
        try:
            found = await loop.getaddrinfo(
                config.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, address in dict.fromkeys(found):
                new = socket.socket(family, kind, protocol)
                bound.append(new)
                new.setblocking(False)
                new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    new.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                new.bind((address[0], port, *address[2:]))
                new.listen(_BACKLOG)
                port = new.getsockname()[1]
        except OSError as error:
            for each in bound:
                each.close()
            raise ConfigError(_why_not_bound(config, error)) from error
        return bound

    async def _listen(self, config: HttpConfig, doors: Doors, sockets: list[socket.socket]) -> None:
        """Accept on these sockets, behind these doors, from now on. What is being answered goes on."""
        loop = asyncio.get_running_loop()
        patience: dict[str, Any] = {}
        if doors.context is not None:
            patience = {
                "ssl": doors.context,
                "ssl_handshake_timeout": config.header_timeout_seconds,
                "ssl_shutdown_timeout": LINGER_SECONDS,
            }
        before, bound_before = self._listeners, self._sockets
        self._listeners = [
            await loop.create_server(
                lambda: HttpConnection(self, admin=False), sock=each.dup(), backlog=_BACKLOG, **patience
            )
            for each in sockets
        ]
        self.config, self.doors, self._sockets = config, doors, sockets
        self.rates = (
            Rates(config.requests_per_second, config.request_burst) if config.requests_per_second else None
        )
        for listener in before:
            listener.close()
        if bound_before is not sockets:
            for each in bound_before:
                each.close()
        self.port = sockets[0].getsockname()[1]
        scheme = "https" if doors.context is not None else "http"
        self.url = f"{scheme}://{f'[{config.host}]' if ':' in config.host else config.host}:{self.port}"

    async def _renew(self) -> None:
        """Take up a certificate, key, client CA or token file that was replaced."""
        refused: Stamp | None = None
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            async with self._changing:
                stamp = await asyncio.to_thread(Stamp.of, self.config)
                if stamp in (self.doors.stamp, refused):
                    continue
                try:
                    doors = await asyncio.to_thread(Doors.build, self.config)
                    await self._listen(self.config, doors, self._sockets)
                except (ConfigError, OSError) as error:
                    refused = stamp
                    events.warning("renewal_refused", reason=str(error), now="the old files stay in force")
                else:
                    refused = None
                    events.event("renewed", tokens=list(doors.tokens.names) if doors.tokens else None)

    def _sweep(self) -> None:
        """Cut connections whose time ran out: one timer for all, not one per request."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            if connection.deadline < now:
                connection.time_out()
        step = min(1.0, self.config.header_timeout_seconds / 4, self.config.idle_timeout_seconds / 4)
        self._sweeper = loop.call_later(step, self._sweep)


def _why_not_bound(config: HttpConfig, error: OSError) -> str:
    where = f"port {config.port} on {config.host}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is taken: set http.port, or stop the other program"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where} is not allowed for this user; set http.port above 1023"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"http.host {config.host} is not an address of this machine; set http.host"
    return f"{where} cannot be listened on: {error.strerror or error}; set http.host and http.port"


def _bind_unix(path: Path) -> socket.socket:
    """A listening-to-be socket file that only its owner can connect to.

    The store's lock says that nobody else serves this path: a socket found there is left over from a crash.
    """
    if path.is_socket():
        path.unlink()
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # sockaddr_un holds 107 bytes; a path through an open folder is short, however deep the store lies.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        unix.bind(f"/proc/self/fd/{folder}/{path.name}")
        path.chmod(0o600)  # before it listens: nobody can have connected in between
    except OSError:
        unix.close()
        raise
    finally:
        os.close(folder)
    return unix

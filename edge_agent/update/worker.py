"""The worker: does for the updater what needs heavy or dangerous code, in a process that ends afterwards.

``python -m edge_agent.update.worker`` reads commands on stdin and answers on stdout (``messages.py``). TUF
and cryptography, files from the network, and the first run of an unknown model stay out of the serving
process: none of their memory remains, and none of their crashes matters. With ``updates.in_process`` the
same class runs in a thread.

The worker decides nothing. It writes to the staging folder, the half downloads and the TUF metadata only;
releases and pointers are the updater's.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.contract import manifest as manifests
from edge_agent.contract import transfers
from edge_agent.contract.assignments import assigned
from edge_agent.contract.bundle import open_bundle
from edge_agent.contract.errors import BadManifest, ContractError
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.repository import transfers_target
from edge_agent.contract.transfers import Transfers
from edge_agent.errors import ConfigError, EngineError, SourceError, StoreError, UpdateRejected
from edge_agent.store.fs import Disk, explained
from edge_agent.update import messages
from edge_agent.update.fetch import fetch_members
from edge_agent.update.messages import (
    Check,
    Checked,
    Command,
    Done,
    Failed,
    Fetch,
    Progress,
    ReadManifest,
    Reply,
    SelfTest,
    Setup,
    Test,
)
from edge_agent.update.parcel import can_open
from edge_agent.update.source import open_source

if TYPE_CHECKING:
    from edge_agent.update.trust import TrustedRepository

logger = logging.getLogger(__name__)

Tell = Callable[[Progress], None]

_PROGRESS_SECONDS: Final = 1.0  # how often a long download says so
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class Worker:
    """Carries out commands, one after the other."""

    def __init__(self, setup: Setup, disk: Disk | None = None) -> None:
        self._setup = setup
        self._disk = disk
        self._repository: TrustedRepository | None = None

    def handle(self, command: Command, tell: Tell) -> Reply:
        """Carry out one command; every failure becomes a ``Failed``."""
        try:
            match command:
                case Check():
                    return self._check(tell)
                case ReadManifest():
                    return self._read_manifest(command)
                case Fetch():
                    return self._fetch(command, tell)
                case Test():
                    return self._test(command)
        except UpdateRejected as error:
            return self._failed("rejected", error.reason, error)
        except ConfigError as error:
            return self._failed("source", "config", error)
        except SourceError as error:
            return self._failed("source", getattr(error, "reason", "unreachable"), error)
        except StoreError as error:
            return self._failed("store", error.reason, error)
        except EngineError as error:
            return self._failed("rejected", "engine", error)
        except ContractError as error:
            return self._failed("rejected", "bad_bundle", error)
        except Exception as error:
            logger.exception("%s failed unexpectedly", type(command).__name__)
            return self._failed("bug", "bug", f"{type(error).__name__}: {error}")

    def _check(self, tell: Tell) -> Checked:
        # Not at the top: these bring tuf and cryptography, which `Test` alone does not need.
        from edge_agent.update.trust import TrustedRepository

        setup = self._setup
        try:
            root = Path(setup.root).read_bytes()
        except OSError as error:
            raise UpdateRejected(
                f"updates.root {setup.root!r} cannot be read: {error.strerror}; copy 1.root.json there",
                reason="bad_root",
            ) from error
        source = open_source(setup.source, setup.timeout, setup.access)
        repository = TrustedRepository(
            source,
            root,
            Path(setup.tuf),
            Path(setup.scratch),
            progress=lambda: tell(Progress(0)),
            disk=self._disk,
        )
        repository.refresh()
        document = repository.assignments()
        self._repository = repository
        models = setup.models or tuple(document.models)
        return Checked(
            shares={model: assigned(document, model, setup.device) for model in models},
            serial=document.serial,
            expires=repository.expires(),
        )

    def _read_manifest(self, command: ReadManifest) -> Done:
        assert self._repository is not None, "Check comes first"
        data = self._repository.manifest(command.model, command.release)
        path = Path(command.folder, manifests.FILE_NAME)
        with explained("write", path):
            path.write_bytes(data)
        return Done(bytes=len(data))

    def _fetch(self, command: Fetch, tell: Tell) -> Done:
        folder = Path(command.folder)
        last = time.monotonic()

        def progress(moved: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                tell(Progress(moved))

        source = open_source(self._setup.source, self._setup.timeout, self._setup.access)
        partial = Path(self._setup.partial)
        manifest = open_bundle(folder).manifest
        moved = fetch_members(
            source, manifest, command.names, folder, partial, progress,
            self._transfers(manifest), Path(self._setup.blobs), command.spare,
        )  # fmt: skip
        return Done(bytes=moved)

    def _transfers(self, manifest: Manifest) -> Transfers | None:
        """The shorter ways for this release's members, if it has any and this machine can take them."""
        if self._repository is None or not can_open():
            return None
        try:
            target = transfers_target(manifest.name, manifest.version)
            return transfers.parse(self._repository.target(target, transfers.MAX_BYTES))
        except (UpdateRejected, BadManifest) as error:
            if getattr(error, "reason", "") != "unknown_release":  # most releases just have none
                logger.warning("%s; members are fetched whole", error)
            return None

    def _test(self, command: Test) -> SelfTest:
        from edge_agent.update.selftest import run_self_test  # brings onnxruntime

        bundle = open_bundle(Path(command.bundle))
        bundle.verify()
        return run_self_test(bundle, self._setup.engine)

    @staticmethod
    def _failed(kind: str, reason: str, error: Exception | str) -> Failed:
        return Failed(kind, reason, str(error))


def main() -> int:
    """Serve commands until stdin ends."""
    _die_with_the_agent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(OSError):
        os.nice(10)  # serving comes first
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints is not an answer

    def tell(message: Reply) -> None:
        answers.write(messages.encode(message))
        answers.flush()

    lines = sys.stdin.buffer
    worker = Worker(messages.decode_setup(lines.readline(messages.MAX_LINE)))
    while line := lines.readline(messages.MAX_LINE):
        tell(worker.handle(messages.decode_command(line), tell))
    return 0


def _die_with_the_agent() -> None:
    """A killed agent leaves no orphan that writes into a store somebody else has locked meanwhile.

    The agent may have been killed before this line: whose child this was comes from the agent itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(messages.AGENT_PID, str(os.getppid())) != str(os.getppid()):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())

"""edge-agent: run | status | verify | install | rollback | hold | load | unload | bench | token.

Exit codes: 0 done, 1 an expected failure (one line on stderr), 2 usage, 3 a fault of ours (a traceback), 130
interrupted. With ``--json`` the result is one JSON object on stdout.

``status``, ``install`` and ``rollback`` talk to the agent that holds the store, through its control socket;
where none runs, they work on the store themselves. Either way the same code does the work.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import http.client
import json
import logging
import os
import socket
import sys
import tempfile
import time
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# numpy's BLAS would start a thread per core and 30 MB of buffers; nothing here multiplies large matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from edge_agent import __version__
from edge_agent import config as configs
from edge_agent.config import CONTROL_SOCKET, Config
from edge_agent.contract.errors import ContractError
from edge_agent.errors import ConfigError, EdgeError, StoreError

if TYPE_CHECKING:
    from edge_agent.contract.bundle import Bundle

SYSTEM_CONFIG: Final = Path("/etc/edge-agent/agent.yaml")
CONTROL_TIMEOUT: Final = 600.0  # seconds: an install runs the self-test on a slow device


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments) or 0)
    except (EdgeError, ContractError) as error:
        return _failed(arguments, error)
    except ExceptionGroup as group:  # a task of the agent ended it: the first expected failure says why
        expected = group.subgroup((EdgeError, ContractError))
        if expected is None:
            return _our_fault()
        first: BaseException = expected
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        return _failed(arguments, first)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        return _our_fault()


def _failed(arguments: argparse.Namespace, error: BaseException) -> int:
    """An expected failure, in one line: a sentence, or an event where a log collector reads."""
    if arguments.verb is _run and not sys.stderr.isatty():
        from edge_agent.telemetry import logs

        logs.configure("info")
        logs.EventLog(__name__).error("agent_failed", message=str(error))
    else:
        print(f"edge-agent: {error}", file=sys.stderr)
    return 1


def _our_fault() -> int:
    traceback.print_exc()
    print("edge-agent: this is a fault of edge-agent; please report it with the lines above", file=sys.stderr)
    return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="Inference on this device: serve a model over HTTP and MQTT, fall back to rules, "
        "follow signed releases. Without a command: run.",
    )
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    parser.set_defaults(verb=_run, config=None, store=None)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=run)
        sub.add_argument("--config", type=Path, metavar="FILE", help=f"agent.yaml (default: {SYSTEM_CONFIG})")
        return sub

    def of_a_store(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--store", metavar="DIR", help="the store (default: from the configuration)")
        return sub

    def with_store(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        of_a_store(sub).add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    of_a_store(verb("run", _run, "serve until SIGTERM"))
    with_store(verb("status", _status, "what runs here, and since when"))
    check = verb("verify", _verify, "check a bundle and run its golden vectors on this machine")
    check.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle folder or .tar")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    install = with_store(verb("install", _install, "install a local bundle: verify, self-test, go live"))
    install.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle folder or .tar")
    back = with_store(verb("rollback", _rollback, "go back to the previous release, at once and offline"))
    back.add_argument("model", nargs="?", metavar="MODEL", help="needed where there are several")
    hold = with_store(verb("hold", _hold, "let no update begin until a time, or until it is released"))
    hold.add_argument("--until", metavar="TIME", help="ISO 8601, local: 2026-11-21T22:00 (default: no end)")
    hold.add_argument("--reason", default="", metavar="TEXT", help="shown to whoever asks for the status")
    hold.add_argument("--release", action="store_true", help="end the hold instead")
    for name, text in (
        ("load", "load a model of the store again, in the running agent"),
        ("unload", "free a model's memory in the running agent; its rules answer until it is loaded again"),
    ):
        change = with_store(verb(name, functools.partial(_change, name), text))
        change.add_argument("model", metavar="MODEL")
    bench = verb("bench", _bench, "measure bundles on this device: latency, throughput, memory")
    bench.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="folders or .tar files; several are compared"
    )
    bench.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="time for each bundle (default: 5)"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    token = verb("token", _token, "make a token for a client of the HTTP port; printed once, kept as a hash")
    token.add_argument("name", metavar="NAME", help="whose it is; what --revoke and the logs call it")
    token.add_argument("--file", type=Path, metavar="FILE", help="the token file (default: http.tokens_file)")
    token.add_argument("--revoke", action="store_true", help="take NAME's token back instead")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from edge_agent import app
    from edge_agent.telemetry import logs

    config = _config(arguments)
    logs.configure(config.log_level)
    for line in _missing(config):
        _say("not_configured", line)

    def started(url: str) -> None:
        text = f"edge-agent {__version__}: device {config.device} answers on {url}"
        _say("agent_started", text, url=url, device=config.device, version=__version__)

    async def life() -> None:
        await app.run(config, started=started, reread=lambda: _config(arguments))

    try:
        import uvloop
    except ImportError:
        asyncio.run(life())
        return 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life())
    return 0


def _say(event: str, text: str, **fields: Any) -> None:
    """A sentence for the person at the terminal; for a log collector, an event with it."""
    from edge_agent.telemetry.logs import EventLog

    if sys.stderr.isatty():
        print(text if text.startswith("edge-agent") else f"edge-agent: {text}", file=sys.stderr, flush=True)
    else:
        EventLog(__name__).event(event, message=text, **fields)


def _missing(config: Config) -> list[str]:
    """What a person who just starts the agent should know it does without."""
    lines = []
    empty = False
    try:
        empty = not any((Path(config.store) / "models").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        empty = True
    except OSError:
        pass  # whoever opens the store says why it cannot
    if empty:
        lines.append(f"no model in {config.store}: edge-agent install BUNDLE puts one there, now or later")
    if not config.updates.source:
        lines.append("no updates are followed: set updates.source and updates.root in agent.yaml")
    if config.mqtt is None:
        lines.append("no MQTT broker is used: set mqtt.host in agent.yaml")
    return lines


def _status(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    report = _ask(config, "GET", "/admin/status", None)
    if report is None:
        report = _status_of_store(config)
    if arguments.json:
        _print_json(report)
        return 0
    running = "agent" in report
    print(f"device   {report['device']}   " + (f"agent {report['agent']}" if running else "no agent runs"))
    print(f"store    {report['store']}")
    for model in report["models"]:
        reason = f"  ({model['reason']})" if model.get("reason") else ""
        print(f"model    {model['name']} {model['version'] or '-'}   {model['state']}{reason}")
    if not report["models"]:
        print("model    none: edge-agent install BUNDLE")
    hold = report["updates"].get("hold") or {}
    if hold.get("held"):
        print(f"held     {hold['reason']}" + (f" until {hold['until']}" if hold["until"] else ""))
    for name, record in report["updates"].get("models", {}).items():
        last = record.get("last_result") or "none yet"
        why = f" ({record['last_reason']})" if record.get("last_reason") else ""
        print(f"update   {name}: {record['state']}, last result {last}{why}")
    for reason in report.get("health", {}).get("reasons", []):
        print(f"health   {reason}")
    return 0


def _status_of_store(config: Config) -> dict[str, Any]:
    from edge_agent.store.store import Store
    from edge_agent.update.holds import NOT_HELD, Holds

    store = Store.read(Path(config.store))
    models: list[dict[str, Any]] = []
    records: dict[str, Any] = {}
    for name in store.models():
        record = store.record(name)
        records[name] = {
            "state": record.state.value,
            "last_result": record.last_result,
            "last_reason": record.last_reason,
        }
        try:
            bundle = store.current(name)
            if bundle is not None:
                bundle.verify()
            state, reason = ("stopped", "") if bundle else ("absent", "nothing is installed")
        except ContractError as error:
            bundle, state, reason = None, "corrupt", str(error)
        models.append(
            {
                "name": name,
                "version": bundle.manifest.version if bundle else None,
                "digest": bundle.digest if bundle else None,
                "state": state,
                "reason": reason,
            }
        )
    hold = Holds(Path(config.store), config.updates.windows).in_force(time.time())
    updates = {"models": records, "hold": hold.as_dict() if hold else NOT_HELD}
    return {"device": config.device, "store": config.store, "models": models, "updates": updates}


def _find(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such bundle; give a bundle folder or a .tar") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a bundle that this user may read") from error


def _opened(path: Path, folder: str) -> Bundle:
    """A bundle folder, or a .tar unpacked into ``folder``; every byte of it is right."""
    from edge_agent.contract.bundle import open_given, unpack_given

    _find(path)
    return open_given(path) if path.is_dir() else unpack_given(path, Path(folder))


def _verify(arguments: argparse.Namespace) -> int:
    from edge_agent.update.selftest import run_self_test

    config = _config(arguments)
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as folder:
        bundle = _opened(arguments.bundle, folder)
        report = run_self_test(bundle, config.engine)
    result = {
        "name": bundle.manifest.name,
        "version": bundle.manifest.version,
        "digest": bundle.digest,
        "bytes": bundle.manifest.size,
        "self_test": report.as_dict(),
    }
    if arguments.json:
        _print_json(result)
    else:
        manifest = bundle.manifest
        print(f"{manifest.name} {manifest.version}  {bundle.digest.short}  {manifest.size} bytes")
        print(f"members  {len(manifest.members)}, all as the manifest says")
        print(f"golden   {report.message}")
    return 0 if report.passed else 1


def _bench(arguments: argparse.Namespace) -> int:
    from edge_agent.serving import bench
    from edge_agent.telemetry import logs

    config = _config(arguments)
    logs.configure("error")
    if not arguments.seconds > 0:
        raise ConfigError(f"--seconds {arguments.seconds:g}: expected a time above 0")
    results = []
    for path in arguments.bundles:
        with tempfile.TemporaryDirectory(prefix="edge-agent-") as folder:
            bundle = _opened(path, folder)
            results.append(asyncio.run(bench.measure(bundle, config, arguments.seconds)))
    if arguments.json:
        _print_json(bench.as_dict(results, config))
    else:
        print(bench.text(results, config))
    return 0


def _token(arguments: argparse.Namespace) -> int:
    from edge_agent.transport.doors import Tokens

    config = _config(arguments)
    file = arguments.file or (Path(config.http.tokens_file) if config.http.tokens_file else None)
    if file is None:
        raise ConfigError("no token file: set http.tokens_file in agent.yaml, or give --file FILE")
    tokens = Tokens.read(file) if file.exists() else Tokens({})
    if arguments.revoke:
        tokens.without(arguments.name).write(file)
        print(f"edge-agent: the token of {arguments.name} is revoked in {file}", file=sys.stderr)
        return 0
    tokens, token = tokens.with_new(arguments.name)
    tokens.write(file)
    print(token)
    print(
        f"edge-agent: only its hash is kept, in {file}; clients send: Authorization: Bearer TOKEN",
        file=sys.stderr,
    )
    if not config.http.tokens_file:
        print(f"edge-agent: set http.tokens_file: {file} in agent.yaml", file=sys.stderr)
    return 0


def _install(arguments: argparse.Namespace) -> int:
    _find(arguments.bundle)
    path = str(arguments.bundle.resolve())

    async def alone(updater: Any) -> Any:
        return await updater.install(Path(path))

    return _command(arguments, "/admin/install", {"path": path}, alone)


def _rollback(arguments: argparse.Namespace) -> int:
    async def alone(updater: Any) -> Any:
        return await updater.roll_back(arguments.model)

    return _command(arguments, "/admin/rollback", {"model": arguments.model}, alone)


def _hold(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    body = {"until": arguments.until, "reason": arguments.reason, "release": arguments.release}
    said = _ask(config, "POST", "/admin/hold", body)
    if said is None:
        said = _hold_of_store(config, arguments)
    if arguments.json:
        _print_json(said)
    elif said["held"]:
        end = f" until {said['until']}" if said["until"] else ""
        print(f"updates are held{end}: {said['reason']}")
    else:
        print("updates are not held")
    return 0


def _hold_of_store(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Where no agent runs: the file that the next one will find."""
    from edge_agent.update.holds import NOT_HELD, Holds

    holds, now = Holds(Path(config.store), config.updates.windows), time.time()
    if not arguments.release:
        return holds.set(arguments.until, arguments.reason, now).as_dict()
    holds.release()
    hold = holds.in_force(now)
    return hold.as_dict() if hold else NOT_HELD


def _change(what: str, arguments: argparse.Namespace) -> int:
    """Load or unload: only a running agent has anything in memory."""
    config = _config(arguments)
    model = urllib.parse.quote(arguments.model, safe="")
    if _ask(config, "POST", f"/v2/repository/models/{model}/{what}", {}) is None:
        raise StoreError(f"{config.store}: no agent runs on it; start it first", reason="no_agent")
    result = {"model": arguments.model, "result": f"{what}ed"}
    if arguments.json:
        _print_json(result)
    else:
        print(f"model {arguments.model} is {what}ed")
    return 0


def _command(
    arguments: argparse.Namespace, path: str, body: dict[str, Any], alone: Callable[[Any], Any]
) -> int:
    """Ask the running agent; where none runs, do it on the store."""
    config = _config(arguments)
    outcome = _ask(config, "POST", path, body)
    if outcome is None:
        from edge_agent.store.store import Store
        from edge_agent.update.updater import Updater

        store = Store.open(Path(config.store))
        try:
            updater = Updater(config.updates, config.device, store, None, None, engine=config.engine)
            outcome = asyncio.run(alone(updater)).as_dict()
        finally:
            store.close()
    failed = outcome["result"] not in ("succeeded", "already_installed")
    if arguments.json:
        _print_json(outcome)
    else:
        print(f"{outcome['result']}: {outcome['message']}", file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0


def _ask(config: Config, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
    """One request to the agent that holds the store; None if none runs.

    Raises:
        EdgeError: the agent refused; its own words.
    """
    connection = _UnixConnection(Path(config.store) / CONTROL_SOCKET)
    try:
        connection.connect()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise StoreError(
            f"{config.store}: cannot ask the running agent: {error.strerror}; use the agent's user",
            reason="permission",
        ) from error
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        content = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise StoreError(f"{config.store}: the running agent broke off: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise EdgeError(content.get("error", f"the agent answered {response.status}"))
    return dict(content)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket. ``sockaddr_un`` holds 107 bytes: a long path is reached from its folder."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=CONTROL_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONTROL_TIMEOUT)
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        except OSError:
            self.sock.close()
            raise
        finally:
            os.close(folder)


def _config(arguments: argparse.Namespace) -> Config:
    path = arguments.config or (SYSTEM_CONFIG if SYSTEM_CONFIG.exists() else None)
    config = configs.load(path)
    if arguments.store:
        import msgspec

        config = msgspec.structs.replace(config, store=arguments.store)
    return config


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, sort_keys=True)
    print()


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())

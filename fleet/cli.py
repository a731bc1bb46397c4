"""``edge-fleet``: the operator's command line.

Exit codes: 0 done; 1 an expected failure (one line says what and what to do), or a roll-out that did not
succeed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent import __version__
from edge_agent.contract import wire
from edge_agent.contract.errors import ContractError
from edge_agent.contract.version import Version
from fleet import controller, folder, release, status
from fleet.controller import Controller
from fleet.errors import FleetConfigError, FleetError, RolloutError
from fleet.folder import Fleet
from fleet.machine import Event, Phase
from fleet.registry import ReleaseFile
from fleet.repository import ONLINE
from fleet.serve import StaticServer, keep_fresh


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (FleetError, ContractError) as error:
        print(f"edge-fleet: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"edge-fleet: {what}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("edge-fleet: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-fleet", description="Releases and canary roll-outs; every decision is a git commit."
    )
    parser.add_argument("--version", action="version", version=f"edge-fleet {__version__}")
    parser.add_argument(
        "-C", "--fleet", type=Path, default=Path(), metavar="DIR", help="the fleet folder (default: here)"
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(
        parent: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, *, json: bool = True
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if json:
            sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    sub = verb(
        verbs, "init", _init, "Make a fleet folder: git, keys, signed metadata, fleet.yaml, devices.yaml."
    )
    sub.add_argument("dir", type=Path, metavar="DIR")
    sub.add_argument("--name", default="", help="name of the fleet (default: the folder's)")

    sub = verb(verbs, "publish", _publish, "Sign a bundle as a release and copy its members.")
    sub.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .tar")
    sub.add_argument("--stable", action="store_true", help="also assign it: the first release of a model")

    sub = verb(
        verbs, "push", _push, "Push published releases to the registry of fleet.yaml (publish does, too)."
    )
    sub.add_argument("version", nargs="?", metavar="VERSION", help="default: every published release")
    _model(sub)

    sub = verb(verbs, "devices", _devices, "The devices and what they run.")
    _model(sub)

    rollouts = verbs.add_parser("rollout", help="Canary roll-outs.").add_subparsers(
        metavar="COMMAND", required=True
    )
    sub = verb(rollouts, "start", _start, "Plan a roll-out and record it; rollout run carries it out.")
    sub.add_argument("release", metavar="VERSION", help="a published version")
    sub.add_argument("--again", action="store_true", help="even if it was rolled back before")
    _model(sub)
    sub = verb(rollouts, "status", _status, "A roll-out, its decisions and their evidence.")
    _id(sub)
    sub = verb(rollouts, "run", _run, "Observe, decide and act until the roll-out is finished.")
    _id(sub)
    for name, event, text in (
        ("pause", Event.PAUSED, "Leave it as it is; the abort rules stay on."),
        ("resume", Event.RESUMED, "Go on, with fresh measurements."),
        ("promote", Event.PROMOTED, "Give it to everyone without waiting for the analysis."),
        ("abort", Event.ABORTED, "Take the candidate back from every device."),
    ):
        sub = verb(rollouts, name, _command, text)
        sub.set_defaults(event=event)
        sub.add_argument("--reason", default="", help="kept in the record and in the commit")
        _id(sub)

    sub = verb(verbs, "rollback", _rollback, "Give every device the previous stable release again.")
    sub.add_argument(
        "--to", metavar="VERSION", help="a published version (default: what the stable one replaced)"
    )
    sub.add_argument("--reason", default="", help="kept in the commit")
    _model(sub)

    sub = verb(verbs, "refresh", _refresh, "Re-sign metadata before it expires.")
    sub.add_argument("--force", action="store_true", help="even if more than half of its life is left")
    sub.add_argument("--offline", action="store_true", help="root and targets too; needs the offline keys")

    sub = verb(
        verbs, "serve", _serve, "Serve repository/ over HTTP, and keep its timestamp fresh.", json=False
    )
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=_port, default=8090, help="0: any free port")

    sub = verb(verbs, "simulate", _simulate, "A whole good and a whole bad roll-out on simulated devices.")
    sub.add_argument("--devices", type=int, default=20, metavar="N")
    sub.add_argument("--bad-version", default="3.0.0", metavar="VERSION", help="the release that misbehaves")
    sub.add_argument("--keep", type=Path, metavar="DIR", help="keep the simulated fleet in DIR")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="needed where the fleet has several models")


def _id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id", nargs="?", metavar="ID", help="roll-out (default: the open one, else the latest)"
    )


def _chosen_model(fleet: Fleet, name: str | None) -> str:
    known = tuple(fleet.repository.releases())
    if name is not None:
        if name not in known:
            raise RolloutError(f"no release of {name!r}; models: {', '.join(known) or 'none'}")
        return name
    if len(known) != 1:
        what = f"say which with --model: {', '.join(known)}" if known else "run edge-fleet publish first"
        raise RolloutError(f"{len(known)} models are published; {what}")
    return known[0]


def _chosen_rollout(fleet: Fleet, rollout: str | None) -> str:
    if rollout is not None:
        if Path(rollout).name != rollout:  # it becomes a path
            raise RolloutError(f"{rollout!r} is no roll-out id; edge-fleet rollout status shows the latest")
        return rollout
    still_open = status.open_records(fleet.folder.rollouts)
    if len(still_open) > 1:
        raise RolloutError(f"say which roll-out: {', '.join(record.id for record in still_open)}")
    found = still_open or status.records(fleet.folder.rollouts)
    if not found:
        raise RolloutError("there was no roll-out yet; begin one with edge-fleet rollout start VERSION")
    return found[-1].id


def _say(arguments: argparse.Namespace, text: str, value: Any) -> None:
    print(wire.to_json(value).decode() if arguments.json else text, end="" if arguments.json else "\n")
    sys.stdout.flush()


def _init(arguments: argparse.Namespace) -> int:
    fleet = folder.create(arguments.dir, arguments.name)
    root = fleet.folder.repository / "metadata" / "1.root.json"
    text = (
        f"fleet {fleet.config.name} in {fleet.folder.root}\n"
        f"trust root of the devices: {root}\n"
        f"next: list the devices in {fleet.folder.devices.name}, then edge-fleet publish BUNDLE --stable\n"
        f"move {fleet.folder.keys / 'offline'} off this machine: with it anybody can release a model"
    )
    value = {"fleet": str(fleet.folder.root), "root": str(root), "keys": str(fleet.folder.keys)}
    _say(arguments, text, value)
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}: expected a port, 0 to 65535")
    return int(text)


def _publish(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    with release.opened(arguments.bundle) as bundle:
        model = bundle.name
        stable = release.stable(fleet.repository.assignments(), model)
        if arguments.stable and stable is not None and stable.digest != bundle.digest:
            raise RolloutError(
                f"{model} has the stable release {stable.version}; --stable is for the first one, "
                "publish without it and use edge-fleet rollout start"
            )
        place, pushed = fleet.registry(), None

        def deliver(files: tuple[ReleaseFile, ...]) -> None:
            nonlocal pushed
            assert place is not None
            pushed = place.push(model, bundle.manifest.version, files)

        with fleet.folder.locked():
            done = fleet.repository.publish(bundle, deliver if place else None)
            version = done.release.version
            fleet.commit(
                f"{model} {version} is published",
                f"Manifest {done.release.digest}",
                {"Model": model, "Phase": Phase.PENDING.value, "Reason": "publish"},
            )
    if arguments.stable:
        fleet.assign_stable(model, version, Phase.SUCCEEDED, "first release of the model")
    what = "published" if done.new else "was published already"
    text = (
        f"{model} {version} ({done.release.digest.short}) {what}: {done.blobs} new files, {done.bytes} bytes"
    )
    if pushed is not None:
        text += f"; {pushed.blobs} blobs, {pushed.bytes} bytes pushed to {place}"
    if arguments.stable:
        text += "; it is the stable release of every device"
    value = {
        "model": model,
        "version": version,
        "digest": done.release.digest,
        "new": done.new,
        "files": done.blobs,
        "bytes": done.bytes,
        "stable": arguments.stable,
        "pushed_bytes": pushed.bytes if pushed else None,
    }
    _say(arguments, text, value)
    return 0


def _push(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    place = fleet.registry()
    if place is None:
        raise FleetConfigError("fleet.yaml names no registry; add registry: {address: oci://host/name}")
    models = [_chosen_model(fleet, arguments.model)] if arguments.model or arguments.version else None
    releases = fleet.repository.releases()
    values = []
    for model in models or releases:
        wanted = (
            [Version(arguments.version)] if arguments.version else [one.version for one in releases[model]]
        )
        for version in wanted:
            done = place.push(model, version, fleet.repository.files(model, version))
            values.append({"model": model, "version": version, "blobs": done.blobs, "bytes": done.bytes})
    lines = [f"{one['model']} {one['version']}: {one['blobs']} blobs, {one['bytes']} bytes" for one in values]
    _say(arguments, "\n".join([f"pushed to {place}:", *lines]), values)
    return 0


def _devices(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    devices = fleet.devices()
    document = fleet.repository.assignments()
    models = [_chosen_model(fleet, arguments.model)] if arguments.model else list(document.models)
    if not models:
        raise RolloutError("nothing is assigned yet; run edge-fleet publish BUNDLE --stable")
    source = fleet.source()
    texts, values = [], {}
    for model in models:
        readings = source.read(devices, model)
        texts.append(status.device_table(devices, readings, model))
        values[model] = {
            device.id: {
                "reachable": (one := readings[device.id]).reachable,
                "problem": one.problem,
                "version": one.version,
                "digest": one.digest,
                "state": one.state,
                "results": dict(one.results),
            }
            for device in devices
        }
    _say(arguments, "\n\n".join(texts), values)
    return 0


def _start(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    version = Version(arguments.release)
    model = _chosen_model(fleet, arguments.model)
    if release.stable(fleet.repository.assignments(), model) is None:
        first = fleet.assign_stable(model, version, Phase.SUCCEEDED, "first release of the model")
        text = f"{model} {version} is the first release of the model: every device gets it, without a canary"
        _say(arguments, text, {"model": model, "version": version, "digest": first.digest, "rollout": None})
        return 0
    record = controller.start(fleet, model, version, again=arguments.again)
    _say(arguments, f"{status.table(record)}\nnext: edge-fleet rollout run {record.id}", record)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    record = status.load(fleet.folder.rollouts, _chosen_rollout(fleet, arguments.id))
    _say(arguments, status.table(record), record)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    rollout = _chosen_rollout(fleet, arguments.id)
    record = None
    for record in Controller(fleet).run(rollout):
        if not arguments.json:
            print(status.line(record, time.time()), flush=True)
    if record is not None and arguments.json:
        _say(arguments, "", record)
    return 0 if record is not None and record.phase is Phase.SUCCEEDED else 1


def _command(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    rollout = _chosen_rollout(fleet, arguments.id)
    reason = arguments.reason or f"{arguments.event.value} by hand"
    record = controller.command(fleet, rollout, arguments.event, reason)
    text = status.line(record, time.time())
    if not record.settled:
        text += f"\nnext: edge-fleet rollout run {record.id}"
    _say(arguments, text, record)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    model = _chosen_model(fleet, arguments.model)
    before = release.stable(fleet.repository.assignments(), model)
    version = Version(arguments.to) if arguments.to else controller.previous_stable(fleet, model).version
    came_from = before.version if before else None
    reason = arguments.reason or f"fleet-wide rollback from {came_from or 'nothing'}"
    chosen = fleet.assign_stable(model, version, Phase.ROLLED_BACK, reason)
    text = f"{model} {version} ({chosen.digest.short}) is stable again; devices follow at their next poll"
    value = {"model": model, "from": came_from, "to": version, "digest": chosen.digest}
    _say(arguments, text, value)
    return 0


def _refresh(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    with fleet.folder.locked():
        roles = fleet.repository.refresh_offline() if arguments.offline else ()
        roles += fleet.repository.refresh(force=arguments.force)
        if roles:
            fleet.commit(f"Metadata re-signed: {', '.join(roles)}", trailers={"Reason": "refresh"})
        expires = fleet.repository.expires()
    lines = [f"{role:>10} expires {at:%Y-%m-%d %H:%M} UTC" for role, at in expires.items()]
    text = "\n".join([f"re-signed: {', '.join(roles) or 'nothing was due'}", *lines])
    value = {"signed": list(roles), "expires": {role: at.isoformat() for role, at in expires.items()}}
    _say(arguments, text, value)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    fleet = folder.opened(arguments.fleet)
    server = StaticServer(fleet.folder.repository, arguments.host, arguments.port)
    server.start()
    print(f"serving {fleet.folder.repository} on {server.url}", flush=True)
    can_sign = all(fleet.repository.keys.has(role) for role in ONLINE)
    if not can_sign:
        print("the online keys are not here: the metadata is not re-signed", flush=True)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        if can_sign:
            keep_fresh(lambda: _resign(fleet), stop)
        else:
            stop.wait()
    finally:
        server.stop()
    return 0


def _resign(fleet: Fleet) -> None:
    """What ``serve`` does every minute: a failure is said and tried again, the files stay served."""
    try:
        with fleet.folder.locked():
            if roles := fleet.repository.refresh():
                fleet.commit(f"Metadata re-signed: {', '.join(roles)}", trailers={"Reason": "refresh"})
                print(f"re-signed {', '.join(roles)}", flush=True)
    except (FleetError, OSError) as error:
        print(f"edge-fleet: re-signing failed: {error}", file=sys.stderr, flush=True)


def _simulate(arguments: argparse.Namespace) -> int:
    from fleet.simulate import run  # the real updater comes with it; no other verb pays for that

    return run(arguments.devices, Version(arguments.bad_version), keep=arguments.keep, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

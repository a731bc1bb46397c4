"""Roll-out records: what was decided, when, and on which evidence. ``rollouts/<id>.json``.

The record is the whole state of a roll-out: a controller that is started anew goes on from it. The tool
writes the file, whole and canonical; people read it, and git keeps every version.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.assignments import Release
from fleet.analysis import MetricState
from fleet.config import Policy
from fleet.errors import RolloutError
from fleet.inventory import Device
from fleet.machine import FINAL, Event, Phase
from fleet.measure import Reading
from fleet.plan import Plan

FORMAT = 1


class Evidence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a decision was made on."""

    wave: str = ""
    running: int = 0  # devices of the wave that run the candidate
    waiting: tuple[str, ...] = ()  # reachable, not yet there
    unreachable: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    metrics: dict[str, MetricState] = {}


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision."""

    at: str  # ISO 8601, UTC
    event: Event
    phase: Phase  # after it
    reason: str
    evidence: Evidence = Evidence()


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of one roll-out. Times are seconds since the epoch."""

    id: str
    model: str
    candidate: Release
    stable: Release
    policy: Policy
    plan: Plan
    phase: Phase
    reason: str
    started: float
    phase_since: float
    wave_since: float  # when the wave's assignment was signed, or resumed
    wave: int = 0
    bake_since: float | None = None  # since when the wave runs the candidate
    stopped: bool = False  # a person aborted it
    held: tuple[str, ...] = ()  # devices that keep what they have
    baseline: dict[str, float] = {}  # bad update results of a device before it was in the cohort
    failed: dict[str, str] = {}  # devices that failed, and why
    metrics: dict[str, MetricState] = {}  # of this wave
    references: dict[str, float] = {}  # the control's last means
    settled: bool = False  # final, and what it wants is signed
    history: tuple[Entry, ...] = ()
    format: int = FORMAT


def stamp(at: float) -> str:
    """A time for people and records."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")


def path(folder: Path, rollout: str) -> Path:
    """Where the record of ``rollout`` lies."""
    return folder / f"{rollout}.json"


def save(folder: Path, record: Record) -> None:
    """Write the record, whole or not at all."""
    folder.mkdir(exist_ok=True)
    staged = folder / f".{record.id}.new"
    with staged.open("wb") as file:
        file.write(wire.to_json(record))
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path(folder, record.id))


def load(folder: Path, rollout: str) -> Record:
    """Read one record.

    Raises:
        RolloutError: there is none, or it cannot be read.
    """
    try:
        record = wire.from_json(path(folder, rollout).read_bytes(), Record)
    except OSError as error:
        known = ", ".join(record.id for record in records(folder)) or "none"
        raise RolloutError(f"no roll-out {rollout}; there are: {known}") from error
    except ValueError as error:
        raise RolloutError(f"{path(folder, rollout)} cannot be read: {error}") from error
    if record.format != FORMAT:
        raise RolloutError(f"{path(folder, rollout)} has format {record.format}, this program reads {FORMAT}")
    return record


def records(folder: Path) -> list[Record]:
    """Every record, oldest first.

    Raises:
        RolloutError: one cannot be read.
    """
    found = [load(folder, file.stem) for file in folder.glob("[!.]*.json")]
    return sorted(found, key=lambda record: record.started)


def open_records(folder: Path, model: str | None = None) -> list[Record]:
    """Roll-outs that still want something, of one model or of all."""
    return [record for record in records(folder) if not record.settled and model in {None, record.model}]


def line(record: Record, now: float) -> str:
    """One line of progress."""
    wave = record.plan.waves[record.wave]
    text = f"{record.id}  {record.phase.value}"
    if record.phase not in FINAL:
        text += f"  wave {record.wave + 1}/{len(record.plan.waves)} {wave.name} ({wave.devices} devices)"
    return f"{text}  {now - record.started:.0f} s  {record.reason}"


def table(record: Record) -> str:
    """A roll-out for a person: the plan, the decisions, the metrics of the present wave."""
    versions = f"{record.candidate.version} ({record.candidate.digest.short})"
    lines = [
        f"roll-out   {record.id}",
        f"model      {record.model}  {record.stable.version} -> {versions}",
        f"phase      {record.phase.value}: {record.reason}",
        "waves      "
        + ", ".join(
            f"{'*' if number == record.wave else ''}{wave.name} ({wave.devices})"
            for number, wave in enumerate(record.plan.waves)
        ),
        f"canary     {', '.join(record.plan.canary)}",
        *(f"           {reason}" for reason in record.plan.reasons),
        f"power      {record.plan.power}",
    ]
    lines += [f"failed     {device}: {why}" for device, why in sorted(record.failed.items())]
    for name, state in record.metrics.items():
        last = state.last.explanation if state.last else "not measured yet"
        lines.append(f"metric     {name}: {state.passes} passed, {state.failures} failed; {last}")
    lines += [
        f"{entry.at}  {entry.event.value:>12} -> {entry.phase.value}: {entry.reason}"
        for entry in record.history
    ]
    return "\n".join(lines)


def device_table(devices: Sequence[Device], readings: dict[str, Reading], model: str) -> str:
    """The devices and what they run, for a person."""
    rows = [("DEVICE", "MODEL", "VERSION", "DIGEST", "UPDATE", "BAD", "LABELS")]
    for device in devices:
        reading = readings[device.id]
        labels = ",".join(f"{key}={value}" for key, value in sorted(device.labels.items()))
        if reading.reachable:
            digest = reading.digest.removeprefix("sha256:")[:12] or "-"
            rows.append(
                (
                    device.id,
                    model,
                    reading.version or "-",
                    digest,
                    reading.state or "-",
                    f"{reading.bad_results:.0f}",
                    labels,
                )
            )
        else:
            rows.append((device.id, model, "-", "-", f"unreachable: {reading.problem}", "-", labels))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

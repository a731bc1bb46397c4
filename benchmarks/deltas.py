"""What moves to a device when a model changes: whole, compressed, or as a difference to what it has.

The product's own way: ``quantize-model`` makes the bundles, ``fleet.repository`` publishes them, the device's
code fetches and proves the members. The weights are made in code (models.py), so "retrained" is another draw,
and tuning is noise of a given size on top: real training moves weights less evenly. Counts of bytes need no
quiet machine; times do.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks import models
from benchmarks.machine import describe, table
from edge_agent.contract import transfers as documents
from edge_agent.contract.bundle import RULES, Bundle, open_bundle, write_bundle
from edge_agent.contract.transfers import Transfers
from edge_agent.contract.version import Version
from edge_agent.update.fetch import fetch_members
from edge_agent.update.source import FolderSource
from examples.demo.processes import ours
from fleet.repository import Keys, Repository

WIDTHS = [1024, 256, 64, 256, 1024]
NAME = "bench"

# Runs in a process of its own: the peak of this one has seen the quantizer's.
_OPEN = """
import sys, time
from pathlib import Path
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Member
from edge_agent.update.parcel import open_parcel
import zstandard
frame, base, digest, size, out = sys.argv[1:]
def peak():  # not getrusage: that one remembers the process which started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
started = time.perf_counter()
open_parcel(Path(frame), Path(base) if base else None, Member(Digest(digest), int(size)), Path(out))
print(time.perf_counter() - started, peak() - before)
"""


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="edge-deltas-") as folder:
        print("\n### What moves when a model changes\n")
        _measure(Path(folder))


def _measure(folder: Path) -> None:
    fp32 = models.autoencoder(folder / "fp32.onnx", WIDTHS)
    np.savez(folder / "calibration.npz", X=models.rows(300))
    first = _quantized(folder, fp32, "1.0.0")
    cases = [
        ("rules only", _other_rules(folder, first, "1.1.0")),
        ("last layer tuned (5 % noise)", _quantized(folder, _tuned(folder, fp32, 0.05, last=True), "1.2.0")),
        ("all layers tuned (1 % noise)", _quantized(folder, _tuned(folder, fp32, 0.01, last=False), "1.3.0")),
        (
            "retrained (other weights)",
            _quantized(folder, models.autoencoder(folder / "new.onnx", WIDTHS, seed=1), "1.4.0"),
        ),
    ]
    lines = [_line(folder / str(number), first, *case) for number, case in enumerate(cases)]
    head = [
        "change",
        "bundle",
        "members that differ",
        "moved with parcels",
        "of it",
        "publish",
        "open",
        "memory",
    ]
    print(table(head, lines))
    print(
        "\nBytes of members. *members that differ*: what moves without parcels. *of it*: share that is left. "
        "*publish*: with making the parcels. *open*: the largest parcel on this machine; *memory*: its peak "
        "above that of the process before.\n"
    )


def _line(folder: Path, first: Bundle, label: str, second: Bundle) -> list[str]:
    repository = Repository.create(folder / "repository", Keys(folder / "keys"))
    repository.publish(first)
    started = time.perf_counter()
    repository.publish(second)
    published = time.perf_counter() - started
    found = list(repository.path.glob(f"targets/transfers/{NAME}/*.{second.manifest.version}.json"))
    transfers = documents.parse(found[0].read_bytes()) if found else Transfers()
    have = {member.digest for member in first.manifest.members.values()}
    lacking = [name for name, member in second.manifest.members.items() if member.digest not in have]
    whole = sum(second.manifest.members[name].size for name in lacking)
    for name in ("staged", "partial", "store"):
        (folder / name).mkdir()
    for name, member in first.manifest.members.items():
        (folder / "store" / member.digest.hex).write_bytes(first.read(name))
    moved = fetch_members(
        FolderSource(repository.path), second.manifest, lacking, folder / "staged", folder / "partial",
        lambda _: None, transfers, folder / "store",
    )  # fmt: skip
    assert all((folder / "staged" / name).read_bytes() == second.read(name) for name in lacking)
    opened, memory = _opened(folder, repository, second, transfers)
    return [
        label, f"{second.manifest.size:,}", f"{whole:,}", f"{moved:,}", f"{moved / max(whole, 1):.0%}",
        f"{published:.1f} s", opened, memory,
    ]  # fmt: skip


def _opened(folder: Path, repository: Repository, bundle: Bundle, transfers: Transfers) -> tuple[str, str]:
    chosen = [
        (min(parcels, key=lambda parcel: parcel.size), bundle.manifest.members[name])
        for name, parcels in transfers.members.items()
    ]
    if not chosen:
        return "-", "-"
    parcel, member = max(chosen, key=lambda pair: pair[1].size)
    base = str(folder / "store" / parcel.base.hex) if parcel.base else ""
    frame = repository.path / "blobs" / "sha256" / parcel.digest.hex
    said = subprocess.run(
        [sys.executable, "-c", _OPEN, frame, base, str(member.digest), str(member.size), folder / "out"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return f"{float(said[0]) * 1e3:.0f} ms", f"{int(said[1]) / 1024:.1f} MB"


def _quantized(folder: Path, fp32: Path, version: str) -> Bundle:
    subprocess.run(
        [ours("quantize-model"), fp32, "--calibration", folder / "calibration.npz", "--name", NAME,
         "--version", version, "--out", folder / "out", "--score", "mse", "--fast"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return open_bundle(folder / "out" / f"{NAME}-{version}")


def _tuned(folder: Path, fp32: Path, noise: float, *, last: bool) -> Path:
    """The model with noise on its matrices, relative to each one's spread: on the last, or on all."""
    chance = np.random.default_rng(9)
    model = onnx.load(fp32)
    weights = sorted((w for w in model.graph.initializer if w.name[0] == "w"), key=lambda w: int(w.name[1:]))
    for weight in weights[-1:] if last else weights:
        matrix = numpy_helper.to_array(weight)
        moved = matrix + noise * matrix.std() * chance.normal(size=matrix.shape)
        weight.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), weight.name))
    path = folder / f"tuned-{noise}-{last}.onnx"
    onnx.save(model, path)
    return path


def _other_rules(folder: Path, first: Bundle, version: str) -> Bundle:
    target = folder / f"rules-{version}"
    target.mkdir()
    files = {name: first.read(name) for name in first.manifest.members}
    files[RULES] += b"# another line\n"
    manifest = msgspec.structs.replace(first.manifest, version=Version(version))
    return write_bundle(target, manifest, files)


if __name__ == "__main__":
    print(f"Measured on {describe()}.")
    main()

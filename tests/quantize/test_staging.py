"""Disk full, Ctrl-C, kill -9: what is left in the output folder."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantize.staging import staging, sweep
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize


def command(model: Path, data: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "quantize", str(model), "--calibration", str(data)]
    return [*words, "--fast", "--name", "unit", "--version", "1.2.3", "--out", str(out)]


def in_the_middle(words: list[str], out: Path) -> subprocess.Popen[str]:
    """Start the command and return as soon as its staging folder is seen."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.name.endswith(".staging") for path in out.iterdir()):
        pass
    return process


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return models.write_rows(tmp_path / "many.npz", np.tile(models.rows(500), (100, 1)))


def test_what_a_killed_run_left_is_swept_by_the_next(autoencoder, calibration, many, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    killed = in_the_middle(command(autoencoder, many, out), out)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert sum(path.name.endswith(".staging") for path in out.iterdir()) == 1
    assert quantize(autoencoder, calibration, out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "mine.txt", "unit-1.2.3", "unit-1.2.3.report.html", "unit-1.2.3.report.json", "unit-1.2.3.tar",
    ]  # fmt: skip


def test_a_run_that_still_works_keeps_its_folder(tmp_path):
    with staging(tmp_path, "one") as first, staging(tmp_path, "two") as second:
        assert first.exists()
        assert second.exists()
        assert sweep(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_process_that_died_before_it_could_lock_it_is_swept_when_it_is_old(tmp_path):
    import os

    young, old = tmp_path / ".a-1.staging", tmp_path / ".b-2.staging"
    young.mkdir()
    old.mkdir()
    os.utime(old, (1e9, 1e9))
    assert sweep(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".a-1.staging"]


def test_links_and_files_that_look_like_staging_are_left_alone(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".x.staging").symlink_to(tmp_path / "precious")
    (tmp_path / ".y.staging").write_text("a file")
    assert sweep(tmp_path) == 0
    assert (tmp_path / "precious").is_dir()


def test_files_that_cannot_grow_end_in_one_line_and_nothing_left(autoencoder, calibration, tmp_path):
    """The limit on the size of a file fails a write in the middle, as a full disk does."""
    out = tmp_path / "out"
    done = subprocess.run(
        command(autoencoder, calibration, out),
        capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("quantize-model: ")
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_disk_that_is_full_ends_in_one_line_and_nothing_left(autoencoder, calibration, tmp_path):
    """A real file system of 40 kB: a tmpfs in a mount namespace of its own."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    out = tmp_path / "small"
    out.mkdir()
    (tmp_path / "cwd").mkdir()
    words = " ".join(f"'{word}'" for word in command(autoencoder, calibration, out))
    script = f"mount -t tmpfs -o size=40k none '{out}' && {words}; code=$?; ls -A '{out}'; exit $code"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[:100]}")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_interrupt_while_the_bundle_moves_into_place_puts_everything_back(
    autoencoder, calibration, tmp_path, monkeypatch
):
    from quantize import bundle

    out = tmp_path / "out"
    assert quantize(autoencoder, calibration, out) == 0
    before = {path: path.stat().st_ino for path in out.rglob("*")}
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(bundle.Path, "rename", interrupted)
    assert quantize(autoencoder, calibration, out, "--threshold", "3", "--overwrite") == 130
    monkeypatch.undo()
    assert {path: path.stat().st_ino for path in out.rglob("*")} == before

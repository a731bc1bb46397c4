"""Ctrl-C and SIGTERM at any moment: exit code 128 + signal, one line, nothing left, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.quantize import models

IMPORTS = "imports"
STEPS = ("load", "prepare", "calibrate", "int8", "validate", "verify")


@pytest.fixture
def start(autoencoder, tmp_path):
    """The command in a process group of its own, its temporary files below ``tmp_path``."""
    data = models.write_rows(tmp_path / "many.npz", np.tile(models.rows(500), (20, 1)))
    out, temporary = tmp_path / "made" / "out", tmp_path / "tmp"
    temporary.mkdir()
    words = [sys.executable, "-m", "quantize", str(autoencoder), "--calibration", str(data)]
    words += ["--fast", "--name", "unit", "--version", "1.2.3", "--out", str(out)]

    def started(*, ignored: bool = False) -> subprocess.Popen[bytes]:
        # Whoever runs the tests in the background of a shell gives them, and their children, SIGINT ignored.
        handler = signal.SIG_IGN if ignored else signal.default_int_handler
        before = signal.signal(signal.SIGINT, handler)
        try:
            return subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, env=dict(os.environ, TMPDIR=str(temporary)),
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)

    return started


def read_until(process: subprocess.Popen[bytes], step: str) -> str:
    """What the command says until it is in ``step``; in its imports, when numpy is there."""
    if step == IMPORTS:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "_multiarray_umath" not in maps.read_text():
            pass
        return ""
    assert process.stderr is not None
    read = b""
    while not read.decode().rpartition("\n")[2].startswith(step):
        piece = os.read(process.stderr.fileno(), 1)
        assert piece, read.decode()
        read += piece
    return read.decode()


def group_of(process: subprocess.Popen[bytes]) -> bool:
    """Whether anybody of the process's group is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("step", "number"),
    [(IMPORTS, signal.SIGINT), *((step, signal.SIGINT) for step in STEPS), ("int8", signal.SIGTERM)],
)
def test_a_signal_at_any_step_leaves_nothing_behind(start, tmp_path, step, number):
    before = sorted(tmp_path.rglob("*"))
    process = start()
    read = read_until(process, step)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    said = (read + error.decode()).splitlines()
    assert process.returncode == 128 + number
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert said[-1] == f"quantize-model: {word}, nothing was written"
    assert all(line.split()[0] in (*STEPS, "prune", "bundle", "report") for line in said[:-1])
    assert output == b""
    assert sorted(tmp_path.rglob("*")) == before
    while group_of(process):  # a child that was just being started ends with its standard input
        pass


def test_a_second_signal_does_not_stop_the_cleaning_up(start, tmp_path):
    process = start()
    read_until(process, "calibrate")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().count("quantize-model:") == 1
    assert not (tmp_path / "made").exists()


def test_a_signal_that_the_parent_ignores_stays_ignored(start, tmp_path):
    """``nohup`` and the background of a script."""
    process = start(ignored=True)
    read_until(process, "calibrate")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert (tmp_path / "made" / "out" / "unit-1.2.3").is_dir()


def test_who_reads_no_further_gets_no_traceback(autoencoder):
    words = [sys.executable, "-m", "quantize", str(autoencoder), "--inspect"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 1

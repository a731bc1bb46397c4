"""Every log line is one JSON object, whatever is logged."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.telemetry import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", stream)
    yield stream
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_with_its_fields(stream: io.StringIO) -> None:
    logs.EventLog("edge_agent.update").event("release_rejected", model="pump", reason="signature", rows=3)
    (line,) = lines(stream)
    assert line["event"] == "release_rejected"
    assert (line["model"], line["reason"], line["rows"]) == ("pump", "signature", 3)
    assert (line["level"], line["logger"]) == ("info", "edge_agent.update")
    assert line["time"].endswith("+00:00")


def test_plain_logging_calls_and_warnings_have_the_same_form(stream: io.StringIO) -> None:
    logging.getLogger("tuf").warning("root %s expires\nsoon", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = lines(stream)
    assert (first["logger"], first["message"]) == ("tuf", "root 3 expires\nsoon")
    assert "DeprecationWarning: old" in second["message"]


def test_an_error_says_what_was_raised_and_where(stream: io.StringIO) -> None:
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        logs.EventLog("queue").error("append_failed", error=error, path=Path("/x"))
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert line["error"] == "OSError: [Errno 28] No space left on device"
    assert line["path"] == "/x"
    assert "test_an_error_says_what_was_raised_and_where" in line["traceback"]


def test_below_the_level_nothing_is_written(stream: io.StringIO) -> None:
    logs.EventLog("x").debug("noise")
    assert stream.getvalue() == ""


class _Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, b"\xff", "\ud800", _Unshowable(), object(), 2**80, {("a", 1): 2}],
)
def test_no_value_breaks_the_line(stream: io.StringIO, value: object) -> None:
    logs.EventLog("x").event("odd", value=value)
    (line,) = lines(stream)
    assert line["event"] == "odd"
    assert "value" in line


def test_a_field_cannot_hide_the_line_s_own(stream: io.StringIO) -> None:
    logs.EventLog("x").warning("real", time=0, level="debug", event="false", rows=1)
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["rows"]) == ("real", "warning", 1)


def test_wrong_arguments_of_a_log_call_do_not_raise() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%d rows", ("many",), None)
    assert "many" in json.loads(logs.JsonFormatter().format(record))["message"]


def test_the_default_is_stderr() -> None:
    script = (
        "from edge_agent.telemetry import logs; logs.configure('info'); logs.EventLog('x').event('started')"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=30)
    assert child.stdout == b""
    assert json.loads(child.stderr)["event"] == "started"

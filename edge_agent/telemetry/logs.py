"""One JSON object per line on stderr, whoever logs: for people with ``jq`` and for log collectors.

Invariants: a line is always one valid JSON object; logging never raises, whatever the values; a library that
uses ``logging`` gets the same form.

    log = EventLog(__name__)
    log.event("release_rejected", model="pump", reason="signature")

gives ``{"time": ..., "level": "info", "logger": ..., "event": "release_rejected", "model": "pump", ...}``; a
plain ``logging`` call has ``message`` instead of ``event`` and fields. Nothing is logged per request.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec

_FIELDS: Final = "edge_fields"  # the attribute of a LogRecord that carries an event's fields
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class EventLog:
    """A logger of named events with typed fields, on top of ``logging``."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def event(self, event: str, /, **fields: Any) -> None:
        """Something worth knowing happened; the name is ``snake_case`` and stable."""
        self._emit(logging.INFO, event, fields)

    def debug(self, event: str, /, **fields: Any) -> None:
        """Something a developer may want to see happened."""
        self._emit(logging.DEBUG, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """Something happened that the agent copes with, but someone should look."""
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, /, *, error: BaseException | None = None, **fields: Any) -> None:
        """Something failed that should not; ``error`` adds its type, message and traceback."""
        self._emit(logging.ERROR, event, fields, error)

    def _emit(
        self, level: int, event: str, fields: dict[str, Any], error: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, exc_info=error, extra={_FIELDS: fields}, stacklevel=3)


class JsonFormatter(logging.Formatter):
    """A LogRecord as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, _FIELDS, None)
        if fields is None:
            line["message"] = _message(record)
        else:
            line["event"] = record.msg
            line.update((key, value) for key, value in fields.items() if key not in line)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = f"{type(error).__name__}: {error}"
            line["traceback"] = "".join(traceback.format_exception(error))
        return _encode(line)


def configure(level: str, stream: TextIO | None = None) -> None:
    """Send every log record of this process from ``level`` on as JSON lines to ``stream``, else stderr.

    Args:
        level: debug, info, warning or error.
        stream: where to; None is stderr.
    """
    target = logging.StreamHandler(stream or sys.stderr)
    target.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [target]
    root.setLevel(_LEVELS[level])
    logging.captureWarnings(True)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # wrong arguments of a log call must not end the agent
        return f"{record.msg} {record.args!r}"


def _encode(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=str).decode()
    except Exception:  # a value that cannot be written is shown as it shows itself
        return msgspec.json.encode({key: _shown(value) for key, value in line.items()}).decode()


def _shown(value: Any) -> str:
    try:
        return str(value).encode(errors="replace").decode()
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__}>"

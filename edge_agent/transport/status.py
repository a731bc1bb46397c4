"""Errors to HTTP statuses: the one table, used by both transports. The domain knows no status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

from edge_agent.contract.errors import ContractError
from edge_agent.errors import (
    BadRules,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    Overloaded,
    StoreError,
    Unavailable,
    UnknownModel,
    UpdateRejected,
)

STATUS_BY_ERROR: Final[Mapping[type[Exception], int]] = {
    UnknownModel: 404,
    InvalidInput: 400,
    Overloaded: 429,
    DeadlineExceeded: 504,
    Unavailable: 503,
    ContractError: 400,
    BadRules: 400,
    EngineError: 400,  # only load and install raise it: that model cannot be loaded
    UpdateRejected: 409,
    StoreError: 500,
}
"""Looked up along the error's class, most specific first; whatever is not listed is a 500."""

OUTCOMES: Final = ("ok", "client_error", "unavailable", "error")  # labels of edge_requests_total


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; 500 for what the table does not know."""
    for kind in type(error).__mro__:
        if kind in STATUS_BY_ERROR:
            return STATUS_BY_ERROR[cast("type[Exception]", kind)]
    return 500


def outcome(status: int) -> str:
    """The label of ``edge_requests_total`` for an HTTP-like status."""
    if status < 400:
        return "ok"
    if status in (429, 503, 504):
        return "unavailable"
    return "client_error" if status < 500 else "error"

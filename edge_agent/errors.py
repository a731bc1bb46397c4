"""Errors of the agent, by who must act.

::

    EdgeError
    ├── ConfigError            the operator: agent.yaml is wrong (.path: where)
    ├── InvalidInput           the caller: wrong shape, type, name, size
    │   └── UnknownModel       the caller: no such model or version
    ├── Unavailable            the caller may retry: cannot answer now
    │   ├── Overloaded         too many requests wait
    │   └── DeadlineExceeded   no time left, and no rules to answer instead
    ├── EngineError            the model: it cannot be loaded or raised while running
    ├── BadRules               whoever edited rules.yaml
    ├── StoreError             the device: disk, permissions, another agent (.reason)
    ├── SourceError            the network or the medium: the repository cannot be reached
    └── UpdateRejected         the publisher: signature, expiry, floor, golden mismatch (.reason)

Errors of the formats themselves are ``edge_agent.contract.errors.ContractError``. The domain knows no HTTP
status and no exit code: ``transport/status.py`` and ``cli.py`` each hold one table.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of the agent's expected failures. The message is one sentence for the person who must act."""


class ConfigError(EdgeError):
    """The configuration is wrong: unknown key, wrong type, impossible value."""


class InvalidInput(EdgeError):
    """The request cannot be understood; names the field, what was expected and what came."""


class UnknownModel(InvalidInput):
    """No model of that name or version is served here."""


class Unavailable(EdgeError):
    """No answer can be given now; asking again later may work."""


class Overloaded(Unavailable):
    """Too many requests are waiting; this one was refused at once."""


class DeadlineExceeded(Unavailable):
    """The request's time ran out and no rules could answer instead."""


class EngineError(EdgeError):
    """onnxruntime refused the model or raised while running it."""


class BadRules(EdgeError):
    """rules.yaml cannot be read, or a rule makes no sense for this model."""


class StoreError(EdgeError):
    """The store cannot be read or written. ``reason`` is one word for metrics and tests."""

    def __init__(self, message: str, *, reason: str = "store") -> None:
        super().__init__(message)
        self.reason = reason


class SourceError(EdgeError):
    """The release repository cannot be reached or answers nonsense; the next poll tries again."""


class UpdateRejected(EdgeError):
    """A release or its metadata was refused. ``reason`` is one word for metrics and tests."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

"""Errors of ``quantize-model``, by who must act.

::

    QuantizeError
    ├── BadModel      whoever exported the model: not ONNX, already quantized, cannot run
    ├── BadData       whoever prepared the rows: width, NaN, labels, file form
    └── OutputError   whoever runs the command: the output folder, disk space, a version that exists

The message is one line: what, which, expected, got, what to do. ``cli.py`` alone knows exit codes.
"""

from __future__ import annotations


class QuantizeError(Exception):
    """Root of the expected failures: the command ends, nothing is left behind."""


class BadModel(QuantizeError):
    """The model file cannot be used."""


class BadData(QuantizeError):
    """The calibration or validation data cannot be used."""


class OutputError(QuantizeError):
    """The bundle cannot be written where it was asked for."""

"""Errors a user can act on: each names the input, what was expected and, where there is one, the way out.

Everything claq raises on purpose derives from :class:`ClaqError`; the command line prints such an error as one
message and exits with its ``exit_code``, anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class ClaqError(Exception):
    """Base of all errors claq raises on purpose."""

    exit_code = 1


class ConfigError(ClaqError):
    """A setting is out of range or contradicts another one."""

    exit_code = 2


class ModelError(ClaqError):
    """The model cannot be read: files missing or damaged, weights not finite, unknown task."""

    exit_code = 3


class CaptureError(ClaqError):
    """``torch.export`` could not turn the model into a graph."""

    exit_code = 4


class CalibrationError(ClaqError):
    """The calibration data cannot be read or is not enough."""

    exit_code = 5


class FormatError(ClaqError):
    """A quantized layer or an artifact breaks a rule of ``docs/format.md``."""

    exit_code = 6


class OutputError(ClaqError):
    """The artifact cannot be written: folder not writable, disk full."""

    exit_code = 7


class VerificationError(ClaqError):
    """The written artifact disagrees with the PyTorch quantized model."""

    exit_code = 8


def first_line(error: BaseException) -> str:
    """The first line of another library's error that says something; of one without a message its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Triton kernels for NVIDIA GPUs that compute with the packed codes of ``docs/format.md`` as they are stored.

Importing this package imports neither Triton nor CUDA; :mod:`..cuda` calls :mod:`.launch` when ``claq::linear`` first runs
on a CUDA tensor.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["available"]


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None

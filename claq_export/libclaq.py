"""Finds libclaq, the native library of the distribution ``claq-runtime``, for the rooms that call its C interface."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def load_libclaq() -> tuple[ctypes.CDLL | None, str]:
    """The library and an empty string, or None and the reason why there is none."""
    try:
        import claq_runtime
    except ImportError:
        return None, "the distribution claq-runtime is not installed (pip install ./runtime)"
    try:
        return ctypes.CDLL(claq_runtime.library_path()), ""
    except OSError as error:  # FileNotFoundError, or what the dynamic loader says
        return None, f"libclaq cannot be loaded: {error}"

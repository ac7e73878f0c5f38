"""Triton kernels for NVIDIA GPUs that compute with the packed codes of ``docs/format.md`` as they are stored.

Importing this package imports neither Triton nor CUDA; :func:`register` gives ``claq::linear`` its CUDA kernel, which
imports them when it first runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["available", "register"]

_library: torch.library.Library | None = None


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def _linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    from .launch import linear

    with torch.cuda.device(x.device):
        return linear(x, *rest)


def register() -> bool:
    """Make these kernels the CUDA implementation of ``torch.ops.claq.linear``; once, further calls do nothing.

    Returns:
        False when Triton is not installed: the operator then keeps its reference implementation on CUDA.
    """
    global _library
    if not available():
        return False
    if _library is None:
        _library = torch.library.Library("claq", "IMPL")
        _library.impl("linear", _linear, "CUDA")
    return True

"""The threads that libclaq spreads its work over when PyTorch calls it."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

_forked = False
"""OpenMP's threads are not in a forked child, where its runtime would wait for them; libclaq makes itself a pool there."""

Threads = tuple[ctypes.c_void_p | None, Any]
"""``parallel_for`` and ``context`` of libclaq's C interface."""


class _OpenMP(ctypes.Structure):
    """``claq_openmp`` of claq.h."""

    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_uint))


def threads_for(library: ctypes.CDLL, count: int | None = None) -> Threads:
    """``count`` threads, None: as many as PyTorch's operators take; nothing for one.

    They are PyTorch's own where it runs on OpenMP: its threads wait for the next operator by spinning, and a pool of libclaq's
    beside them would have to share the processors with what only waits. Else they are libclaq's.
    """
    count = torch.get_num_threads() if count is None else count
    return _threads(library, count) if count > 1 else (None, None)


@cache
def _threads(library: ctypes.CDLL, count: int) -> Threads:
    parallel = _openmp_parallel()
    if parallel is None or not hasattr(library, "claq_openmp_parallel_for"):
        return ctypes.cast(library.claq_pool_parallel_for, ctypes.c_void_p), ctypes.c_void_p(count)
    team = _OpenMP(ctypes.cast(parallel, ctypes.c_void_p), count)
    return ctypes.cast(library.claq_openmp_parallel_for, ctypes.c_void_p), ctypes.pointer(team)


def _openmp_parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch is linked with; None where there is none."""
    if _forked or not hasattr(os, "RTLD_NOLOAD") or "backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A handle to what is loaded already: a symbol is looked up there and in the libraries it was linked with.
        return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    except (OSError, AttributeError):
        return None


def _after_fork() -> None:
    global _forked
    _forked = True
    _threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""Memory of this process: what the operating system counts, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # of malloc.h

_RETURNED_FROM = 1 << 20
"""Bytes of the smallest block that :func:`return_freed_memory` has given back at once."""

_returns = False
"""Whether this process was told to."""


def return_freed_memory() -> None:
    """Let the C library give every freed block of a megabyte and more back to the operating system at once.

    Left to itself glibc raises that size to 32 MB as such blocks are freed, and keeps what lies between blocks in use.
    Other C libraries have no such setting and are left alone.
    """
    global _returns
    _returns = True
    _return_from(_RETURNED_FROM)


@contextmanager
def returned_from(nbytes: int) -> Iterator[None]:
    """Give back smaller freed blocks meanwhile, where :func:`return_freed_memory` was called; else nothing is changed.

    For work on many blocks of about that size that live long: what lies between them would stay resident until the process
    ends. Each block costs page faults.
    """
    if not _returns:
        yield
        return
    _return_from(nbytes)
    try:
        yield
    finally:
        _return_from(_RETURNED_FROM)


def _return_from(nbytes: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)


def collect_garbage() -> None:
    """Free objects that only refer to each other, and trim the heap.

    Modules, graphs and exported programs are full of cycles and hold every weight: Python would come to them after as many
    new objects as there are old ones, which in a run of few large tensors is never.
    """
    gc.collect()
    trim_freed_memory()


def trim_freed_memory() -> None:
    """Let the C library give back what is free in its heap now; one that is not glibc is left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak so far stands for it
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The operating system's count of this process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""A stand-in for a full disk: a limit on the size of files, under which a write stops half-way with an OSError."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Inside the block no file of this process grows past `size` bytes.

    The limit holds for pytest's own output too, which may be a long file already: keep the block to the call that
    writes, and never make a fixture of it, since pytest prints a test's result before fixtures are taken down.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

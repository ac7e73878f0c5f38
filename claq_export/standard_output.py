"""Standard output that cannot be written (a full disk, a reader that is gone) is an error like that of any other output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import OutputError


@contextmanager
def to_standard_output() -> Iterator[None]:
    """What is printed inside is written out by the end; nothing else that may raise OSError belongs inside.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        _discard_rest()
        raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error


def _discard_rest() -> None:
    """Send what is still in the buffer nowhere: Python would write it at its end, fail again and exit with 120."""
    with suppress(OSError, ValueError):  # not every sys.stdout has a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

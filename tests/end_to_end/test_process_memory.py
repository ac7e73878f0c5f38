"""What the C library keeps of freed memory, measured in processes of their own: its settings cannot be read back."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

_BLOCKS = 200
_NBYTES = 600_000

_PROGRAM = f"""
import sys
import torch
from claq_export.process_memory import resident_bytes, return_freed_memory, returned_from, trim_freed_memory

def left_by_holes():
    trim_freed_memory()
    start = resident_bytes()
    blocks = []
    for number in range(2 * {_BLOCKS}):
        blocks.append(torch.ones({_NBYTES} if number % 2 == 0 else 1000, dtype=torch.uint8))
    del blocks[::2]
    return resident_bytes() - start

if sys.argv[1] == "told":
    return_freed_memory()
with returned_from(1 << 19):
    inside = left_by_holes()
print(inside, left_by_holes())
"""


def _left(told: bool) -> tuple[int, int]:
    command = [sys.executable, "-c", _PROGRAM, "told" if told else ""]
    inside, after = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(inside), int(after)


def test_smaller_blocks_go_back_at_once_meanwhile_and_only_then():
    inside, after = _left(told=True)
    assert inside < _BLOCKS * _NBYTES / 4
    assert after > _BLOCKS * _NBYTES / 2


def test_a_process_that_was_not_told_is_left_alone():
    """A service that quantizes keeps its own settings; glibc's first threshold of 128 KiB rises as larger blocks are
    freed, so what is left between blocks is kept in the second round at least."""
    assert _left(told=False)[1] > _BLOCKS * _NBYTES / 2

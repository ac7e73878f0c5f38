"""Activations on disk: what a calibration walk holds past its memory budget goes to a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from ..errors import OutputError

SPILL_FROM = 1 << 16
"""Bytes from which a tensor is worth a file."""


SHARE_OF_WEIGHTS = 0.25
"""Activations that stay in memory where nothing else is said, as a share of the model's weights in float32."""

LEAST_BUDGET = 128 << 20
"""The same in bytes at least: that much is nothing beside PyTorch itself."""


def usual_budget(weight_bytes: int) -> int:
    """Bytes of activations that stay in memory where no limit was given.

    Args:
        weight_bytes: of the model's weights in float32.
    """
    return max(int(SHARE_OF_WEIGHTS * weight_bytes), LEAST_BUDGET)


class Spilled:
    """A tensor in a spill's file; its bytes are as they were. Its place is free again when nothing refers to it."""

    def __init__(self, spill: ActivationSpill, offset: int, tensor: torch.Tensor) -> None:
        self._spill, self._offset, self._bytes = spill, offset, tensor.nbytes
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        buffer = torch.empty(self._bytes, dtype=torch.uint8)
        self._spill.read(buffer, self._offset)
        return buffer.view(self._dtype).reshape(self._shape)

    def __del__(self) -> None:
        self._spill.free(self._offset, self._bytes)


class ActivationSpill:
    """A budget for the activations of all batches, and a file for what exceeds it.

    The file has no name in its folder (``O_TMPFILE`` on Linux): when the ``with`` block ends, or the process is
    killed, the operating system takes its space back.

    Args:
        budget: bytes of large tensors that may stay in memory.
        folder: on whose file system the file lies.

    Raises:
        OutputError: also by its methods: the file cannot be made, written (the disk is full) or read.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self.budget = budget
        self.spilled_bytes = 0
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # places to use again, by their size in bytes

    def __enter__(self) -> Self:
        with self._naming("written"):
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def put(self, tensor: torch.Tensor) -> Spilled:
        """Write a tensor."""
        assert self._file is not None
        data = memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.spilled_bytes += len(data)
        # A walk writes few sizes many times over, so a place of the very size is all that is looked for.
        places = self._free[len(data)]
        offset = places.pop() if places else self._end
        self._end = max(self._end, offset + len(data))
        written = 0
        with self._naming("written"):
            while written < len(data):  # one call writes 2 GB at most
                written += os.pwrite(self._file.fileno(), data[written:], offset + written)
        return Spilled(self, offset, tensor)

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill a tensor of bytes ``[n]`` from the file."""
        assert self._file is not None
        data = memoryview(buffer.numpy())  # type: ignore[arg-type]
        done = 0
        with self._naming("read"):
            while done < len(data):
                read = os.preadv(self._file.fileno(), [data[done:]], offset + done)
                if not read:
                    raise OSError("the file ends too early")
                done += read

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        """Say of an ``OSError`` raised inside what it concerns."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"calibration's activations cannot be {done} in {str(self._folder)!r}: {error.strerror or error}; "
                f"{self._end:,} bytes lie there. Fewer --samples or shorter ones take less room"
            ) from error

    def free(self, offset: int, size: int) -> None:
        """A place in the file may be used again."""
        self._free[size].append(offset)


def is_large(value: Any) -> bool:
    """Whether a value of the graph is a tensor worth a file."""
    return isinstance(value, torch.Tensor) and value.nbytes >= SPILL_FROM and not value.is_sparse

"""Activations on disk: what a calibration walk holds past its memory budget goes to a scratch folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

SPILL_FROM = 1 << 16
"""Bytes from which a tensor is worth a file."""


SHARE_OF_WEIGHTS = 0.5
"""Activations that stay in memory where nothing else is said, as a share of the model's weights in float32."""

LEAST_BUDGET = 256 << 20
"""The same in bytes at least: that much is nothing beside PyTorch itself."""


def usual_budget(weight_bytes: int) -> int:
    """Bytes of activations that stay in memory where no limit was given.

    Args:
        weight_bytes: of the model's weights in float32.
    """
    return max(int(SHARE_OF_WEIGHTS * weight_bytes), LEAST_BUDGET)


class Spilled:
    """A tensor in a file; its bytes are as they were."""

    def __init__(self, path: Path, tensor: torch.Tensor) -> None:
        self._path, self._shape, self._dtype = path, tensor.shape, tensor.dtype
        dense = tensor.detach().contiguous()
        with path.open("wb") as file:
            file.write(memoryview(dense.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        buffer = torch.empty(self._path.stat().st_size, dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
        return buffer.view(self._dtype).reshape(self._shape)

    def __del__(self) -> None:
        self._path.unlink(missing_ok=True)


class ActivationSpill:
    """A budget for the activations of all batches, and a folder for what exceeds it.

    Args:
        budget: bytes of large tensors that may stay in memory.
        folder: where the scratch folder is made; removed when the ``with`` block ends.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self.budget = budget
        self.spilled_bytes = 0
        self._parent = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="activations-", dir=self._parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._scratch is not None
        self._scratch.cleanup()

    def put(self, tensor: torch.Tensor) -> Spilled:
        """Write a tensor."""
        assert self._scratch is not None
        self._count += 1
        self.spilled_bytes += tensor.nbytes
        return Spilled(Path(self._scratch.name) / f"{self._count}", tensor)


def is_large(value: Any) -> bool:
    """Whether a value of the graph is a tensor worth a file."""
    return isinstance(value, torch.Tensor) and value.nbytes >= SPILL_FROM and not value.is_sparse

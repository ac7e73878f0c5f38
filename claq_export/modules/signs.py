"""Integers without sign seen as those with one, for pickles; tensors that share memory go on sharing it."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

_SIGNED = {torch.uint32: torch.int32, torch.uint16: torch.int16}
_UNSIGNED = {with_sign: without for without, with_sign in _SIGNED.items()}

# A tensor that two modules have must be one object in a pickle too, which knows objects and not memory.
_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def signed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as int32 or int16 for uint32 and uint16, other tensors as they are; the same object each time."""
    return _seen_as(tensor, _SIGNED)


def unsigned(tensor: torch.Tensor) -> torch.Tensor:
    """Undo :func:`signed`."""
    return _seen_as(tensor, _UNSIGNED)


def _seen_as(tensor: torch.Tensor, dtypes: dict[torch.dtype, torch.dtype]) -> torch.Tensor:
    if tensor.dtype not in dtypes:
        return tensor
    found: torch.Tensor | None = _seen.get(tensor)
    if found is None or found.data_ptr() != tensor.data_ptr():
        # Not a view, which would keep the tensor, and with it this entry, alive.
        found = torch.empty(0, dtype=dtypes[tensor.dtype], device=tensor.device)
        found.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        _seen[tensor] = found
    return found

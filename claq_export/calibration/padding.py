"""Which rows of a layer's input belong to tokens and which to padding, as the attention mask of a batch says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

MASK = "attention_mask"
"""The input that says it: ``[batch, sequence]``, 0 for padding."""


def real_tokens(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """bool ``[batch, sequence]``, False for padding; None where nothing is padding, or no input says what is.

    A mask of floating numbers that are not all 0 or 1 is one to be added to scores, and says nothing here.
    """
    mask = batch.get(MASK)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    real = mask != 0
    if mask.is_floating_point() and not (bool(real.any()) and bool((mask[real] == 1).all())):
        return None
    return None if bool(real.all()) else real


def real_rows(shape: Sequence[int], real: torch.Tensor | None) -> torch.Tensor | None:
    """bool ``[T]``: which of the T rows of a value ``[..., features]`` of this shape belong to tokens; None: all of them count.

    Rows go with tokens where the value is ``[batch, sequence, ..., features]`` or ``[batch * sequence, features]``. Of others,
    such as the first token of each sequence or the tokens routed to an expert, nothing is known, and all count.

    Args:
        shape: of the value.
        real: what :func:`real_tokens` says of its batch.
    """
    if real is None:
        return None
    leading = tuple(shape[:-1])
    if leading == (real.numel(),):
        return real.reshape(-1)
    if leading[:2] != tuple(real.shape):
        return None
    return real.reshape(*real.shape, *(1 for _ in leading[2:])).expand(leading).reshape(-1)

"""Lets attention masks of transformers 4 be traced: it builds them with vmap, whose tensors must not reach a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

_MaskFunction = Callable[..., torch.Tensor]


def _broadcast(mask_function: _MaskFunction, bh_indices: bool = True) -> _MaskFunction:
    """The mask over all indices at once; mask functions are elementwise in their indices, so broadcasting equals vmap."""

    def build(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if not bh_indices:
            return mask_function(batch, head, query[:, None], key[None, :]).expand(query.shape[0], key.shape[0])
        indices = (batch[:, None, None, None], head[None, :, None, None], query[:, None], key[None, :])
        return mask_function(*indices).expand(batch.shape[0], head.shape[0], query.shape[0], key.shape[0])

    return build


@contextmanager
def traceable_masks() -> Iterator[None]:
    """Inside, transformers 4 builds masks by broadcasting; nothing changes where it is not loaded or does so by itself."""
    masking = sys.modules.get("transformers.masking_utils")
    if masking is None or not hasattr(masking, "_vmap_for_bhqkv"):
        yield
        return
    # The context that lets vmap index by tensors leaves operators of its own in the graph; plain indexing needs none.
    replaced = {"_vmap_for_bhqkv": _broadcast, "TransformGetItemToIndex": nullcontext}
    before = {name: getattr(masking, name) for name in replaced if hasattr(masking, name)}
    for name in before:
        setattr(masking, name, replaced[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking, name, value)

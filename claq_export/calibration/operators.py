"""The operators that calibration spends its time in, in forms that are faster on the CPU and equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..algorithm.products import linear

_aten = torch.ops.aten


def is_causal(mask: torch.Tensor, queries: int, keys: int) -> bool:
    """Whether an attention mask ``[..., queries, keys]``, boolean or to be added, says no more than that no token sees a
    later one."""
    if queries != keys or mask.shape[-2:] != (queries, keys) or not mask.numel():
        return False
    below = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == below).all())
    # An added number below half of the lowest leaves nothing of a weight once the largest is subtracted.
    hidden = mask <= torch.finfo(mask.dtype).min / 4
    return bool(((mask == 0) & below | hidden & ~below).all())


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """``aten.scaled_dot_product_attention``; with a causal mask only the half of the products that counts is done."""
    if (
        attn_mask is not None
        and query.device.type == "cpu"
        and args in ((), (0.0,), (0.0, False))
        and not kwargs.get("dropout_p")
        and not kwargs.get("is_causal")
        and is_causal(attn_mask, query.shape[-2], key.shape[-2])
    ):
        args, attn_mask = (0.0, True), None
        kwargs = {name: given for name, given in kwargs.items() if name not in ("dropout_p", "is_causal")}
    result: torch.Tensor = _aten.scaled_dot_product_attention.default(query, key, value, attn_mask, *args, **kwargs)
    return result


_FASTER: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: linear,
    _aten.scaled_dot_product_attention.default: attention,
}


def faster(target: Any) -> Any:
    """What to call in the place of a graph node's operator."""
    return _FASTER.get(target, target)

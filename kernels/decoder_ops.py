"""Torch operators of transformers that runtimes have as one kernel: RMS normalization, rotary positions, attention.

Passes put them in the place of the small operators a model spells them with; the emitter writes them as the ONNX
operators of the same meaning (opset 23), attention in float32 as operators of claq. Each has one implementation in
plain PyTorch for every device.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("claq", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, int num_heads) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor past_key, Tensor past_value, "
    "int num_heads, int kv_heads, float scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int num_heads, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    half = cos.shape[-1]
    heads = x.unflatten(-1, (num_heads, -1))
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return turned.flatten(-2).to(x.dtype)


def _cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    new_keys, new_values = (each.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for each in (key, value))
    keys = torch.cat([past_key, new_keys.to(past_key.dtype)], 2)
    values = torch.cat([past_value, new_values.to(past_value.dtype)], 2)
    groups = num_heads // kv_heads
    result = torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys.to(query.dtype).repeat_interleave(groups, 1),
        values.to(query.dtype).repeat_interleave(groups, 1),
        attn_mask=mask,
        scale=scale,
    )
    return result.transpose(1, 2).flatten(-2), keys, values


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    by_head = [each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in (query, key, value)]
    result = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=mask, scale=scale)
    return result.transpose(1, 2).flatten(-2)


def _fake_uncached(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))


def _fake_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, sequence = query.shape[0], query.shape[1]
    total = past_key.shape[2] + sequence
    head_size = value.shape[-1] // kv_heads
    return (
        query.new_empty((batch, sequence, num_heads * head_size)),
        past_key.new_empty((batch, kv_heads, total, key.shape[-1] // kv_heads)),
        past_value.new_empty((batch, kv_heads, total, head_size)),
    )


def _fake_like(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
_library.impl("rotary", _rotary, "CompositeExplicitAutograd")
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("cached_attention", _cached_attention, "CompositeExplicitAutograd")
torch.library.register_fake("claq::rms_norm", _fake_like, lib=_library)
torch.library.register_fake("claq::rotary", _fake_like, lib=_library)
torch.library.register_fake("claq::attention", _fake_uncached, lib=_library)
torch.library.register_fake("claq::cached_attention", _fake_attention, lib=_library)

rms_norm = torch.ops.claq.rms_norm.default
"""``x * rsqrt(mean(x²) + epsilon) * weight`` over the last axis; ``weight[last axis]``; the mean in float32."""

rotary = torch.ops.claq.rotary.default
"""Rotary positions. ``x[batch, sequence, num_heads * head]``; ``cos`` and ``sin`` ``[batch, sequence, rotated / 2]``.

Of each head the first ``rotated`` values are turned, value i together with value i + rotated / 2; the rest stay.
"""

attention = torch.ops.claq.attention.default
"""Attention without a cache: ``softmax(scale * query @ key^T + mask) @ value`` of each head.

``query[batch, sequence, num_heads * head]``, ``key`` and ``value`` ``[batch, tokens, num_heads * head]``; ``mask`` is
added to the scores and broadcasts to ``[batch, num_heads, sequence, tokens]``. Returns ``[batch, sequence, num_heads * head]``.
"""

cached_attention = torch.ops.claq.cached_attention.default
"""Attention of new tokens to a cache and themselves.

``query[batch, sequence, num_heads * head]``, ``key`` and ``value`` ``[batch, sequence, kv_heads * head]``, ``mask`` is
added to the scores and broadcasts to ``[batch, num_heads, sequence, past + sequence]``; ``past_key`` and ``past_value``
are ``[batch, kv_heads, past, head]``. Returns ``[batch, sequence, num_heads * head]`` and the longer cache.

Where the cache is of a narrower type than the query, so is the longer one; new keys and values are rounded to it before they are
used. The arithmetic is in the query's type.
"""

"""The decoder operators against their definitions, and their shapes while tracing."""

from __future__ import annotations

import torch

from claq_export.kernels import decoder_ops


def test_operators_are_registered_as_pytorch_wants_them() -> None:
    x, weight = torch.randn(2, 3, 8), torch.rand(8)
    torch.library.opcheck(decoder_ops.rms_norm, (x, weight, 1e-5), test_utils=("test_schema", "test_faketensor"))
    angle = torch.randn(2, 3, 2)
    torch.library.opcheck(
        decoder_ops.rotary, (x, angle.cos(), angle.sin(), 2), test_utils=("test_schema", "test_faketensor")
    )
    key, past = torch.randn(2, 3, 4), torch.randn(2, 1, 5, 4)
    arguments = (x, key, key, torch.zeros(2, 1, 3, 8), past, past, 2, 1, 0.5)
    torch.library.opcheck(decoder_ops.cached_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_rms_norm_is_pytorchs() -> None:
    x, weight = torch.randn(2, 3, 8), torch.rand(8)
    torch.testing.assert_close(
        decoder_ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    )


def test_rotary_turns_pairs_and_keeps_the_rest() -> None:
    x, angle = torch.randn(1, 2, 12), torch.randn(1, 2, 2)
    heads = decoder_ops.rotary(x, angle.cos(), angle.sin(), 2).view(1, 2, 2, 6)
    source = x.view(1, 2, 2, 6)
    pairs = torch.complex(source[..., :2], source[..., 2:4]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    torch.testing.assert_close(heads[..., :4], torch.cat([pairs.real, pairs.imag], -1))
    torch.testing.assert_close(heads[..., 4:], source[..., 4:])


def test_attention_shares_keys_among_heads() -> None:
    query, key, value = torch.randn(1, 2, 12), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    past = torch.randn(1, 1, 4, 3)
    mask = torch.zeros(1, 1, 2, 6)
    mask[..., 0, 5] = -1e30
    result, keys, values = decoder_ops.cached_attention(query, key, value, mask, past, past, 4, 1, 0.7)
    torch.testing.assert_close(keys, torch.cat([past, key[:, None]], 2))
    scores = query.view(1, 2, 4, 3).transpose(1, 2) @ keys.transpose(2, 3) * 0.7 + mask
    torch.testing.assert_close(result, (scores.softmax(-1) @ values).transpose(1, 2).reshape(1, 2, 12))

"""The faster forms of products and attention compute what the ordinary ones do."""

from __future__ import annotations

import pytest
import torch

from claq_export.algorithm import products
from claq_export.calibration.operators import attention, faster, is_causal

_aten = torch.ops.aten


@pytest.mark.parametrize("shape", [(1, 5), (700, 33), (1500, 192), (900, 500)], ids=str)
def test_gram_is_symmetric_and_right(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    found, again = torch.zeros(shape[1], shape[1]), torch.zeros(shape[1], shape[1])
    products.add_gram(found, rows)
    products.add_gram(again, rows)
    assert torch.equal(found, found.T)
    assert torch.equal(found, again)
    scaled = rows.double() * factor.double()[:, None]
    torch.testing.assert_close(found.double(), rows.double().T @ rows.double(), rtol=1e-4, atol=1e-3)
    products.add_gram(found, rows, factor)
    expected = rows.double().T @ rows.double() + scaled.T @ scaled
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-3)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 400), (4, 100, 96)], ids=str)
def test_linear_is_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape[:-1], 96), torch.randn(130, 96)
    added = torch.randn(130) if bias else None
    found = products.linear(x, weight, added)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, added), rtol=1e-4, atol=1e-4)
    # Views whose lines are not neighbours, other types, and gradients.
    turned = torch.randn(96, 130).T
    torch.testing.assert_close(products.linear(x, turned), x @ turned.T, rtol=1e-4, atol=1e-4)
    assert products.linear(x.double(), weight.double()).dtype == torch.float64
    x.requires_grad_()
    products.linear(x, weight).sum().backward()
    assert x.grad is not None


def test_only_causal_masks_are_taken_for_causal() -> None:
    below = torch.ones(6, 6, dtype=torch.bool).tril()
    assert is_causal(below, 6, 6)
    assert is_causal(below.expand(3, 1, 6, 6), 6, 6)
    lowest = torch.finfo(torch.float32).min
    for hidden in (lowest, lowest / 2, -torch.inf):
        assert is_causal(torch.zeros(6, 6).masked_fill(~below, hidden), 6, 6)
    padded = below.repeat(2, 1, 1, 1)
    padded[1, 0, :, 0] = False
    assert not is_causal(padded, 6, 6)
    assert not is_causal(torch.ones(6, 6, dtype=torch.bool), 6, 6)
    assert not is_causal(torch.zeros(6, 6).masked_fill(~below, -5.0), 6, 6)
    assert not is_causal(torch.full((6, 6), 0.5).masked_fill(~below, lowest), 6, 6)
    assert not is_causal(below[:, :1], 6, 6)
    assert not is_causal(torch.ones(6, 8, dtype=torch.bool).tril(), 6, 8)


@pytest.mark.parametrize("hide_first", [False, True])
def test_attention_is_attention(hide_first: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 50, 16) for _ in range(3))
    mask = torch.ones(50, 50, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if hide_first:
        mask[0, 0, 1:, 0] = False
    expected = _aten.scaled_dot_product_attention.default(query, key, value, mask, 0.0, False, scale=0.3)
    call = faster(_aten.scaled_dot_product_attention.default)
    assert call is attention
    torch.testing.assert_close(call(query, key, value, mask, 0.0, False, scale=0.3), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call(query, key, value, mask, scale=0.3), expected, rtol=1e-4, atol=1e-5)

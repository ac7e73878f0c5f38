"""Error feedback from few calibration tokens against that from the whole Hessian."""

from __future__ import annotations

import pytest
import torch

from claq_export.algorithm import Hessian, LayerSettings, quantize_layer
from claq_export.algorithm.feedback import FactorFeedback, TokenFeedback, feedback_of

DAMPING = 0.01


def tokens_of(count: int, K: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, K, generator=generator) * (3 * torch.rand(K, generator=generator)).exp()
    return x + x.mean(dim=1, keepdim=True)


def both(x: torch.Tensor) -> tuple[Hessian, Hessian]:
    """The same tokens kept as tokens, and as a matrix."""
    few, whole = Hessian(x.shape[1]), Hessian(x.shape[1])
    for hessian in (few, whole):
        hessian.add(x[: len(x) // 2])
        hessian.add(x[len(x) // 2 :])
    assert whole.matrix.shape == (x.shape[1], x.shape[1])
    assert whole.few_tokens is None
    assert few.few_tokens is not None
    return few, whole


@pytest.mark.parametrize(("count", "K", "block"), [(7, 40, 16), (100, 600, 512), (3, 12, 5), (150, 1100, 512)])
@pytest.mark.parametrize("act_order", [True, False])
def test_blocks_and_debts_are_those_of_the_whole_factor(count: int, K: int, block: int, act_order: bool) -> None:
    x = tokens_of(count, K)
    x[:, K // 3] = 0  # an input that never fires
    few, whole = both(x)
    torch.testing.assert_close(few.diagonal, whole.diagonal)
    ours = feedback_of(few, DAMPING, act_order, torch.device("cpu"))
    theirs = feedback_of(whole, DAMPING, act_order, torch.device("cpu"))
    assert isinstance(ours, TokenFeedback)
    assert isinstance(theirs, FactorFeedback)
    # Equal diagonals may be sorted differently after rounding.
    theirs = FactorFeedback(whole.factor(DAMPING, act_order))
    if not torch.equal(ours.order, theirs.order):
        pytest.skip("two inputs have all but the same energy")
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(K, 9, generator=generator)
    here, there = wanted.clone(), wanted.clone()
    for first in range(0, K, block):
        last = min(K, first + block)
        upper, expected = ours.enter(here, first, last), theirs.enter(there, first, last)
        assert float((upper - expected).norm() / expected.norm()) < 1e-3
        assert float((here[first:last] - there[first:last]).norm() / there[first:last].norm()) < 1e-3
        # Any error will do; the rows of the block are taken as if each were decoded to this.
        value = here[first:last] + 0.01 * torch.randn(last - first, 9, generator=generator)
        ours.leave(here, first, last, value)
        theirs.leave(there, first, last, value)
        # What the loop leaves: errors of single columns, each with what the earlier ones of the block owe taken off.
        left = torch.linalg.solve_triangular(expected.T.double(), (there[first:last] - value).double(), upper=False)
        there[first:last] = left.float()


def test_a_layer_comes_out_as_well() -> None:
    few, whole = both(tokens_of(60, 300))
    weight = torch.randn(80, 300, generator=torch.Generator().manual_seed(3))
    config = LayerSettings(bits=3)
    ours, theirs = quantize_layer(weight, few, config), quantize_layer(weight, whole, config)
    plain = quantize_layer(weight, None, config).layer.dequantize() - weight
    assert ours.error == pytest.approx(theirs.error, rel=0.1)
    assert ours.error < 0.1 * float(whole.energy(plain).sum() / whole.energy(weight).sum())
    assert few.few_tokens is not None
    assert ours.error == pytest.approx(
        float(whole.energy(ours.layer.dequantize() - weight).sum() / whole.energy(weight).sum()), rel=1e-3
    )


def test_many_tokens_become_a_matrix() -> None:
    x = tokens_of(50, 120)
    hessian = Hessian(120, token_clip=None)
    hessian.add(x[:30])
    assert hessian.few_tokens is not None
    hessian.add(x[30:])
    assert hessian.few_tokens is None
    torch.testing.assert_close(hessian.matrix, x.T @ x, rtol=1e-4, atol=1e-2)
    assert hessian.tokens == 50

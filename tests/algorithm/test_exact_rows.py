"""Rows kept exactly: which ones, how close they come, and that the others do not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm import LayerSettings, measure, predict, quantize_layer
from claq_export.algorithm.exact_rows import keep_rows, most_frequent
from claq_export.errors import ConfigError


def test_the_most_frequent_rows_are_chosen() -> None:
    frequency = torch.tensor([0, 5, 9, 5, 0, 1, 5, 0, 0, 0])
    assert most_frequent(frequency, 0.3).tolist() == [1, 2, 3]
    assert most_frequent(frequency, 0.9).tolist() == [1, 2, 3, 5, 6]
    assert most_frequent(frequency, 0.0).tolist() == []


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 60), st.integers(1, 50)),
    bits=st.sampled_from([2.0, 2.5, 3.0, 4.0]),
    outliers=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 1 << 16),
)
def test_kept_rows_come_back_and_others_stay(shape: tuple[int, int], bits: float, outliers: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * torch.rand(shape[1], generator=generator).exp()
    weight[0] = 0  # a row without scale
    layer = quantize_layer(weight, None, LayerSettings(bits=bits, outliers=outliers)).layer
    rows = torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 3)].sort().values
    kept = keep_rows(layer, weight, rows)
    kept.validate()
    before, after = layer.dequantize(), kept.dequantize()
    others = torch.ones(shape[0], dtype=torch.bool)
    others[rows] = False
    assert torch.equal(before[others], after[others])
    assert (after[rows] - weight[rows]).abs().max() <= 2e-3 * weight.abs().max()


def test_it_is_part_of_quantizing_and_counted() -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    frequency = torch.arange(200)
    settings_ = LayerSettings(bits=3, exact_rows=0.05)
    result = quantize_layer(weight, None, settings_, row_frequency=frequency)
    error = (result.layer.dequantize() - weight).square().mean(1)
    assert error[190:].max() < 1e-5 < error[:190].min()
    # A weight that is right already need not be reserved.
    expected = predict(200, 64, (0, 64, 0), (0, 10 * 64, 0)).nbytes
    assert 0.99 * expected <= measure(result.layer).nbytes <= expected
    assert quantize_layer(weight, None, settings_).layer.outliers == 0


def test_the_share_is_checked() -> None:
    with pytest.raises(ConfigError, match="exact_rows"):
        LayerSettings(exact_rows=0.2)

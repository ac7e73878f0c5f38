"""The column loop and what is built on it: identities that must hold exactly, and errors that must fall."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm import Hessian, LayerSettings, measure, plan_columns, quantize_layer
from claq_export.algorithm.columns import ColumnCoder
from claq_export.algorithm.feedback import FactorFeedback
from claq_export.algorithm.gptq import quantize_columns
from claq_export.algorithm.layer import ColumnPlan
from claq_export.algorithm.scales import row_scales
from claq_export.errors import ConfigError, ModelError
from claq_export.format.layer import QuantizedLinear


def problem(rows: int, columns: int, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, Hessian]:
    """A heavy-tailed weight and the Hessian of correlated inputs with a few hot features."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    weight = weight * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.99))
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    inputs = inputs * torch.exp(torch.randn(columns, generator=generator))
    hessian = Hessian(columns, token_clip=None)
    hessian.add(inputs)
    return weight, hessian


def test_identity_hessian_is_plain_kmeans() -> None:
    weight, _ = problem(96, 40)
    hessian = Hessian(40, token_clip=None)
    hessian.add(torch.eye(40))
    plain = quantize_layer(weight, None, LayerSettings(bits=3))
    looped = quantize_layer(weight, hessian, LayerSettings(bits=3))
    for name, tensor in plain.layer.tensors().items():
        assert torch.equal(tensor, looped.layer.tensors()[name]), name
    assert looped.error == pytest.approx(plain.error, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 2.5])
def test_feedback_lowers_the_layer_error(bits: float) -> None:
    weight, hessian = problem(200, 96)
    plain = quantize_layer(weight, None, LayerSettings(bits=bits))
    difference = plain.layer.dequantize() - weight
    unaware = float(hessian.energy(difference).sum() / hessian.energy(weight).sum())
    looped = quantize_layer(weight, hessian, LayerSettings(bits=bits))
    assert looped.error < 0.8 * unaware


@pytest.mark.parametrize("block", [1, 7, 128])
def test_block_size_changes_rounding_only(block: int) -> None:
    weight, hessian = problem(64, 70)
    errors = [quantize_layer(weight, hessian, LayerSettings(bits=3, block=b)).error for b in (block, 16)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_loop_follows_the_textbook_recursion() -> None:
    """One column after another with an explicit inverse Hessian that shrinks (OBS), in float64."""
    weight, hessian = problem(50, 24)
    config = LayerSettings(bits=3, row_scale="none", act_order=True)
    scale = row_scales(weight, "none").float()
    target = (weight / scale[:, None]).T.contiguous()
    factor = hessian.factor(config.damping, True)
    coder = ColumnCoder(config)
    found = quantize_columns(target[factor.order], [3] * 24, [0] * 24, FactorFeedback(factor), coder).value

    order = factor.order.tolist()
    remaining = target.T[:, order].double().numpy().copy()
    inverse = np.linalg.inv(hessian.damped(config.damping)[factor.order][:, factor.order].numpy())
    expected = np.zeros_like(remaining)
    for j in range(24):
        done = coder.quantize(remaining[:, j].astype(np.float32), 3, 0).value
        expected[:, j] = done
        step = (remaining[:, j] - done) / inverse[0, 0]
        remaining[:, j:] -= np.outer(step, inverse[0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    np.testing.assert_allclose(found.T[:, order].numpy(), expected, atol=2e-3)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 70))


@settings(max_examples=25, deadline=None)
@given(
    shapes,
    st.sampled_from([2, 2.1, 2.5, 3, 3.1, 3.7, 4]),
    st.sampled_from([0.0, 0.01, 0.2]),
    st.sampled_from(["fixed", "dynamic", "saliency"]),
    st.sampled_from(["sides", "magnitude"]),
    st.sampled_from(["none", "rms", "mean", "max", "balanced"]),
    st.integers(0, 1),
)
def test_any_shape_round_trips_and_is_accounted(
    shape: tuple[int, int], bits: float, share: float, reservation: str, choice: str, row_scale: str, descent: int
) -> None:
    rows, columns = shape
    weight, hessian = problem(rows, columns, tokens=30)
    config = LayerSettings(
        bits=bits, outliers=share, reservation=reservation, outlier_choice=choice, row_scale=row_scale, descent=descent
    )
    plan = plan_columns(weight, hessian, config)
    result = quantize_layer(weight, hessian, config)
    layer = result.layer
    layer.validate()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors().values())
    size = measure(layer)
    assert size.nbytes == stored
    assert result.true_bits == size.true_bits == 8 * stored / (rows * columns)
    assert torch.equal(layer.column_bits(), plan.bits)
    if layer.outliers == int(plan.reserve.sum()):  # an outlier that equals a centroid is not stored
        assert plan.predict(rows) == size
    assert np.isfinite(result.error)


@pytest.mark.parametrize(
    "config",
    [
        LayerSettings(bits=2.5, outliers=0.02, reservation="saliency"),
        LayerSettings(
            bits=3, outliers=0.01, descent=2, refit_codebook=True, refit_row_scale=True, row_weights="energy"
        ),
        LayerSettings(bits=4, row_scale="none", fit_outliers=True, outliers=0.01, kmeans="lloyd"),
    ],
)
def test_the_loop_believes_exactly_what_a_reader_decodes(
    config: LayerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from claq_export.algorithm import layer as room

    seen = {}
    store = room._store

    def spy(state, scale, plan):  # type: ignore[no-untyped-def]
        seen["value"], seen["scale"] = state.value.clone(), scale
        return store(state, scale, plan)

    monkeypatch.setattr(room, "_store", spy)
    weight, hessian = problem(80, 64)
    result = quantize_layer(weight, hessian, config)
    believed = seen["value"].T * seen["scale"].float()[:, None]
    assert torch.equal(result.layer.dequantize(), believed)
    assert result.layer.outliers > 0


def test_same_input_same_bytes() -> None:
    weight, hessian = problem(70, 64)
    config = LayerSettings(bits=2.5, outliers=0.01, descent=1, refit_codebook=True, refit_row_scale=True)
    first, second = (quantize_layer(weight, hessian, config).layer for _ in range(2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_error_is_measured_on_what_is_stored() -> None:
    weight, hessian = problem(60, 50)
    result = quantize_layer(weight, hessian, LayerSettings(bits=3))
    difference = (result.layer.dequantize() - weight).double()
    H = hessian.matrix.double()
    expected = torch.trace(difference @ H @ difference.T) / torch.trace(weight.double() @ H @ weight.double().T)
    assert result.error == pytest.approx(float(expected), rel=1e-4)
    assert result.weight_mse == pytest.approx(float(difference.square().mean()), rel=1e-6)


@pytest.mark.parametrize("sweeps", [1, 2, 4])
@pytest.mark.parametrize("row_weights", ["uniform", "energy"])
def test_descent_lowers_the_error_monotonically(sweeps: int, row_weights: str) -> None:
    weight, hessian = problem(150, 96)
    base = LayerSettings(bits=3, outliers=0.01, row_weights=row_weights)
    before = quantize_layer(weight, hessian, replace(base, descent=sweeps - 1)).layer
    after = quantize_layer(weight, hessian, replace(base, descent=sweeps)).layer
    damped = hessian.damped(base.damping)

    def objective(layer: QuantizedLinear) -> float:
        difference = (layer.dequantize() - weight).double()
        if row_weights == "uniform":
            difference = difference / layer.row_scale.double()[:, None]
        return float(((difference @ damped) * difference).sum())

    assert objective(after) < objective(before)


@pytest.mark.parametrize("row_weights", ["uniform", "energy"])
@pytest.mark.parametrize("bits", [2, 3])
def test_refitting_codebooks_lowers_the_error(row_weights: str, bits: int) -> None:
    weight, hessian = problem(150, 96)
    base = LayerSettings(bits=bits, outliers=0.01, row_weights=row_weights)
    before = quantize_layer(weight, hessian, base).layer
    after = quantize_layer(weight, hessian, replace(base, refit_codebook=True)).layer
    damped = hessian.damped(base.damping)

    def objective(layer: QuantizedLinear) -> float:
        difference = (layer.dequantize() - weight).double()
        if row_weights == "uniform":
            difference = difference / layer.row_scale.double()[:, None]
        return float(((difference @ damped) * difference).sum())

    assert objective(after) < 0.999 * objective(before)


def test_codebook_refit_reaches_the_least_squares_optimum() -> None:
    """Against the normal equations of a small layer, solved densely; int8 rounding is all that may be between them."""
    from claq_export.algorithm.descent import refit_codebooks

    weight, hessian = problem(60, 12)
    config = LayerSettings(bits=2, row_scale="none")
    scale = float(row_scales(weight, "none")[0])
    target = (weight / scale).T.contiguous()
    coder = ColumnCoder(config)
    factor = hessian.factor()
    state = quantize_columns(target[factor.order], [2] * 12, [0] * 12, FactorFeedback(factor), coder)
    damped = hessian.damped(0.01)
    pick = torch.zeros(60, 12, 48, dtype=torch.float64)  # row n, column j -> which of the 12 * 4 centroids
    for j, column in enumerate(state.columns):
        pick[torch.arange(60), j, 4 * j + torch.from_numpy(column.codes).long()] = 1
    normal = torch.einsum("nja,jk,nkb->ab", pick, damped, pick)
    right = torch.einsum("nja,jk,nk->a", pick, damped, target.T.double())
    best = torch.linalg.solve(normal, right)
    left = (pick @ best) - target.T.double()
    optimum = float(((left @ damped) * left).sum())
    refit_codebooks(state, target, damped.float(), coder)
    left = (state.value - target).T.double()
    assert optimum <= float(((left @ damped) * left).sum()) <= 1.02 * optimum


def test_refitting_row_scales_lowers_the_error() -> None:
    weight, hessian = problem(120, 64)
    base = LayerSettings(bits=2)
    plain = quantize_layer(weight, hessian, base)
    refitted = quantize_layer(weight, hessian, replace(base, refit_row_scale=True))
    damped = hessian.damped(base.damping)

    def objective(decoded: torch.Tensor) -> torch.Tensor:
        difference = (decoded - weight).double()
        return ((difference @ damped) * difference).sum(dim=1)

    before, after = objective(plain.layer.dequantize()), objective(refitted.layer.dequantize())
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < float(before.sum())


def test_row_of_zeros_and_dead_input_are_kept() -> None:
    weight, _ = problem(40, 33)
    weight[7] = 0
    inputs = torch.randn(100, 33, generator=torch.Generator().manual_seed(5))
    inputs[:, 4] = 0
    hessian = Hessian(33)
    hessian.add(inputs)
    decoded = quantize_layer(weight, hessian, LayerSettings(bits=4, outliers=0.01)).layer.dequantize()
    assert not decoded[7].any()
    assert float((decoded[:, 4] - weight[:, 4]).norm() / weight[:, 4].norm()) < 0.2


def test_degenerate_weights() -> None:
    for weight in (torch.zeros(5, 40), torch.full((5, 40), 3.0), torch.ones(1, 1), torch.zeros(1, 1)):
        result = quantize_layer(weight, None, LayerSettings(bits=2, outliers=0.1))
        torch.testing.assert_close(result.layer.dequantize(), weight, rtol=2e-3, atol=0)
    tiny = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)) * 1e-6
    assert quantize_layer(tiny, None, LayerSettings(bits=4)).error < 0.02
    huge = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)) * 1e6
    assert quantize_layer(huge, None, LayerSettings(bits=4)).error < 0.02


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_error_of_weights_whose_squares_float32_does_not_hold(size: float) -> None:
    weight, hessian = problem(40, 33)
    for known in (None, hessian):
        result = quantize_layer(weight * size, known, LayerSettings(bits=4))
        assert not (result.layer.dequantize() / size).abs().max() > 1e-3  # nothing of them is left, or next to nothing
        assert result.error == pytest.approx(1.0, abs=1e-3)
        assert result.weight_mse == pytest.approx(float(weight.double().square().mean()) * size**2, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(value: float) -> None:
    weight = torch.zeros(4, 5)
    weight[2, 3] = value
    with pytest.raises(ModelError, match="row 2, column 3"):
        quantize_layer(weight, None, LayerSettings())


def test_shapes_must_fit() -> None:
    hessian = Hessian(3)
    hessian.add(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="Hessian has 3 inputs"):
        quantize_layer(torch.zeros(4, 5), hessian, LayerSettings())
    with pytest.raises(ConfigError, match="not empty"):
        quantize_layer(torch.zeros(0, 5), None, LayerSettings())


def test_hessian_without_tokens_means_plain_kmeans() -> None:
    weight, _ = problem(40, 33)
    a = quantize_layer(weight, Hessian(33), LayerSettings(bits=3))
    b = quantize_layer(weight, None, LayerSettings(bits=3))
    assert torch.equal(a.layer.codes, b.layer.codes)


def test_explicit_plan_is_followed() -> None:
    weight, hessian = problem(64, 96)
    bits = torch.tensor([4] * 32 + [2] * 32 + [3] * 32, dtype=torch.uint8)
    reserve = torch.zeros(96, dtype=torch.int64)
    reserve[50] = 5
    result = quantize_layer(weight, hessian, LayerSettings(), plan=ColumnPlan(bits, reserve))
    assert torch.equal(result.layer.column_bits(), bits)
    assert result.layer.columns == (32, 32, 32)
    assert result.layer.outliers == 5
    feature = result.layer.feature_of_column()[result.layer.outlier_index.to(torch.int64)]
    assert set(feature.tolist()) == {50}


def test_three_widths_by_shares() -> None:
    weight, hessian = problem(64, 320)
    config = LayerSettings(bits=2.5, widths=(4, 3, 2), shares=(0.2, 0.1, 0.7))
    layer = quantize_layer(weight, hessian, config).layer
    assert layer.columns == (64, 32, 224)


def test_asymmetric_target_matches_the_unquantized_output_better() -> None:
    weight, _ = problem(60, 48)
    generator = torch.Generator().manual_seed(9)
    clean = torch.randn(2000, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    noisy = clean + 0.3 * clean.std() * torch.randn(2000, 48, generator=generator)
    plain, aware = Hessian(48, token_clip=None), Hessian(48, token_clip=None)
    plain.add(noisy)
    aware.add(noisy, reference=clean)
    wanted = clean @ weight.T

    def miss(hessian: Hessian) -> float:
        decoded = quantize_layer(weight, hessian, LayerSettings(bits=4)).layer.dequantize()
        return float((noisy @ decoded.T - wanted).square().sum())

    assert miss(aware) < 0.98 * miss(plain)


@pytest.mark.parametrize("kind", ["uniform", "nothing matters"])
def test_row_importance_may_say_nothing(kind: str) -> None:
    weight, hessian = problem(100, 64)
    plain = quantize_layer(weight, hessian, LayerSettings(bits=2)).layer
    given = torch.zeros(100) if kind == "nothing matters" else torch.rand(100)
    settings = LayerSettings(bits=2, row_weights="uniform" if kind == "uniform" else "importance")
    same = quantize_layer(weight, hessian, settings, row_importance=given).layer
    assert torch.equal(same.codes, plain.codes)
    some = torch.zeros(100)
    some[3] = 1.0
    decoded = quantize_layer(weight, hessian, LayerSettings(bits=2), row_importance=some).layer.dequantize()
    assert float((decoded - weight)[3].square().mean()) < float((plain.dequantize() - weight)[3].square().mean())
    assert float((decoded - weight).square().mean()) < 4 * float((plain.dequantize() - weight).square().mean())


def test_row_importance_shifts_error_to_unimportant_rows() -> None:
    weight, hessian = problem(100, 64)
    importance = torch.ones(100)
    importance[:50] = 50.0
    even = quantize_layer(weight, hessian, LayerSettings(bits=2)).layer.dequantize() - weight
    skewed = (
        quantize_layer(weight, hessian, LayerSettings(bits=2), row_importance=importance).layer.dequantize() - weight
    )
    assert float(hessian.energy(skewed)[:50].sum()) < float(hessian.energy(even)[:50].sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_a_layer_of_the_same_error() -> None:
    weight, hessian = problem(200, 160)
    on_gpu = Hessian(160, token_clip=None, device="cuda")
    on_gpu.matrix.add_(hessian.matrix.cuda())
    on_gpu.tokens = hessian.tokens
    config = LayerSettings(bits=2.5, outliers=0.01, descent=1, refit_codebook=True, refit_row_scale=True)
    here, there = quantize_layer(weight, hessian, config), quantize_layer(weight.cuda(), on_gpu, config)
    assert there.layer.codes.device.type == "cuda"
    assert there.error == pytest.approx(here.error, rel=0.05)

"""Quantizing one linear layer, from its weight and Hessian to the stored format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from ..errors import ConfigError, ModelError
from ..format.layer import QuantizedLinear, assemble
from ..format.packing import WIDTHS
from .accounting import Bits, measure, predict
from .columns import ColumnCoder
from .descent import descend, refit_codebooks, refit_row_scale
from .exact_rows import keep_rows, most_frequent
from .feedback import Feedback, feedback_of
from .gptq import QuantizedColumns, quantize_columns
from .hessian import Hessian
from .outliers import reserve_counts
from .precision import assign_widths, column_scores, group_counts
from .scales import row_scales
from .settings import LayerSettings
from .vocabulary import token_probability

_ROWS_AT_ONCE = 256
_ERROR_ROWS = 512

_LEAST_WEIGHT = 0.01
"""Of a row in the k-means, as a share of the mean over rows."""

_ORDINARY = 2.0**32
"""Weights whose largest is neither above this nor below its inverse have squares that float32 holds."""


@dataclass(frozen=True)
class ColumnPlan:
    """What each column of a layer gets.

    Attributes:
        bits: uint8 ``[K]``: code widths.
        reserve: int64 ``[K]``: reserved weights.
    """

    bits: torch.Tensor
    reserve: torch.Tensor

    def predict(self, out_features: int) -> Bits:
        """Bits of a layer of ``out_features`` rows with this plan."""
        counts = [int((self.bits == width).sum()) for width in WIDTHS]
        outliers = [int(self.reserve[self.bits == width].sum()) for width in WIDTHS]
        return predict(out_features, self.bits.numel(), counts, outliers)


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and what is known about it.

    Attributes:
        layer: the stored form.
        error: relative layer error tr(dW H dW^T) / tr(W H W^T) on the calibration data, without damping, of 512 rows
            spread evenly where there are more; with no Hessian ||dW||^2 / ||W||^2.
        weight_mse: mean squared difference of the weights.
        true_bits, nominal_bits: a weight; see docs/format.md.
        seconds: time by step: ``cholesky`` (0 if another layer paid for it), ``kmeans``, ``feedback``, ``descent``,
            ``total``.
    """

    layer: QuantizedLinear
    error: float
    weight_mse: float
    true_bits: float
    nominal_bits: float
    seconds: dict[str, float]


def plan_columns(
    weight: torch.Tensor, hessian: Hessian | None, settings: LayerSettings, counts: Sequence[int] | None = None
) -> ColumnPlan:
    """Decide the width and the reserved weights of each column.

    Args:
        weight: float ``[N, K]``.
        hessian: for rankings that use it.
        settings: the switches.
        counts: columns of each width of ``settings.mix()``, as :func:`precision.spread_counts` gives for a whole
            model; None: this layer for itself.
    """
    widths, shares = settings.mix()
    if len(widths) == 1 and not settings.outliers:
        # Whatever the ranking, every column gets the same.
        K = weight.shape[1]
        return ColumnPlan(torch.full((K,), widths[0], dtype=torch.uint8), torch.zeros(K, dtype=torch.int64))
    if counts is None:
        counts = group_counts(weight.shape[1], shares)
    scores = column_scores(weight, _known(hessian), settings)
    return ColumnPlan(assign_widths(scores, widths, counts), reserve_counts(weight, _known(hessian), scores, settings))


def quantize_layer(
    weight: torch.Tensor,
    hessian: Hessian | None,
    settings: LayerSettings,
    *,
    plan: ColumnPlan | None = None,
    row_importance: torch.Tensor | None = None,
    row_frequency: torch.Tensor | None = None,
) -> LayerResult:
    """Quantize the weight of a linear layer. The same input gives the same bytes.

    Args:
        weight: float ``[N, K]``, CPU or CUDA; stays as it is.
        hessian: of the layer's inputs; None, or one that saw no token: plain k-means of each column.
        settings: every switch.
        plan: widths and outliers of each column; None: :func:`plan_columns`.
        row_importance: non-negative ``[N]``: what a squared error of each output counts (mean squared gradient of
            the loss, as in SqueezeLLM and GuidedQuant), for ``row_weights`` of the settings; None: not known.
        row_frequency: non-negative ``[N]``: how often each row of a vocabulary is used, for ``exact_rows`` and
            ``frequency_power`` of the settings; None: no row is kept exactly, and all count alike.

    Raises:
        ModelError: a weight is not finite; names row and column.
        ConfigError: shapes do not fit together.
    """
    began = perf_counter()
    if weight.dim() != 2 or not weight.numel():
        raise ConfigError(
            f"a linear weight must be [out_features, in_features] and not empty, got shape {list(weight.shape)}"
        )
    _check_finite(weight)
    hessian = _known(hessian)
    if hessian is not None and hessian.in_features != weight.shape[1]:
        raise ConfigError(f"the Hessian has {hessian.in_features} inputs, the weight {weight.shape[1]}")
    plan = plan or plan_columns(weight, hessian, settings)
    original = weight.detach().to(torch.float32)
    wanted = original
    tick = perf_counter()
    feedback = None
    if hessian is not None:
        feedback = feedback_of(hessian, settings.damping, settings.act_order, weight.device)
        wanted = hessian.target(original, settings.damping)
    cholesky = perf_counter() - tick

    scale = row_scales(wanted, settings.row_scale)
    weights = _row_weights(scale, settings, row_importance, row_frequency)
    scale, state, descent_seconds = _quantize_rows(wanted, scale, hessian, feedback, plan, settings, weights)
    layer = _store(state, scale, plan)
    if row_frequency is not None and settings.exact_rows:
        layer = keep_rows(layer, original, most_frequent(row_frequency, settings.exact_rows))
    bits = measure(layer)
    seconds = {
        "cholesky": cholesky,
        "kmeans": state.kmeans_seconds,
        "feedback": state.feedback_seconds,
        "descent": descent_seconds,
    }
    # Several times the weight in float32, which the comparison below would hold on top of its own copies.
    del state, wanted
    difference = layer.dequantize()
    difference -= original
    seconds["total"] = perf_counter() - began
    mse = _mean_square(difference)
    return LayerResult(
        layer, _relative_error(difference, original, hessian), mse, bits.true_bits, bits.nominal_bits, seconds
    )


def _quantize_rows(
    wanted: torch.Tensor,
    scale: torch.Tensor,
    hessian: Hessian | None,
    feedback: Feedback | None,
    plan: ColumnPlan,
    settings: LayerSettings,
    row_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, QuantizedColumns, float]:
    """The loop, then the sweeps, on the rows that are not all zero, each of which counts by its weight ``[N]`` in the
    k-means. Returns row scales ``[N]`` and the state of those rows."""
    alive = torch.nonzero(scale).flatten()
    divisor = scale[alive].to(torch.float32)
    coder = ColumnCoder(settings, None if row_weights is None else row_weights[alive].cpu().numpy())
    bits, reserve = plan.bits.tolist(), plan.reserve.clamp(max=max(0, len(alive) - 1)).tolist()
    if not len(alive):
        return scale, QuantizedColumns([], wanted.device), 0.0
    target = _normalised(wanted, alive, divisor, None if feedback is None else feedback.order)
    state = quantize_columns(target, bits, reserve, feedback, coder, settings.block)
    del target

    began = perf_counter()
    if hessian is None or feedback is None:
        return scale, state, 0.0
    if settings.descent or settings.refit_codebook or settings.refit_row_scale:
        rows = wanted[alive]
        target = _normalised(wanted, alive, divisor, None)
        damped = hessian.damped(settings.damping).to(device=target.device, dtype=torch.float32)
        for sweep in range(max(settings.descent, 1)):
            if sweep < settings.descent:
                descend(state, target, damped, feedback.order.tolist(), coder, settings.block)
            if settings.refit_codebook:
                refit_codebooks(state, target, damped, coder)
            if settings.refit_row_scale:
                fresh = refit_row_scale(rows, state.value.T, scale[alive], damped)
                scale = scale.clone()
                scale[alive] = fresh
                target = _normalised(wanted, alive, fresh.to(torch.float32), None)
    return scale, state, perf_counter() - began


def _normalised(
    weight: torch.Tensor, alive: torch.Tensor, divisor: torch.Tensor, order: torch.Tensor | None
) -> torch.Tensor:
    """float32 ``[K, n]``: the ``n`` rows ``alive`` of a weight ``[N, K]`` divided by ``divisor`` ``[n]``, transposed, its
    columns in the given order."""
    target = torch.empty(weight.shape[1], len(alive), device=weight.device)
    for start in range(0, len(alive), _ROWS_AT_ONCE):
        part = alive[start : start + _ROWS_AT_ONCE]
        rows = weight[part] / divisor[start : start + len(part), None]
        target[:, start : start + len(part)] = (rows if order is None else rows[:, order]).T
    return target


def _row_weights(
    scale: torch.Tensor,
    settings: LayerSettings,
    row_importance: torch.Tensor | None,
    row_frequency: torch.Tensor | None,
) -> torch.Tensor | None:
    """What a row's squared error counts in the k-means, in units of its ``scale`` ``[N]``: float64 ``[N]``; None: all alike."""
    energy = scale.to(torch.float64).square()
    weights = None
    if settings.row_weights == "energy":
        weights = energy
    elif settings.row_weights == "importance" and row_importance is not None:
        weights = (energy * row_importance.to(energy)).sqrt()
        # An output without a gradient (a ReLU that was never above zero) may matter in other text.
        weights = weights + _LEAST_WEIGHT * weights.mean() if weights.any() else None
    if row_frequency is not None and settings.frequency_power:
        chance = token_probability(row_frequency).to(energy) ** settings.frequency_power
        weights = chance if weights is None else weights * chance
    return weights


def _store(state: QuantizedColumns, scale: torch.Tensor, plan: ColumnPlan) -> QuantizedLinear:
    """Put columns of the live rows into the format."""
    device = scale.device
    alive = torch.nonzero(scale).flatten()
    N, K = scale.numel(), plan.bits.numel()
    centroids = torch.zeros(K, 16, dtype=torch.int8)
    scales = torch.zeros(K, dtype=torch.float16)
    outliers = None
    if len(alive) == N:
        codes = torch.from_numpy(np.stack([column.codes for column in state.columns])).to(device)
    else:
        codes = torch.zeros(K, N, dtype=torch.uint8, device=device)
        for k, column in enumerate(state.columns):
            codes[k, alive] = torch.from_numpy(column.codes).to(device)
    if state.columns:
        for k, column in enumerate(state.columns):
            centroids[k, : len(column.integers)] = torch.from_numpy(column.integers)
        scales = torch.from_numpy(np.array([column.scale for column in state.columns], dtype=np.float16))
        rows = np.concatenate([column.rows for column in state.columns])
        extra = np.concatenate([column.extra for column in state.columns])
        features = np.repeat(np.arange(K), [len(column.rows) for column in state.columns])
        real = extra != 0
        if real.any():
            index = torch.stack(
                [alive[torch.from_numpy(rows[real]).to(device)], torch.from_numpy(features[real]).to(device)]
            )
            outliers = torch.sparse_coo_tensor(
                index, torch.from_numpy(extra[real]).to(device), (N, K), check_invariants=True
            )
    return assemble(codes, centroids, scales, scale, plan.bits, outliers)


def _known(hessian: Hessian | None) -> Hessian | None:
    return None if hessian is None or hessian.tokens == 0 else hessian


def _check_finite(weight: torch.Tensor) -> None:
    finite = torch.cat([torch.isfinite(part).all(dim=1) for part in weight.split(_ROWS_AT_ONCE)])
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        column = int(torch.nonzero(~torch.isfinite(weight[row]))[0])
        count = sum(int((~torch.isfinite(part)).sum()) for part in weight.split(_ROWS_AT_ONCE))
        raise ModelError(
            f"weight is not finite at row {row}, column {column}: {float(weight[row, column])} "
            f"({count} such values); the model file is damaged or overflowed"
        )


def _squared_sum(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of squares, float64, some rows at a time: PyTorch would widen the whole matrix first."""
    parts = [part.square().sum(dtype=torch.float64) for part in matrix.split(_ROWS_AT_ONCE)]
    return torch.stack(parts).sum()


def _mean_square(matrix: torch.Tensor) -> float:
    unit = _unit(matrix)
    return float(_squared_sum(matrix if unit == 1 else matrix / unit)) * unit**2 / max(1, matrix.numel())


def _unit(matrix: torch.Tensor) -> float:
    """A power of two to divide by before squares are taken: 1, or the peak's where float32 would not hold its square."""
    peak = max(abs(float(end)) for end in matrix.aminmax())
    ordinary = peak == 0 or not math.isfinite(peak) or 1 / _ORDINARY <= peak <= _ORDINARY
    return 1.0 if ordinary else 2.0 ** (math.frexp(peak)[1] - 1)


def _relative_error(difference: torch.Tensor, weight: torch.Tensor, hessian: Hessian | None) -> float:
    unit = _unit(weight)
    if unit != 1:
        difference, weight = difference / unit, weight / unit
    if hessian is None:
        lost, whole = _squared_sum(difference), _squared_sum(weight)
    else:
        # All rows would take four times the operations of the error feedback.
        N = len(weight)
        rows = torch.arange(min(N, _ERROR_ROWS), device=weight.device) * N // min(N, _ERROR_ROWS)
        lost, whole = hessian.energy(difference[rows]).sum(), hessian.energy(weight[rows]).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0

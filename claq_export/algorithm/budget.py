"""The bit budget: columns and outliers of all layers compete for true bits by how much error each bit takes away.

Error feedback makes a layer's error a sum over its columns, sum_j d_j / U_jj^2, with d_j what rounding column j
leaves and U the factor of the inverse Hessian (GPTQ; gptq.py). So what a column would gain from wider codes or from
reserved weights can be measured once, column by column, before anything is quantized (:func:`profile_layer`), and
the best plan under a budget is a Lagrangian problem: each column takes the choice with the least error + price *
bits, and one price for all layers makes the sum meet the budget (:func:`solve`). Groups are then rounded to the
blocks of 32 columns of the format, and outliers fill what is left of the budget. Same idea as SKIM's greedy bits a
channel (claq.md, section 5), over the whole model and with three widths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from ..format.packing import BLOCK, WIDTHS
from . import native
from .accounting import Bits
from .hessian import Hessian
from .kmeans import SortedColumns
from .layer import ColumnPlan
from .scales import row_scales
from .settings import LayerSettings

RESERVE_SHARES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
"""Shares of a column's weights whose reservation is measured."""

_WEIGHTS_AT_ONCE = 1 << 22
"""Weights whose columns are sorted together: with prefix sums they take about 40 bytes each, and a vocabulary has millions."""

_LLOYD_STEPS = 12
_OUTLIER_BITS = 32
_HALVINGS = 40

_LAST_NUMBER = re.compile(r"^(.*\.|)\d+(?=\.|$)")
"""The last part of a qualified name that is a number, after what stands before it."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerProfile:
    """What each column of a layer would cost in error, by width and by reserved weights.

    Attributes:
        name: of the layer.
        out_features: N.
        error: float64 ``[K, 3, M]``: error of the column at 4, 3 and 2 bits with ``reserve[m]`` weights reserved;
            comparable across layers.
        reserve: the M counts, rising from 0.
        tokens: rows of calibration data that the layer read.
        cost: what a squared error of a weight costs for each of these rows, median over columns; 1 without calibration.
    """

    name: str
    out_features: int
    error: Float64
    reserve: tuple[int, ...]
    tokens: int = 0
    cost: float = 1.0

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.error.shape[0])


@dataclass(frozen=True)
class Lookups:
    """How the rows of a table are looked up.

    Attributes:
        probability: float64 ``[N]``: the share of each row in what is looked up, of text like the calibration data; sums to 1.
        tokens: rows looked up in the calibration data; None: as many as there are tokens, or not known.
        importance: ``[K]``: mean squared gradient of the model's loss with respect to what is looked up; None: the error
            counts relative to the rows themselves.
    """

    probability: torch.Tensor
    tokens: int | None = None
    importance: torch.Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """A plan for all layers.

    Attributes:
        plans: by layer name.
        bits: by layer name, as predicted.
        errors: by layer name: the profile's error under the plan, in units of the model's total.
        true_bits: a weight, over all layers.
        nbytes: of all layers.
    """

    plans: dict[str, ColumnPlan]
    bits: dict[str, Bits]
    errors: dict[str, float]
    true_bits: float
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """For a report: totals, and for each layer the columns of each width, outliers, true bits and share of the
        error."""
        layers = {}
        for name, plan in self.plans.items():
            layers[name] = {
                "columns": {str(width): int((plan.bits == width).sum()) for width in WIDTHS},
                "outliers": int(plan.reserve.sum()),
                "true_bits": self.bits[name].true_bits,
                "nominal_bits": self.bits[name].nominal_bits,
                "error_share": self.errors[name],
            }
        return {"true_bits": self.true_bits, "nbytes": self.nbytes, "layers": layers}


def profile_layer(
    name: str,
    weight: torch.Tensor,
    hessian: Hessian | None,
    settings: LayerSettings,
    *,
    row_importance: torch.Tensor | None = None,
    lookups: Lookups | None = None,
    exact_rows: torch.Tensor | None = None,
) -> LayerProfile:
    """Measure what each column of a layer gains from bits and from reserved weights.

    Args:
        name: of the layer.
        weight: float ``[N, K]``.
        hessian: of the layer's inputs, in the unquantized model; None: columns weigh alike.
        settings: row scale, damping and act-order are used.
        row_importance: ``[N]``: mean squared gradient of the model's loss with respect to each output. With it
            errors of layers are in units of the loss, for each row of calibration data that the layer reads
            (:func:`per_token_of_text`); without it each layer's error is taken relative to its output, so that layers count
            alike.
        lookups: of a table whose rows are looked up. One that is multiplied by as well (a tied output head) has the errors
            of both uses; without a Hessian those of looking up alone.
        exact_rows: int64, rows that will be stored exactly (exact_rows.py), so that no error of theirs counts.
    """
    N, K = weight.shape
    w = weight.detach().to(torch.float32)
    scale = row_scales(w, settings.row_scale)
    alive = torch.nonzero(scale).flatten()
    divisor = scale[alive].to(torch.float32)
    columns = (w[alive] / divisor[:, None]).T.contiguous()
    energy = divisor.to(torch.float64).square()
    if exact_rows is not None:
        counted = torch.ones(N, dtype=torch.float64, device=w.device)
        counted[exact_rows.to(w.device)] = 0.0
        energy *= counted[alive]
    seen = hessian if hessian is not None and hessian.tokens else None
    cost = torch.ones(K, dtype=torch.float64) if seen is None else _cost_of_columns(seen, settings)
    cost = cost.to(w.device)
    price = torch.zeros_like(cost)
    if hessian is not None or lookups is None:
        price = cost * _price_of_products(w, energy, alive, seen, row_importance)
    tokens = hessian.tokens if hessian is not None else 0
    if lookups is not None:
        read = tokens if lookups.tokens is None else lookups.tokens
        tokens = tokens or read
        # In units of the loss errors count as often as rows are read; relative ones count alike.
        often = read / tokens if lookups.importance is not None and tokens else 1.0
        price += often * _price_of_lookups(w, energy, alive, lookups)
    reserve = sorted({min(round(share * N), max(0, len(alive) // 2)) for share in RESERVE_SHARES})
    error = np.zeros((K, len(WIDTHS), len(reserve)))
    if len(alive):
        error = _column_errors(columns, tuple(reserve)) * price.cpu().numpy()[:, None, None]
    # More bits never hurt; where a local optimum says so, believe the cheaper choice.
    error = np.minimum.accumulate(error[:, ::-1], axis=1)[:, ::-1]
    return LayerProfile(name, N, np.minimum.accumulate(error, axis=2), tuple(reserve), tokens, float(cost.median()))


def _cost_of_columns(hessian: Hessian, settings: LayerSettings) -> torch.Tensor:
    """float64 ``[K]``: what a squared error of a weight costs, for each token that the layer reads."""
    factor = hessian.factor(settings.damping, settings.act_order)
    cost = torch.ones(hessian.in_features, dtype=torch.float64, device=factor.order.device)
    cost[factor.order] = factor.upper.diagonal().to(cost) ** -2
    # The Hessian sums over tokens; an importance is a mean.
    return cost / hessian.tokens


def _price_of_products(
    weight: torch.Tensor,
    energy: torch.Tensor,
    alive: torch.Tensor,
    hessian: Hessian | None,
    row_importance: torch.Tensor | None,
) -> float:
    """What an error counts in the outputs of a layer, on average over its live rows of the given ``energy``."""
    if not len(alive):
        return 0.0
    if row_importance is not None:
        return float((energy * row_importance.to(energy)[alive]).mean())
    whole = weight.square().sum(dtype=torch.float64)
    if hessian is not None:
        whole = hessian.energy(weight).sum() / hessian.tokens
    return float(energy.mean()) / float(whole) if float(whole) > 0 else 0.0


def _price_of_lookups(
    weight: torch.Tensor, energy: torch.Tensor, alive: torch.Tensor, lookups: Lookups
) -> torch.Tensor:
    """float64 ``[K]``: what an error of each column counts where rows are looked up, on average over the live rows."""
    probability = lookups.probability.to(energy)
    price = float((energy * probability[alive]).mean()) if len(alive) else 0.0
    if lookups.importance is not None:
        return price * lookups.importance.to(energy)
    norms = torch.linalg.vector_norm(weight, dim=1).to(torch.float64)
    whole = float((norms.square() * probability).sum())
    return torch.full((weight.shape[1],), price / whole if whole > 0 else 0.0).to(energy)


def per_token_of_text(profiles: Sequence[LayerProfile], uses: Mapping[str, int]) -> list[LayerProfile]:
    """Profiles in units of the loss for each token of the calibration data, not for each row that the layer itself read.

    An expert reads the tokens routed to it, a pooler one token a sequence, a layer that is shared across depth each token
    several times: their errors reach the loss as often. An expert that no token was routed to is taken for one that read a
    single token, at the median cost of its siblings: layers of its shape whose names differ in the last number alone, or else
    all.

    Args:
        profiles: of all layers, in units of the loss.
        uses: at how many places each layer stands, by name.
    """
    seen = [profile for profile in profiles if profile.tokens]
    if not seen:
        return list(profiles)
    # What a layer at one place reads at most: all tokens, padding left out.
    text = max(profile.tokens / uses[profile.name] for profile in seen)

    # Sorted into families once: a model may have thousands of experts, and as many that no token came to.
    costs: dict[tuple[str, int, int], list[float]] = {}
    for profile in seen:
        costs.setdefault(_family(profile), []).append(profile.cost)
    usual = {family: median(of_family) for family, of_family in costs.items()}
    usual_of_all = median(profile.cost for profile in seen)
    found = []
    for profile in profiles:
        if profile.tokens:
            found.append(replace(profile, error=profile.error * (profile.tokens / text)))
            continue
        cost = usual.get(_family(profile), usual_of_all)
        found.append(replace(profile, error=profile.error * (cost / text), cost=cost))
    return found


def _family(profile: LayerProfile) -> tuple[str, int, int]:
    """Equal for layers of one shape whose names differ in the last number alone."""
    return _LAST_NUMBER.sub(r"\1", profile.name), profile.out_features, profile.in_features


def _column_errors(columns: torch.Tensor, reserve: Sequence[int]) -> Float64:
    """Squared distance ``[K, 3, M]`` of each of ``columns`` ``[K, N]`` to its centroids, by width and reserved weights."""
    if columns.device.type == "cpu" and native.enabled():
        return native.profile_columns(columns.numpy(), WIDTHS, reserve, _LLOYD_STEPS)
    error = np.empty((len(columns), len(WIDTHS), len(reserve)))
    step = max(1, _WEIGHTS_AT_ONCE // columns.shape[1])
    for start in range(0, len(columns), step):
        batch = SortedColumns(columns[start : start + step])
        for i, width in enumerate(WIDTHS):
            for m, count in enumerate(reserve):
                error[start : start + step, i, m] = batch.fit(1 << width, count, _LLOYD_STEPS)[1].cpu().numpy()
    return error


def solve(
    profiles: Sequence[LayerProfile],
    *,
    true_bits: float | None = None,
    nbytes: int | None = None,
    widths: Sequence[int] = WIDTHS,
    floors: Mapping[str, int] | None = None,
    outliers: bool = True,
) -> Budget:
    """The plan with the least total error within a budget.

    Args:
        profiles: of all layers.
        true_bits: the budget in true bits a weight over all layers; or
        nbytes: in bytes of all layers. Exactly one of the two.
        widths: code widths that may be used.
        floors: least code width of a layer, by name.
        outliers: whether weights may be reserved.

    Raises:
        ConfigError: not exactly one budget, a floor for an unknown layer, or a budget that cannot be met; names the
        range that can.
    """
    if (true_bits is None) == (nbytes is None):
        raise ConfigError("give the budget either as true bits or as bytes")
    if not profiles:
        raise ConfigError("a bit budget needs at least one layer")
    allowed = _allowed(profiles, widths, floors or {})
    weights = sum(p.out_features * p.in_features for p in profiles)
    limit = float(nbytes) if nbytes is not None else float(true_bits or 0.0) * weights / 8

    def total(price: float, reserve_price: float) -> tuple[float, list[_Choice]]:
        choices = [
            _choose(p, ok, price, reserve_price if outliers else np.inf)
            for p, ok in zip(profiles, allowed, strict=True)
        ]
        return float(sum(choice.bits.nbytes for choice in choices)), choices

    errors = np.concatenate([p.error[:, :, 0].ravel() for p in profiles])
    ceiling = max(float(errors.max()), 1e-300) * 10
    smallest, _ = total(ceiling, np.inf)
    largest, _ = total(0.0, 0.0)
    if not smallest <= limit * 1.01 or limit > largest * 1.01:
        raise ConfigError(
            f"the budget of {8 * limit / weights:.3f} true bits a weight ({limit:,.0f} bytes) cannot be met: these "
            f"layers take {8 * smallest / weights:.3f} to {8 * largest / weights:.3f} bits ({smallest:,.0f} to "
            f"{largest:,.0f} bytes)"
        )
    price = _bisect(lambda x: total(x, x)[0], limit, ceiling)
    _, chosen = total(price, price)
    # Rounding to blocks of 32 leaves steps in the price; outliers come in steps of a few bytes and fill them.
    fixed = [choice.plan.bits for choice in chosen]

    def refill(reserve_price: float) -> list[_Choice]:
        value = reserve_price if outliers else np.inf
        return [_with_reserve(p, bits, value) for p, bits in zip(profiles, fixed, strict=True)]

    if outliers:
        final = _bisect(lambda x: float(sum(c.bits.nbytes for c in refill(x))), limit, ceiling)
        chosen = _fill(profiles, refill(final), limit, ceiling)
    size = sum(choice.bits.nbytes for choice in chosen)
    whole = sum(choice.error for choice in chosen) or 1.0
    names = [p.name for p in profiles]
    return Budget(
        {name: choice.plan for name, choice in zip(names, chosen, strict=True)},
        {name: choice.bits for name, choice in zip(names, chosen, strict=True)},
        {name: choice.error / whole for name, choice in zip(names, chosen, strict=True)},
        8 * size / weights,
        size,
    )


@dataclass(frozen=True)
class _Choice:
    plan: ColumnPlan
    bits: Bits
    error: float


def _allowed(profiles: Sequence[LayerProfile], widths: Sequence[int], floors: Mapping[str, int]) -> list[list[bool]]:
    names = {p.name for p in profiles}
    for name, floor in floors.items():
        if name not in names:
            raise ConfigError(f"a floor is set for layer {name!r}, which is not among the layers to quantize")
        if not any(width >= floor for width in widths):
            raise ConfigError(f"the floor of layer {name!r} is {floor} bits, above all widths {tuple(widths)}")
    if not widths or any(width not in WIDTHS for width in widths):
        raise ConfigError(f"widths must be among {WIDTHS}, got {tuple(widths)}")
    return [[w in widths and w >= floors.get(p.name, 0) for w in WIDTHS] for p in profiles]


def _bisect(size: Any, limit: float, ceiling: float) -> float:
    """The lowest price at which ``size`` stays within ``limit``; prices span many orders of magnitude, so halve the
    exponent."""
    low, high = ceiling * 1e-24, ceiling
    if size(low) <= limit:
        return low
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if size(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def _choose(profile: LayerProfile, allowed: Sequence[bool], price: float, reserve_price: float) -> _Choice:
    """The best widths at a price a bit, in whole blocks of 32 columns, and the reserved weights that go with them."""
    N, K = profile.out_features, profile.in_features
    extra = np.array(profile.reserve) * _OUTLIER_BITS
    value = profile.error[:, :, 0] if np.isinf(reserve_price) else (profile.error + reserve_price * extra).min(axis=2)
    value = value + price * np.array([width * N + 8 * (1 << width) for width in WIDTHS])
    value = np.where(np.array(allowed), value, np.inf)
    free = value.argmin(axis=1)
    bits = np.empty(K, dtype=np.uint8)
    remaining = np.arange(K)
    usable = [i for i, ok in enumerate(allowed) if ok]
    for position, i in enumerate(usable):
        rest = usable[position + 1 :]
        if not rest:
            bits[remaining] = WIDTHS[i]
            break
        count = _whole_blocks(int((free[remaining] <= i).sum()), len(remaining))
        advantage = value[remaining][:, rest].min(axis=1) - value[remaining, i]
        picked = np.argsort(-advantage, kind="stable")[:count]
        bits[remaining[picked]] = WIDTHS[i]
        remaining = np.delete(remaining, picked)
    return _with_reserve(profile, torch.from_numpy(bits), reserve_price)


def _whole_blocks(count: int, available: int) -> int:
    """``count`` rounded to blocks of 32; all that is available if that is the nearer."""
    rounded = (count + BLOCK // 2) // BLOCK * BLOCK
    return available if rounded > available or available - count < abs(rounded - count) else rounded


def _with_reserve(profile: LayerProfile, bits: torch.Tensor, price: float) -> _Choice:
    """The reserved weights of each column at a price a bit, for given widths."""
    rows = np.arange(profile.in_features)
    index = np.searchsorted(-np.array(WIDTHS), -bits.numpy().astype(int))
    error = profile.error[rows, index]
    level = np.zeros(len(rows), dtype=np.int64)
    if not np.isinf(price):
        # Row pointers, a fixed cost of a layer's first outlier, are paid from the budget but not held against it
        # here: on SmolLM2 at 2.28 bits, layers that forgo outliers to save them cost 0.2 nats of KL. The
        # largest weights matter beyond their share of a Hessian whose largest tokens are clipped.
        level = (error + price * np.array(profile.reserve) * _OUTLIER_BITS).argmin(axis=1)
    reserve = torch.from_numpy(np.array(profile.reserve, dtype=np.int64)[level])
    plan = ColumnPlan(bits, reserve)
    return _Choice(plan, plan.predict(profile.out_features), float(error[rows, level].sum()))


def _fill(profiles: Sequence[LayerProfile], choices: list[_Choice], limit: float, ceiling: float) -> list[_Choice]:
    """Spend what one price for all leaves over (a layer's first outlier costs all its row pointers) layer by layer."""
    result = list(choices)
    room = limit - sum(choice.bits.nbytes for choice in result)
    for i in sorted(range(len(result)), key=lambda i: -result[i].error):
        profile, old = profiles[i], result[i]
        most = old.bits.nbytes + room

        def size(price: float, profile: LayerProfile = profile, old: _Choice = old) -> float:
            return float(_with_reserve(profile, old.plan.bits, price).bits.nbytes)

        new = _with_reserve(profile, old.plan.bits, _bisect(size, most, ceiling))
        if old.bits.nbytes < new.bits.nbytes <= most:
            room -= new.bits.nbytes - old.bits.nbytes
            result[i] = new
    return result

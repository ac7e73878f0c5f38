"""One-dimensional k-means with exact sums: one sort, prefix sums, and a binary search of the borders a step.

A cluster of sorted values is an interval, so its sum is a difference of two prefix sums and a Lloyd step costs ``k -
1`` binary searches, whatever the number of values; no distance matrix is ever formed. Three methods share that
machinery:

- ``"lloyd"``: Lloyd from a companded start (centroids at the quantiles of density^(1/3), the optimum of Panter and
  Dite 1951 for many centroids).
- ``"coarse"``: the optimal partition over 64 companded candidate borders by dynamic programming, then Lloyd. On
  weight columns it lies within 0.1 / 0.2 / 0.5 % of the optimum at 2 / 3 / 4 bits (benchmarks/kmeans.py), at a tenth
  of the optimum's price.
- ``"optimal"``: the global optimum by dynamic programming with divide and conquer (Wang and Song 2011; Groenlund et
  al. 2017).

Columns of at most 64 different values get the optimum by every method: each border between two of them is a candidate.

The paper's section 3.2 calls for k-means of each column; its code runs a general library with a random start
(claq.md, 1.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError

METHODS = ("lloyd", "coarse", "optimal")
"""The ways to cluster, fastest first."""

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_CANDIDATES = 64
_SAMPLES = 384
_TAIL = 48
# Lloyd ends when no centroid moves by more than this share of the range of values: a thirtieth of what int8 resolves.
_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Clusters:
    """Result of :func:`cluster`.

    Attributes:
        centroids: float64 ``[k]``, ascending; when there are fewer distinct values than ``k``, the last one repeats.
        codes: int64 ``[n]``, the centroid of each value (masked values get their nearest centroid too).
        error: sum of (weighted) squared distances of the values that took part.
        iterations: Lloyd steps taken.
    """

    centroids: torch.Tensor
    codes: torch.Tensor
    error: float
    iterations: int


@lru_cache(maxsize=64)
def _counts(n: int) -> Float64:
    """0, 1, ..., n: the mass below each border when every value counts once."""
    counts = np.arange(n + 1, dtype=np.float64)
    counts.flags.writeable = False
    return counts


class SortedValues:
    """Sorted values with the prefix sums that every method here works on.

    ``values`` ascending float64 ``[n]``; ``mass[i]`` the weight, ``moment[i]`` the weighted sum of the first ``i``
    values.
    """

    __slots__ = ("mass", "moment", "values", "weights")

    def __init__(self, values: Float64, weights: Float64 | None = None) -> None:
        n = len(values)
        self.values = values
        self.weights = weights
        self.moment = np.zeros(n + 1)
        if weights is None:
            self.mass = _counts(n)
            np.add.accumulate(values, out=self.moment[1:])
        else:
            self.mass = np.zeros(n + 1)
            np.cumsum(weights, out=self.mass[1:])
            np.cumsum(weights * values, out=self.moment[1:])

    def error(self, borders: Int64) -> float:
        """Sum of squared distances when ``borders`` (``[k + 1]``, from 0 to n) cut the values into clusters."""
        squares = self.values * self.values
        total = float(squares.sum() if self.weights is None else (self.weights * squares).sum())
        moment = np.diff(self.moment[borders])
        mass = np.diff(self.mass[borders])
        filled = mass > 0
        return max(0.0, total - float((moment[filled] ** 2 / mass[filled]).sum()))


def _means(data: SortedValues, borders: Int64) -> Float64:
    """Centroids of non-empty clusters cut at ``borders``."""
    mass = np.diff(data.mass[borders])
    middle = data.values[np.minimum(borders[:-1], len(data.values) - 1)]
    return np.where(mass > 0, np.diff(data.moment[borders]) / np.where(mass > 0, mass, 1.0), middle)


def _compand(gaps: Float64) -> Float64:
    """``gaps`` to the power of 21/32.

    Panter-Dite: the best density of centroids goes with the cube root of the density of values. A gap between
    neighbouring order statistics goes with 1/density, so raising it to 2/3 and summing gives the companding function.
    21/32 is as good, and made of square roots, which round alike everywhere.
    """
    half = np.sqrt(gaps)
    eighth = np.sqrt(np.sqrt(half))
    return cast(Float64, half * eighth * np.sqrt(np.sqrt(eighth)))


@lru_cache(maxsize=64)
def _sample(n: int) -> tuple[Int64, Float64]:
    """Order statistics that describe the density of ``n`` sorted values: all at the ends, every so many in between.

    Returns their indices and, to the power of 11/32 (the cube root, see :func:`_compand`), how many values each gap
    stands for.
    """
    stride = max(1, n // _SAMPLES)
    tail = min(n, _TAIL)
    index = np.unique(np.concatenate([np.arange(tail), np.arange(tail, n, stride), np.arange(n - tail, n)]))
    quarter = np.sqrt(np.sqrt(np.diff(index).astype(np.float64)))
    sixteenth = np.sqrt(np.sqrt(quarter))
    return index, quarter * sixteenth * np.sqrt(sixteenth)


def _companded(data: SortedValues) -> tuple[Int64, Float64]:
    """Companding function at a sample of the values: their indices, and a curve that rises from 0 and is flat over
    equal values."""
    index, share = _sample(len(data.values))
    curve = np.zeros(len(index))
    np.cumsum(_compand(np.diff(data.values[index])) * share, out=curve[1:])
    return index, curve


def _companded_start(data: SortedValues, k: int) -> Float64:
    index, curve = _companded(data)
    targets = (np.arange(k) + 0.5) * (curve[-1] / k)
    below = (curve.searchsorted(targets, side="right") - 1).clip(0, len(curve) - 2)
    low, high = data.values[index[below]], data.values[index[below + 1]]
    return cast(Float64, low + (targets - curve[below]) * ((high - low) / (curve[below + 1] - curve[below])))


def _coarse_start(data: SortedValues, k: int) -> Float64 | None:
    """Optimal centroids when borders may stand at the companded candidates only; None if those are fewer than k + 1."""
    index, curve = _companded(data)
    cuts = index[curve.searchsorted(np.linspace(0.0, curve[-1], _candidates(k) + 1))]
    cuts[0], cuts[-1] = 0, len(data.values)
    cuts = cuts[np.concatenate([[True], cuts[1:] > cuts[:-1]])]
    return _best_partition(data, k, cuts) if len(cuts) > k else None


def _candidates(k: int) -> int:
    return max(_CANDIDATES, 4 * k)


def _best_partition(data: SortedValues, k: int, cuts: Int64) -> Float64:
    """Centroids of the partition into ``k`` clusters with the least error, whose borders are among ``cuts`` (ascending, from 0
    to n, at least ``k + 1``)."""
    m = len(cuts)
    moment, mass = data.moment[cuts], data.mass[cuts]
    # gain[j, i]: what the cluster between cuts i < j takes off the sum of squares; the best partition has the largest
    # sum of gains. Only the best sums are kept on the way; which border gave them is found again on the way back.
    inside = mass[:, None] - mass
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(inside > 0, np.square(moment[:, None] - moment) / inside, 0.0)
    gain[_upper_triangle(m)] = -np.inf
    layers = [gain[:, 0]]
    for _ in range(k - 2):
        layers.append((gain + layers[-1]).max(axis=1))
    chosen = np.empty(k + 1, dtype=np.int64)
    chosen[0], chosen[k] = 0, m - 1
    for level in range(k - 1, 0, -1):
        chosen[level] = (gain[chosen[level + 1]] + layers[level - 1]).argmax()
    return _means(data, cuts[chosen])


@lru_cache(maxsize=64)
def _upper_triangle(size: int) -> npt.NDArray[np.bool_]:
    return np.triu(np.ones((size, size), dtype=bool))


def optimal_borders(data: SortedValues, k: int) -> Int64:
    """Borders ``[k + 1]`` of the partition with the least error (dynamic programming, O(k n log n)).

    The best last border never moves left as more values are taken in, so each layer is filled by divide and conquer;
    all subproblems of one depth are evaluated together.
    """
    n = len(data.values)
    moment, mass = data.moment, data.mass

    def gain(start: Int64, stop: Int64) -> Float64:
        width = mass[stop] - mass[start]
        return np.where(width > 0, (moment[stop] - moment[start]) ** 2 / np.where(width > 0, width, 1.0), 0.0)

    everything = np.arange(n + 1)
    best = gain(np.zeros(n + 1, dtype=np.int64), everything)
    layers = []
    for _ in range(1, k):
        grown = np.full(n + 1, -np.inf)
        choice = np.zeros(n + 1, dtype=np.int64)
        low, high, left, right = (np.array([v]) for v in (0, n, 0, n))
        while len(low):
            middle = (low + high) // 2
            lengths = np.minimum(right, middle) - left + 1
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            owner = np.repeat(np.arange(len(middle)), lengths)
            start = np.arange(offsets[-1]) - offsets[owner] + left[owner]
            total = best[start] + gain(start, middle[owner])
            top = np.maximum.reduceat(total, offsets[:-1])
            hits = np.flatnonzero(total == top[owner])
            first = hits[np.searchsorted(owner[hits], np.arange(len(middle)))]
            grown[middle], choice[middle] = top, start[first]
            low, high, left, right = (
                np.concatenate([low, middle + 1]),
                np.concatenate([middle - 1, high]),
                np.concatenate([left, start[first]]),
                np.concatenate([start[first], right]),
            )
            alive = low <= high
            low, high, left, right = low[alive], high[alive], left[alive], right[alive]
        best = grown
        layers.append(choice)
    borders = np.empty(k + 1, dtype=np.int64)
    borders[0], borders[k] = 0, n
    for level in range(k - 1, 0, -1):
        borders[level] = layers[level - 1][borders[level + 1]]
    return borders


def lloyd(data: SortedValues, centroids: Float64, max_iterations: int) -> tuple[Float64, Int64, int]:
    """Lloyd's steps from ``centroids`` (ascending ``[k]``) until no value changes its cluster.

    A cluster that is left empty keeps its centroid. The error never rises from one step to the next.

    Returns:
        centroids ``[k]``, the borders ``[k + 1]`` that go with them, and the number of steps.
    """
    k = len(centroids)
    borders = np.zeros(k + 1, dtype=np.int64)
    borders[k] = len(data.values)
    inner, left, right = borders[1:k], borders[:-1], borders[1:]
    find, mass, moment = data.values.searchsorted, data.mass, data.moment
    middle = np.empty(k - 1)
    near = _TOLERANCE * (data.values[-1] - data.values[0])
    seen, step = b"", 0
    for step in range(max_iterations):
        np.add(centroids[1:], centroids[:-1], out=middle)
        inner[:] = find(np.multiply(middle, 0.5, out=middle))
        state = borders.tobytes()
        if state == seen:
            break
        seen = state
        inside = right - left if data.weights is None else np.diff(mass.take(borders))
        sums = moment.take(borders)
        sums = sums[1:] - sums[:-1]
        if np.logical_and.reduce(inside):
            moved = sums / inside
        else:
            moved = np.where(inside > 0, sums / np.where(inside > 0, inside, 1.0), centroids)
        if np.maximum.reduce(np.abs(moved - centroids)) < near:
            return moved, borders, step + 1
        centroids = moved
    return centroids, borders, step


def centroids_of(
    data: SortedValues, k: int, method: str = "coarse", max_iterations: int = 100, start: Float64 | None = None
) -> tuple[Float64, int]:
    """``k`` ascending centroids of sorted values, and the Lloyd steps taken.

    Args:
        data: at least one value.
        k: number of centroids.
        method: one of :data:`METHODS`; ignored when ``start`` is given.
        max_iterations: most Lloyd steps.
        start: ascending centroids to run Lloyd from.
    """
    if start is not None:
        centroids, _, steps = lloyd(data, start, max_iterations)
        return centroids, steps
    values = data.values
    probe = values[_sample(len(values))[0]]
    changes = np.count_nonzero(probe[1:] - probe[:-1])
    if changes < _candidates(k):
        cuts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]]))
        distinct = values[cuts[:-1]]
        if len(distinct) <= k:
            return np.concatenate([distinct, np.full(k - len(distinct), distinct[-1])]), 0
        if method != "optimal" and len(distinct) <= _candidates(k):
            return _best_partition(data, k, cuts), 0
    if method == "optimal":
        return _means(data, optimal_borders(data, k)), 0
    if changes > 2 * k:
        first = _coarse_start(data, k) if method == "coarse" else _companded_start(data, k)
        if first is not None:
            centroids, _, steps = lloyd(data, first, max_iterations)
            return centroids, steps
    distinct = np.unique(values)
    spread = distinct[((np.arange(k) + 0.5) / k * len(distinct)).astype(np.int64)]
    centroids, _, steps = lloyd(data, spread, max_iterations)
    return centroids, steps


def nearest(values: npt.NDArray[Any], centroids: npt.NDArray[Any]) -> Int64:
    """Index of the nearest of the ascending ``centroids`` for each value; a value on a border gets the lower one."""
    return cast(Int64, ((centroids[1:] + centroids[:-1]) * 0.5).searchsorted(values))


def cluster(
    values: torch.Tensor,
    k: int,
    *,
    method: str = "coarse",
    weights: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    max_iterations: int = 100,
) -> Clusters:
    """Cluster one column of weights into ``k`` centroids; deterministic.

    Args:
        values: float ``[n]``, finite.
        k: number of centroids, at least 1.
        method: ``"lloyd"``, ``"coarse"`` or ``"optimal"``.
        weights: non-negative ``[n]``; each value's squared distance counts that often. None = 1.
        keep: bool ``[n]``; values where it is False take no part in the fit (reserved outliers).
        start: ``[k]`` centroids to run Lloyd from instead of the method's own start.
        max_iterations: most Lloyd steps.

    Raises:
        ConfigError: unknown method, or ``k`` below 1.
    """
    if method not in METHODS:
        raise ConfigError(f"k-means method must be one of {', '.join(METHODS)}, got {method!r}")
    if k < 1:
        raise ConfigError(f"the number of centroids must be at least 1, got {k}")
    array = values.detach().cpu().numpy().astype(np.float64)
    mass = None if weights is None else weights.detach().cpu().numpy().astype(np.float64)
    inside = np.ones(len(array), dtype=bool) if keep is None else keep.detach().cpu().numpy().astype(bool)
    if mass is not None:
        inside = inside & (mass > 0)
    if not inside.any():
        zero = torch.zeros(k, dtype=torch.float64, device=values.device)
        return Clusters(zero, torch.zeros(len(array), dtype=torch.int64, device=values.device), 0.0, 0)
    data = sort_values(array[inside], None if mass is None else mass[inside])
    first = None if start is None else np.sort(start.detach().cpu().numpy().astype(np.float64))
    centroids, steps = centroids_of(data, k, method, max_iterations, first)
    codes = nearest(array, centroids)
    distance = (array - centroids[codes])[inside] ** 2
    error = float(distance.sum() if mass is None else (distance * mass[inside]).sum())
    device = values.device
    return Clusters(torch.from_numpy(centroids).to(device), torch.from_numpy(codes).to(device), error, steps)


def sort_values(values: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None) -> SortedValues:
    """Sort ``values`` (and their weights along) into :class:`SortedValues`."""
    if weights is None:
        return SortedValues(np.sort(values).astype(np.float64))
    order = np.argsort(values, kind="stable")
    return SortedValues(values[order].astype(np.float64), weights[order].astype(np.float64))


class SortedColumns:
    """Many columns sorted at once, on the tensor's own device, for work without a dependency between columns.

    Args:
        columns: float ``[C, n]``, n >= 1.
    """

    def __init__(self, columns: torch.Tensor) -> None:
        if columns.device.type == "cpu":  # NumPy's vectorised sort is several times faster
            ordered = torch.from_numpy(np.sort(columns.detach().numpy(), axis=1))
        else:
            ordered = columns.sort(dim=1).values
        self.values = ordered.to(torch.float64)
        count, n = self.values.shape
        self.moment = self.values.new_zeros(count, n + 1)
        torch.cumsum(self.values, dim=1, out=self.moment[:, 1:])
        index, share = _sample(n)
        self.sample = self.values[:, torch.from_numpy(index).to(self.values.device)]
        self.curve = torch.zeros_like(self.sample)
        half = self.sample.diff(dim=1).sqrt()
        eighth = half.sqrt().sqrt()
        gaps = half * eighth * eighth.sqrt().sqrt()
        torch.cumsum(gaps * torch.from_numpy(share).to(gaps.device), dim=1, out=self.curve[:, 1:])
        self._square: torch.Tensor | None = None

    def _squares(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Sum of squares of each column between two borders."""
        n = self.values.shape[1]
        if int(low.max()) == 0 and int(high.min()) == n:
            return self.values.square().sum(dim=1)
        if self._square is None:
            self._square = torch.zeros_like(self.moment)
            torch.cumsum(self.values.square(), dim=1, out=self._square[:, 1:])
        return (self._square.gather(1, high[:, None]) - self._square.gather(1, low[:, None]))[:, 0]

    def without_extremes(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each sorted column begins and ends once its ``count`` largest magnitudes are gone: two int64
        ``[C]``."""
        columns, n = self.values.shape
        low = torch.zeros(columns, dtype=torch.int64, device=self.values.device)
        if count:
            ends = torch.cat([-self.values[:, :count], self.values[:, n - count :].flip(1)], dim=1)
            largest = torch.argsort(ends, dim=1, descending=True, stable=True)[:, :count]
            low = (largest < count).sum(dim=1)
        return low, low + (n - count)

    def fit(self, k: int, reserved: int = 0, max_iterations: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
        """Lloyd from the companded start.

        Args:
            k: number of centroids.
            reserved: the largest magnitudes of each column that take no part; less than n.
            max_iterations: most Lloyd steps; it ends as soon as no column changes.

        Returns:
            centroids float64 ``[C, k]`` ascending, and the summed squared distance float64 ``[C]``.
        """
        low, high = self.without_extremes(reserved)
        ends = torch.stack([self.values.gather(1, low[:, None]), self.values.gather(1, high[:, None] - 1)], dim=1)[
            ..., 0
        ]
        around = torch.searchsorted(self.sample, ends).clamp_(max=self.sample.shape[1] - 1)
        bottom, top = self.curve.gather(1, around).split(1, dim=1)
        steps = (torch.arange(k, dtype=torch.float64, device=self.values.device) + 0.5) / k
        targets = bottom + steps * (top - bottom)
        above = torch.searchsorted(self.curve, targets).clamp_(max=self.curve.shape[1] - 1)
        below = (above - 1).clamp_(min=0)
        start, stop = self.curve.gather(1, below), self.curve.gather(1, above)
        share = ((targets - start) / (stop - start).clamp(min=1e-300)).clamp_(0, 1)
        first = self.sample.gather(1, below)
        centroids = first + share * (self.sample.gather(1, above) - first)
        near = _TOLERANCE * (ends[:, 1] - ends[:, 0])[:, None]

        borders = torch.empty(len(low), k + 1, dtype=torch.int64, device=low.device)
        borders[:, 0], borders[:, k] = low, high
        centroids, borders = _batched_lloyd(self.values, self.moment, centroids, borders, near, max_iterations)
        sums = self.moment.gather(1, borders).diff(dim=1)
        error = self._squares(low, high) - (sums * sums / borders.diff(dim=1).clamp(min=1)).sum(dim=1)
        return centroids, error.clamp(min=0)


def _batched_lloyd(
    values: torch.Tensor,
    moment: torch.Tensor,
    centroids: torch.Tensor,
    borders: torch.Tensor,
    near: torch.Tensor,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd on sorted columns, each until its centroids move by no more than ``near``; returns centroids and borders.

    Columns take different numbers of steps. Once half of a batch rest, the others go on in a batch of their own.
    """
    k = centroids.shape[1]
    final, cuts_at_end = centroids.clone(), borders.clone()
    rows = torch.arange(len(values), device=values.device)
    resting = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    low, high = borders[:, :1], borders[:, k:]
    for _ in range(max_iterations):
        cuts = torch.searchsorted(values, (centroids[:, 1:] + centroids[:, :-1]) * 0.5)
        borders[:, 1:k] = torch.minimum(torch.maximum(cuts, low), high)
        inside = borders.diff(dim=1)
        moved = torch.where(inside > 0, moment.gather(1, borders).diff(dim=1) / inside.clamp(min=1), centroids)
        # One that rested before stays as it was, whatever batch it is in.
        here = rows[~resting]
        final[here], cuts_at_end[here] = moved[~resting], borders[~resting]
        resting |= ~((moved - centroids).abs() > near).any(dim=1)
        centroids = moved
        count = len(rows) - int(resting.sum())
        if not count:
            break
        if count <= len(rows) // 2:
            going = ~resting
            rows, values, moment, centroids = rows[going], values[going], moment[going], centroids[going]
            borders, near, low, high = borders[going], near[going], low[going], high[going]
            resting = resting[going]
    return final, cuts_at_end

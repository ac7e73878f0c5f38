"""k-means in one dimension: against brute force, against scikit-learn, and on the shapes that break naive code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm.kmeans import (
    METHODS,
    SortedColumns,
    SortedValues,
    centroids_of,
    cluster,
    lloyd,
    nearest,
    sort_values,
)
from claq_export.errors import ConfigError

values_strategy = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60)


def brute_force(values: np.ndarray, weights: np.ndarray, k: int) -> float:
    """Least error over all ways to cut the sorted values into at most k intervals."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    n, best = len(v), np.inf
    for parts in range(1, min(k, n) + 1):
        for cuts in itertools.combinations(range(1, n), parts - 1):
            total = 0.0
            for a, b in itertools.pairwise((0, *cuts, n)):
                if w[a:b].sum() > 0:
                    total += float((w[a:b] * (v[a:b] - np.average(v[a:b], weights=w[a:b])) ** 2).sum())
            best = min(best, total)
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_optimal_equals_brute_force(values: list[float], k: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values)))
    found = cluster(torch.tensor(values), k, method="optimal", weights=torch.tensor(weights, dtype=torch.float64))
    best = brute_force(np.array(values, dtype=np.float64), np.array(weights, dtype=np.float64), k)
    assert found.error == pytest.approx(best, rel=1e-7, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(values_strategy, st.sampled_from([1, 2, 4, 8, 16]))
def test_optimal_is_never_worse_and_codes_are_nearest(values: list[float], k: int) -> None:
    tensor = torch.tensor(values)
    results = {method: cluster(tensor, k, method=method) for method in METHODS}
    for found in results.values():
        assert results["optimal"].error <= found.error * (1 + 1e-9) + 1e-9
        assert found.centroids.shape == (k,)
        assert bool((found.centroids.diff() >= 0).all())
        distance = (tensor.double()[:, None] - found.centroids).abs()
        chosen = distance.gather(1, found.codes[:, None])[:, 0]
        torch.testing.assert_close(chosen, distance.min(dim=1).values, rtol=0, atol=1e-12)
        assert found.error == pytest.approx(float((chosen**2).sum()), rel=1e-9, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=20, max_size=60), st.integers(2, 16), st.booleans())
def test_lloyd_never_raises_the_error(values: list[float], k: int, weighted: bool) -> None:
    array = np.array(values)
    weights = np.arange(1.0, len(array) + 1) if weighted else None
    data = sort_values(array, weights)
    centroids = np.linspace(array.min(), array.max(), k)
    mass = np.ones(len(array)) if weights is None else weights

    def error(c: np.ndarray) -> float:
        return float((mass * (array - c[nearest(array, c)]) ** 2).sum())

    last = error(centroids)
    for _ in range(12):
        centroids, _, _ = lloyd(data, centroids, 1)
        now = error(centroids)
        assert now <= last * (1 + 1e-9) + 1e-9
        last = now


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [128, 1024])
def test_no_worse_than_scikit_learn(bits: int, rows: int) -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(bits * 10000 + rows)
    ratios: dict[str, list[float]] = {"lloyd": [], "coarse": []}
    for _ in range(4):
        values = rng.standard_t(6, rows).astype(np.float32)
        inertia = KMeans(1 << bits, n_init=1, random_state=10).fit(values[:, None]).inertia_
        for method, ratio in ratios.items():
            ratio.append(cluster(torch.from_numpy(values), 1 << bits, method=method).error / inertia)
    if rows > 128:  # a plain Lloyd of 16 centroids on 128 values is a matter of luck, for scikit-learn too
        assert np.mean(ratios["lloyd"]) < 1.03
    assert np.mean(ratios["coarse"]) < 1.001


def test_coarse_is_close_to_the_optimum() -> None:
    rng = np.random.default_rng(3)
    for k, limit in ((4, 1.003), (8, 1.006), (16, 1.015)):
        for rows in (384, 1536):
            values = torch.from_numpy(rng.standard_t(5, rows))
            optimum = cluster(values, k, method="optimal").error
            assert cluster(values, k, method="coarse").error <= limit * optimum


@pytest.mark.parametrize("method", ["lloyd", "coarse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_few_different_values_get_the_optimum(method: str, weighted: bool) -> None:
    """Weights that were on a grid before, as those of int8 models: Lloyd from a start ends far from the optimum there."""
    rng = np.random.default_rng(5)
    for distinct, k in itertools.product((5, 9, 17, 33, 64), (4, 8, 16)):
        grid, shares = rng.standard_t(4, distinct), rng.dirichlet(np.full(distinct, 0.5))
        values = torch.from_numpy(grid[rng.choice(distinct, 700, p=shares)].astype(np.float32))
        weights = torch.from_numpy(rng.uniform(0.1, 3, 700)) if weighted else None
        best = cluster(values, k, method="optimal", weights=weights).error
        assert cluster(values, k, method=method, weights=weights).error <= best * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [3.5],
        [1.0] * 50,
        [0.0] * 300,
        [-1.0, 1.0] * 40,
        [0.0] * 200 + [5.0],
        [1e-30, 2e-30, 3e-30] * 30,
        [1e30, -1e30] * 20,
    ],
)
def test_few_distinct_values_are_met_exactly(method: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    found = cluster(tensor, 4, method=method)
    assert found.error == 0.0
    torch.testing.assert_close(found.centroids[found.codes], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_masked_values_take_no_part_but_get_a_code(method: str) -> None:
    values = torch.cat([torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0, -1000.0])])
    keep = values.abs() < 100
    masked, alone = cluster(values, 8, method=method, keep=keep), cluster(values[keep], 8, method=method)
    torch.testing.assert_close(masked.centroids, alone.centroids, rtol=0, atol=0)
    assert masked.error == pytest.approx(alone.error)
    assert masked.codes[-2:].tolist() == [7, 0]
    nothing = cluster(values, 8, method=method, keep=torch.zeros(202, dtype=torch.bool))
    assert nothing.error == 0
    assert not nothing.centroids.any()


def test_zero_weight_means_masked() -> None:
    values = torch.arange(40.0)
    weights = (values < 30).double()
    found = cluster(values, 4, weights=weights)
    torch.testing.assert_close(found.centroids, cluster(values[:30], 4).centroids)


def test_start_is_used() -> None:
    values = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0, 9.1])
    found = cluster(values, 2, start=torch.tensor([7.0, 0.0]), max_iterations=50)
    assert found.error <= float(((values - values.mean()) ** 2).sum())
    stuck = cluster(values, 2, start=torch.tensor([0.0, 7.0]), max_iterations=0)
    assert stuck.centroids.tolist() == [0.0, 7.0]


def test_batched_columns_agree_with_single_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(7, 500, generator=generator) ** 3
    columns[3] = 2.0
    for k in (4, 16):
        centroids, error = SortedColumns(columns).fit(k)
        assert centroids.shape == (7, k)
        for row, total in zip(columns, error, strict=True):
            assert float(total) <= 1.1 * cluster(row, k, method="lloyd").error + 1e-6
    assert float(error[3]) == pytest.approx(0, abs=1e-9)


def test_batched_columns_leave_out_their_largest_magnitudes() -> None:
    columns = torch.randn(5, 300, generator=torch.Generator().manual_seed(4)) ** 3
    batch = SortedColumns(columns)
    _, error = batch.fit(4, reserved=7)
    for row, total in zip(columns, error, strict=True):
        keep = torch.ones(300, dtype=torch.bool)
        keep[row.abs().topk(7).indices] = False
        assert float(total) == pytest.approx(cluster(row, 4, method="lloyd", keep=keep).error, rel=0.1)
        assert float(total) >= cluster(row, 4, method="optimal", keep=keep).error * (1 - 1e-9)


def test_deterministic() -> None:
    values = torch.randn(777, generator=torch.Generator().manual_seed(2))
    for method in METHODS:
        first, second = (cluster(values, 8, method=method) for _ in range(2))
        assert torch.equal(first.centroids, second.centroids)
        assert torch.equal(first.codes, second.codes)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="method"):
        cluster(torch.zeros(3), 2, method="magic")
    with pytest.raises(ConfigError, match="at least 1"):
        cluster(torch.zeros(3), 0)


def test_error_of_borders() -> None:
    data = SortedValues(np.array([0.0, 2.0, 10.0]))
    assert data.error(np.array([0, 2, 3])) == pytest.approx(2.0)
    centroids, _ = centroids_of(data, 2, "optimal")
    assert centroids.tolist() == [1.0, 10.0]

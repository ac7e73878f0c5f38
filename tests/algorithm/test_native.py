"""libclaq's column loop against the Python that states it: the same bits, whatever the column, the threads or the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm import Hessian, LayerSettings, native, quantize_layer
from claq_export.algorithm.columns import Column, ColumnCoder, from_native
from claq_export.algorithm.kmeans import METHODS, SortedColumns, cluster
from claq_export.errors import ConfigError, ModelError
from claq_export.libclaq import load_libclaq

pytestmark = pytest.mark.skipif(load_libclaq()[0] is None, reason=load_libclaq()[1] or "libclaq is there")

KINDS = (
    "spread",
    "halves",
    "integers",
    "tiny",
    "huge",
    "beyond every scale",
    "mostly zero",
    "constant",
    "zero",
    "two values",
    "negative zeros",
)


def make_column(kind: str, rows: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    values = rng.standard_t(5, rows)
    if kind == "halves":
        values = np.round(values * 2) / 2
    elif kind == "integers":
        values = np.round(values)
    elif kind == "tiny":
        values *= 1e-9
    elif kind == "huge":
        values *= 1e4
    elif kind == "beyond every scale":
        values *= 1e7
    elif kind == "mostly zero":
        values *= rng.random(rows) < 0.2
    elif kind == "constant":
        values[:] = values[0]
    elif kind == "zero":
        values[:] = 0
    elif kind == "two values":
        values = np.where(values > 0, 0.75, -0.25)
    elif kind == "negative zeros":
        values = np.where(values > 0, values, -0.0)
    return values.astype(np.float32)


def python_coder(settings: LayerSettings, weights: npt.NDArray[np.float64] | None) -> ColumnCoder:
    coder = ColumnCoder(settings, weights)
    coder.native = False
    return coder


def assert_same(found: Column, expected: Column) -> None:
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.integers, expected.integers)
    assert found.scale.tobytes() == expected.scale.tobytes()
    assert np.array_equal(found.value, expected.value)
    assert np.array_equal(found.rows, expected.rows)
    assert found.extra.tobytes() == expected.extra.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 5, 17, 40, 96, 300, 384, 767, 768, 1000, 1600]),
    st.sampled_from(KINDS),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(METHODS),
    st.sampled_from(["none", "positive", "some zero", "all zero"]),
    st.sampled_from(["sides", "magnitude"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_column_has_the_bits_of_the_python(
    rows: int, kind: str, width: int, method: str, weighting: str, choice: str, fit_outliers: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    column = make_column(kind, rows, rng)
    weights = None if weighting == "none" else rng.random(rows)
    if weights is not None and weighting != "positive":
        weights *= 0.0 if weighting == "all zero" else rng.random(rows) < 0.5
    reserve = int(rng.integers(0, max(1, rows // 3)))
    options = LayerSettings(kmeans=method, outlier_choice=choice, fit_outliers=fit_outliers)
    expected = python_coder(options, weights).quantize(column, width, reserve)
    for kernel in (None, "portable"):
        coded = native.quantize_columns(column[None], [width], [reserve], options, row_weight=weights, kernel=kernel)
        assert_same(from_native(coded, 0, width), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_a_given_start_has_the_bits_of_the_python(rows: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    column = make_column("spread", rows, rng)
    start = np.sort(rng.standard_normal(1 << width))
    expected = python_coder(LayerSettings(), None).quantize(column, width, 0, start=start)
    assert_same(ColumnCoder(LayerSettings()).quantize(column, width, 0, start=start), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "outliers": 0.02, "block": 33},
        {"bits": 2.3, "outliers": 0.01, "reservation": "saliency", "row_weights": "energy", "block": 7},
        {"bits": 2, "kmeans": "lloyd", "act_order": False, "descent": 1},
    ],
    ids=str,
)
def test_a_layer_has_the_bits_of_the_python(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(150, 96) * torch.rand(150, 1)
    weight[7] = 0
    weight[:, 11] = 0
    hessian = Hessian(96)
    hessian.add(torch.randn(500, 96) @ torch.randn(96, 96))
    layers = {}
    for quantizer in ("python", "native"):
        monkeypatch.setenv(native.SWITCH, quantizer)
        layers[quantizer] = quantize_layer(weight, hessian, LayerSettings(**options)).layer
    for name, tensor in layers["python"].tensors().items():
        assert torch.equal(tensor, layers["native"].tensors()[name]), name
    monkeypatch.setenv(native.SWITCH, "native")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, tensor in quantize_layer(weight, hessian, LayerSettings(**options)).layer.tensors().items():
        assert torch.equal(tensor, layers["native"].tensors()[name]), name


def test_threads_and_kernels_do_not_change_a_bit() -> None:
    rng = np.random.default_rng(0)
    # Wide enough that columns, and updates of columns, are really spread over threads.
    target = rng.standard_normal((24, 12000)).astype(np.float32)
    feedback = (np.tril(rng.standard_normal((24, 24))) * 0.2 + np.eye(24)).astype(np.float32)
    arguments = (target, [4, 3] * 12, [5] * 24, LayerSettings())
    for owed in (None, feedback):
        expected = native.quantize_columns(*arguments, feedback=owed, threads=1)
        for threads, kernel in ((4, None), (1, "portable"), (3, "portable")):
            found = native.quantize_columns(*arguments, feedback=owed, threads=threads, kernel=kernel)
            for name in ("target", "value", "error", "codes", "codebook", "scale", "outlier_row", "outlier_extra"):
                assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_profiles_agree_with_the_python(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = np.stack([make_column(kind, rows, rng) for kind in KINDS])
    reserve = sorted({min(int(share * rows), rows // 2) for share in (0.0, 0.01, 0.05, 0.2)})
    found = native.profile_columns(columns, (4, 3, 2), reserve, 12, threads=1)
    assert np.array_equal(found, native.profile_columns(columns, (4, 3, 2), reserve, 12, threads=3))
    # Where values repeat, a border may fall on one of them, and then the last bit of torch's sums decides.
    batch = SortedColumns(torch.from_numpy(columns))
    untied = [KINDS.index(kind) for kind in ("spread", "tiny", "huge", "constant", "zero")]
    scale = np.square(columns.astype(np.float64)).sum(axis=1) + 1e-300
    for i, width in enumerate((4, 3, 2)):
        for m, count in enumerate(reserve):
            expected = batch.fit(1 << width, count, 12)[1].numpy()
            np.testing.assert_allclose((found[:, i, m] / scale)[untied], (expected / scale)[untied], rtol=0, atol=1e-9)
        for column, error in zip(columns, found[:, i, 0], strict=True):
            best = cluster(torch.from_numpy(column), 1 << width, method="optimal").error
            assert error >= best * (1 - 1e-9) - 1e-9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    target = np.ones((3, 20), dtype=np.float32)
    target[1, 4] = value
    with pytest.raises(ModelError, match="column 1 holds a value that is not finite"):
        native.quantize_columns(target, [4] * 3, [0] * 3, LayerSettings())
    with pytest.raises(ModelError, match="column 1 holds a value that is not finite"):
        native.profile_columns(target, [4], [0], 12)


def test_bad_arguments_are_named() -> None:
    target = np.zeros((2, 20), dtype=np.float32)
    for widths, reserve, options, message in (
        ([4, 5], [0, 0], {}, "width: element 1 is 5"),
        ([4, 4], [0, 20], {}, "reserve: element 1 is 20"),
        ([4, 4], [-1, 0], {}, "reserve: element 0 is -1"),
        ([4, 4], [0, 0], {"row_weight": np.full(20, -1.0)}, "row_weight: element 0"),
        ([4, 4], [0, 0], {"start": np.tile(np.arange(16.0)[::-1], (2, 1))}, "start: centroids of column 0"),
        ([4, 4], [0, 0], {"kernel": "abacus"}, "no kernel family is called 'abacus'"),
    ):
        with pytest.raises(ModelError, match=message):
            native.quantize_columns(target, widths, reserve, LayerSettings(), **options)
    with pytest.raises(ConfigError, match=r"feedback has shape \[3, 3\], expected \[2, 2\]"):
        native.quantize_columns(target, [4, 4], [0, 0], LayerSettings(), feedback=np.eye(3, dtype=np.float32))


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "python")
    assert not native.enabled()
    monkeypatch.setenv(native.SWITCH, "native")
    assert native.enabled()
    monkeypatch.setenv(native.SWITCH, "abacus")
    with pytest.raises(ConfigError, match="CLAQ_QUANTIZER must be auto, native or python"):
        native.enabled()

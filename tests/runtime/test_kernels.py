"""Every kernel family against the portable one bit for bit (int8) and against float64 (float32), on random layers."""

import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_layers import Layer, NativeError, NativeLayer, make_layer

import claq_runtime

FAMILIES = claq_runtime.kernels()
# Up to 48 rows (32 by tiles of AMX) panels are shallow on AVX-512, above them deep, and on Zen up to 48 or 16 there are none;
# chunks of rows of x have 256.
ROWS = st.one_of(st.integers(1, 40), st.sampled_from([48, 49, 130, 300]))
FAST = [name for name in FAMILIES if name != "portable"]
TUNINGS = ["plain", "gathers", "zen"]


@st.composite
def layers(draw, inputs: tuple[int, int] = (1, 600), outputs: tuple[int, int] = (1, 600)):
    in_features = draw(st.integers(*inputs))
    blocks = -(-in_features // 32) + draw(st.integers(0, 2))
    fours = draw(st.integers(0, blocks))
    threes = draw(st.integers(0, blocks - fours))
    widths = {4: 32 * fours, 3: 32 * threes, 2: 32 * (blocks - fours - threes)}
    return make_layer(
        draw(st.integers(*outputs)),
        in_features,
        widths,
        ordered=draw(st.booleans()),
        outliers=draw(st.sampled_from([0.0, 0.0, 0.003, 0.02, 0.3, 1.0])),
        full_row=draw(st.booleans()),
        bias=draw(st.booleans()),
        lowest=draw(st.sampled_from([-127, -128])),
        seed=draw(st.integers(0, 2**31)),
    )


def activations(rows: int, layer, seed: int) -> np.ndarray:
    """Normal values with a few large features, as transformers have them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, layer.attributes["in_features"]))
    x *= np.exp(rng.normal(size=x.shape[1]))
    return x.astype(np.float32)


def error_scale(layer, x: np.ndarray) -> np.ndarray:
    """The sum of the products' magnitudes: what rounding errors of a dot product are relative to."""
    return np.abs(x.astype(np.float64)) @ layer.magnitude.T + np.abs(layer.bias) + 1e-300


@pytest.mark.parametrize("family", FAST)
@settings(max_examples=60, deadline=None)
@given(layer=layers(), rows=ROWS, tuning=st.sampled_from(TUNINGS), seed=st.integers(0, 2**31))
def test_int8_is_the_portable_result_bit_for_bit(family, layer, rows, tuning, seed):
    x = activations(rows, layer, seed)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_array_equal(NativeLayer(layer, family, tuning).run(x, accuracy_level=4), expected)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", [name for name in FAST if name.startswith("avx512")])
@settings(max_examples=30, deadline=None)
@given(layer=layers(), rows=st.sampled_from([*range(1, 18), 23, 40, 48, 49]), seed=st.integers(0, 2**31))
def test_few_rows_tuned_for_another_cpu_are_the_portable_result_bit_for_bit(family, tuning, layer, rows, seed):
    x = activations(rows, layer, seed)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_array_equal(NativeLayer(layer, family, tuning).run(x, accuracy_level=4), expected)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", [name for name in FAST if name.startswith("avx512")])
@pytest.mark.parametrize("widths", [{4: 1600, 3: 0, 2: 1696}, {4: 800, 3: 1664, 2: 800}, {4: 0, 3: 0, 2: 3264}])
@pytest.mark.parametrize("outputs", [1, 33, 176])
def test_long_rows_tuned_for_another_cpu_are_the_portable_result_bit_for_bit(family, tuning, widths, outputs):
    # More blocks of a width than are summed in registers at once.
    layer = make_layer(outputs, 3250, widths, ordered=True, outliers=0.01, bias=True)
    for rows in (1, 4, 7, 16, 21):
        x = activations(rows, layer, rows)
        expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
        np.testing.assert_array_equal(NativeLayer(layer, family, tuning).run(x, accuracy_level=4), expected)


@pytest.mark.skipif("avx512amx" not in FAMILIES, reason="seven and eight rows are a case of their own on AMX alone")
@settings(max_examples=80, deadline=None)
@given(layer=layers(), rows=st.sampled_from([7, 8]), seed=st.integers(0, 2**31))
def test_rows_that_amx_streams_are_the_portable_result_bit_for_bit(layer, rows, seed):
    x = activations(rows, layer, seed)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4, threads=2)
    np.testing.assert_array_equal(NativeLayer(layer, "avx512amx").run(x, accuracy_level=4, threads=2), expected)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(layer=layers(), rows=ROWS, seed=st.integers(0, 2**31))
def test_float32_is_exact_to_rounding(family, layer, rows, seed):
    x = activations(rows, layer, seed)
    error = np.abs(NativeLayer(layer, family).run(x) - layer.reference(x)) / error_scale(layer, x)
    assert error.max() < 1e-6


def met_by_outliers(layer: Layer, features: list[int]) -> np.ndarray:
    """Which outputs have an outlier in a column of one of these input features."""
    met = np.zeros(len(layer.weight), bool)
    ptr = layer.tensors["outlier_ptr"]
    if len(ptr):
        outputs = np.repeat(np.arange(len(met)), np.diff(ptr))
        met[outputs[np.isin(layer.tensors["order"][layer.tensors["outlier_index"]], features)]] = True
    return met


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize(
    ("rows", "tuning"),
    [*((1, name) for name in TUNINGS), (3, ""), (8, ""), (8, "zen"), (16, ""), (20, ""), (20, "zen"), (35, "")],
)
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_nan_and_infinity_propagate_as_in_a_matmul(family, accuracy_level, rows, tuning, outliers):
    layer = make_layer(100, 96, {4: 32, 3: 32, 2: 32}, ordered=True, outliers=outliers, bias=True)
    x = activations(rows, layer, 1)
    x[0, 5] = np.inf
    if rows > 1:
        x[1, 7] = np.nan
        x[1, 9] = -np.inf
    y = NativeLayer(layer, family, tuning).run(x, accuracy_level)
    with np.errstate(invalid="ignore"):
        # A weight of 0 makes NaN of infinity; compare where products are the same whatever their rounding.
        expected = (x @ layer.weight.T.astype(np.float32)) + layer.bias.astype(np.float32)
    sure = (layer.weight != 0).all(1)
    y_sure, expected_sure = y[:, sure], expected[:, sure]
    np.testing.assert_array_equal(np.isfinite(y_sure), np.isfinite(expected_sure))
    # An outlier and its centroid meet the infinity apart, and if their signs differ the sum is NaN.
    alone = ~met_by_outliers(layer, [5, 7, 9])[sure]
    special = ~np.isfinite(expected_sure) & alone
    assert special.any()
    np.testing.assert_array_equal(y_sure[special], expected_sure[special])
    finite_rows = np.isfinite(x).all(1)
    assert np.isfinite(y[finite_rows]).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_tiny_and_zero_activations(family, accuracy_level):
    layer = make_layer(70, 64, {4: 32, 2: 32}, outliers=0.05)
    x = np.zeros((3, 64), np.float32)
    x[1] = 1e-40
    x[2, :32] = 1e-36
    y = NativeLayer(layer, family).run(x, accuracy_level)
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_allclose(y, layer.reference(x), rtol=1e-3, atol=1e-38)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_float16_equals_float32_rounded(family, accuracy_level):
    layer = make_layer(100, 96, {4: 32, 3: 32, 2: 32}, outliers=0.02, bias=True)
    x = activations(5, layer, 1).astype(np.float16)
    native = NativeLayer(layer, family)
    expected = native.run(x.astype(np.float32), accuracy_level).astype(np.float16)
    np.testing.assert_array_equal(native.run(x, accuracy_level), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_does_not_depend_on_the_other_rows(family):
    layer = make_layer(300, 288, {4: 96, 3: 96, 2: 96}, ordered=True, outliers=0.02)
    x = activations(70, layer, 1)
    native = NativeLayer(layer, family)
    together = native.run(x, accuracy_level=4, threads=3)
    alone = np.concatenate([native.run(row[None], accuracy_level=4) for row in x])
    np.testing.assert_array_equal(together, alone)


# So many weights that the columns of a row alone are summed in two or four parts, unless both sizes are among the least.
LARGE = layers(inputs=(320, 1600), outputs=(400, 2500))


@settings(max_examples=15, deadline=None)
@given(layer=LARGE, seed=st.integers(0, 2**31), special=st.sampled_from([None, None, np.inf, 1e-36]))
def test_a_row_alone_has_the_same_result_in_any_family_with_any_threads(layer, seed, special):
    x = activations(1, layer, seed)
    if special is not None:
        x[0, -1:] = special
        x[0, -64:-1] = 0  # its block is one that int8 arithmetic has no scale for
    scale = error_scale(layer, np.nan_to_num(x, posinf=1.0))
    for accuracy_level in (0, 4):
        results = {
            family: [NativeLayer(layer, family).run(x, accuracy_level, threads=threads) for threads in (1, 2, 5)]
            for family in FAMILIES
        }
        for family, found in results.items():
            for other in found[1:]:
                np.testing.assert_array_equal(other, found[0], err_msg=family)
            if accuracy_level == 4 and special is None:
                np.testing.assert_array_equal(found[0], results["portable"][0], err_msg=family)
            elif np.isfinite(x).all():
                # In another order the tiny value has larger ones in its block.
                int8 = accuracy_level == 4 and layer.tensors["order"].size > 0
                expected = results["portable"][0] if int8 else layer.reference(x)
                assert (np.abs(found[0] - expected) / scale).max() < 1e-6, family
            else:
                assert not np.isfinite(found[0][(layer.weight[:, -1] != 0)[None]]).any(), family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_a_row_alone_is_that_of_many_to_rounding(family, accuracy_level):
    layer = make_layer(700, 704, {4: 320, 3: 192, 2: 192}, ordered=True, outliers=0.01, bias=True)
    x = activations(3, layer, 1)
    native = NativeLayer(layer, family)
    alone = np.concatenate([native.run(row[None], accuracy_level, threads=2) for row in x])
    assert (np.abs(native.run(x, accuracy_level, threads=2) - alone) / error_scale(layer, x)).max() < 1e-6
    halves = x.astype(np.float16)
    single = np.concatenate([native.run(row[None], accuracy_level) for row in halves.astype(np.float32)])
    np.testing.assert_array_equal(
        np.concatenate([native.run(row[None], accuracy_level) for row in halves]), single.astype(np.float16)
    )


@pytest.mark.skipif(os.cpu_count() == 1, reason="nothing to share out among one thread")
def test_a_short_product_is_shared_out_unless_a_core_has_its_codes_cached():
    known = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], capture_output=True, text=True, check=False).stdout.strip()
    if known in ("", "0", "undefined"):
        pytest.skip("the system does not say how large the second-level cache is")
    cache = int(known)
    # 60 µs by what the family is taken to do: three times what a thread is woken for, half of it only one and a half times.
    native = NativeLayer(make_layer(320, 96, {4: 96}), "portable")
    other = NativeLayer(make_layer(2 * cache // 512, 1024, {4: 1024}))  # twice the cache
    x = np.ones((1, 96), np.float32)
    other.run(np.ones((1, 1024), np.float32))
    assert native.most_tasks(x) > 1
    assert native.most_tasks(x) == 1
    other.run(np.ones((1, 1024), np.float32))
    assert native.most_tasks(x) > 1


def test_many_rows_cross_chunk_borders():
    layer = make_layer(130, 64, {3: 64}, outliers=0.05, bias=True)
    x = activations(600, layer, 1)
    x[300, 3] = np.nan
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_allclose(NativeLayer(layer).run(x, accuracy_level=4, threads=2), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("rows", [33, 257])
def test_one_row_left_over_by_tiles_and_by_chunks(family, rows):
    """The last row has a tile, or a chunk, to itself, and its activations exist in transposed form only."""
    layer = make_layer(70, 64, {4: 64}, ordered=True, outliers=0.05)
    x = activations(rows, layer, 1)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_array_equal(NativeLayer(layer, family).run(x, accuracy_level=4), expected)


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 40])
def test_an_output_of_nothing_but_outliers_beside_outputs_of_few(family, rows):
    """More entries than kernels copy at a time, and neighbours that have a few."""
    layer = make_layer(45, 8_900, ordered=True, outliers=0.002, full_row=True, bias=True)
    x = activations(rows, layer, 1)
    native = NativeLayer(layer, family)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_array_equal(native.run(x, accuracy_level=4), expected)
    assert (np.abs(native.run(x) - layer.reference(x)) / error_scale(layer, x)).max() < 1e-6


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16])
def test_what_an_earlier_run_left_in_memory_is_not_read(family, rows):
    layer = make_layer(80, 704, {4: 320, 3: 192, 2: 192}, ordered=True, outliers=0.01)
    x = activations(rows, layer, 1)
    native = NativeLayer(layer, family)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    longer = NativeLayer(make_layer(80, 704, outliers=0.2), family)
    for _ in range(3):
        longer.run(np.full_like(x, np.nan), accuracy_level=4)
        np.testing.assert_array_equal(native.run(x, accuracy_level=4), expected)


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("rows", [4, 12, 20])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_threads_share_out_the_columns_of_a_few_rows(family, rows, outliers, dtype):
    """With one thread a row's int8 form is made at once, with more in parts; special values may be in any of them."""
    layer = make_layer(40, 12_010, {4: 6016, 3: 4000, 2: 2016}, outliers=outliers)
    x = activations(rows, layer, 1).astype(dtype)
    native = NativeLayer(layer, family)
    np.testing.assert_array_equal(native.run(x, accuracy_level=4, threads=4), native.run(x, accuracy_level=4))
    x[1, 5], x[2, 12_009] = np.inf, np.nan
    y, alone = native.run(x, accuracy_level=4, threads=4), native.run(x, accuracy_level=4)
    np.testing.assert_array_equal(y, alone)
    assert not np.isfinite(y[1:3]).any()
    assert np.isfinite(y[3:]).all()


def test_environment_chooses_the_family(monkeypatch):
    layer = make_layer(10, 32)
    assert NativeLayer(layer).kernel == FAMILIES[0]
    monkeypatch.setenv("CLAQ_KERNEL", "portable")
    assert NativeLayer(layer).kernel == "portable"
    monkeypatch.setenv("CLAQ_KERNEL", "sse1")
    with pytest.raises(NativeError, match="CLAQ_KERNEL: no kernel family is called 'sse1'; this CPU can run: "):
        NativeLayer(layer)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("special", [False, True])
def test_a_row_alone_is_the_same_however_it_is_shared_out(family, tuning, special):
    layer = make_layer(2050, 1600, {4: 800, 3: 416, 2: 384}, ordered=True, outliers=0.01, bias=True)
    x = activations(1, layer, 0)
    if special:
        x[0, 5] = np.inf
    native = NativeLayer(layer, family, tuning)
    assert native.most_tasks(x, accuracy_level=4) > 1
    alone = native.run(x, accuracy_level=4)
    for threads in (2, 4):
        np.testing.assert_array_equal(native.run(x, accuracy_level=4, threads=threads), alone)
    if not special:
        np.testing.assert_array_equal(alone, NativeLayer(layer, "portable").run(x, accuracy_level=4))
        np.testing.assert_array_equal(native.run(x, threads=2), native.run(x))


def test_an_unknown_tuning_is_named():
    with pytest.raises(NativeError, match="CLAQ_TUNING: is 'fast', expected plain, gathers or zen"):
        NativeLayer(make_layer(10, 32), tuning="fast")

"""Every kernel family against the portable one bit for bit (int8) and against float64 (float32), on random layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_layers import NativeError, NativeLayer, make_layer

import claq_runtime

FAMILIES = claq_runtime.kernels()
FAST = [name for name in FAMILIES if name != "portable"]


@st.composite
def layers(draw, largest: int = 600):
    in_features = draw(st.integers(1, largest))
    blocks = -(-in_features // 32) + draw(st.integers(0, 2))
    fours = draw(st.integers(0, blocks))
    threes = draw(st.integers(0, blocks - fours))
    widths = {4: 32 * fours, 3: 32 * threes, 2: 32 * (blocks - fours - threes)}
    return make_layer(
        draw(st.integers(1, largest)),
        in_features,
        widths,
        ordered=draw(st.booleans()),
        outliers=draw(st.sampled_from([0.0, 0.0, 0.003, 0.02, 0.3])),
        full_row=draw(st.booleans()),
        bias=draw(st.booleans()),
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
@given(layer=layers(), rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_int8_is_the_portable_result_bit_for_bit(family, layer, rows, seed):
    x = activations(rows, layer, seed)
    expected = NativeLayer(layer, "portable").run(x, accuracy_level=4)
    np.testing.assert_array_equal(NativeLayer(layer, family).run(x, accuracy_level=4), expected)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(layer=layers(), rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_float32_is_exact_to_rounding(family, layer, rows, seed):
    x = activations(rows, layer, seed)
    error = np.abs(NativeLayer(layer, family).run(x) - layer.reference(x)) / error_scale(layer, x)
    assert error.max() < 1e-6

"""The torch host of the C interface: results, dtypes, threads and errors on torch tensors."""

import numpy as np
import pytest
import torch
from runtime_layers import NAMES, make_layer

from claq_export.errors import FormatError
from claq_export.kernels import native


def host(layer, **changes) -> native.NativeLinear:
    tensors = [torch.from_numpy(changes.get(name, layer.tensors[name])) for name in NAMES]
    attributes = layer.attributes
    return native.NativeLinear(
        *tensors,
        columns=[attributes["columns_4"], attributes["columns_3"], attributes["columns_2"]],
        in_features=attributes["in_features"],
        out_features=attributes["out_features"],
    )


@pytest.fixture(scope="module")
def layer():
    return make_layer(700, 300, {4: 128, 3: 96, 2: 96}, ordered=True, outliers=0.01, bias=True)


def test_library_is_found():
    assert native.native_available() == (True, "")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_matches_dense_weights(layer, dtype, tolerance):
    x = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = host(layer)(x)
    assert y.dtype == dtype
    assert y.shape == (2, 5, 700)
    reference = layer.reference(x.double().numpy())
    assert np.abs(y.double().numpy() - reference).max() < tolerance * np.abs(reference).max()


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_threads_do_not_change_the_result(layer, rows, accuracy_level):
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    linear = host(layer)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x, accuracy_level)
        torch.set_num_threads(3)
        three = linear(x, accuracy_level)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, three, rtol=0, atol=0)


def test_strided_input(layer):
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    linear = host(layer)
    torch.testing.assert_close(linear(x.T), linear(x.T.contiguous()), rtol=0, atol=0)


def test_no_rows(layer):
    assert host(layer)(torch.zeros(0, 300)).shape == (0, 700)


def test_bad_layer_is_refused(layer):
    with pytest.raises(FormatError, match=r"codes: shape is \[\d+, 699\], expected \[\d+, 700\]"):
        host(layer, codes=layer.tensors["codes"][:, :699])


def test_bad_activations_are_refused(layer):
    linear = host(layer)
    with pytest.raises(ValueError, match="expected the last dimension to be 300"):
        linear(torch.zeros(1, 299))
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
        linear(torch.zeros(1, 300, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="accuracy_level: is 2, expected 0, 1 or 4"):
        linear(torch.zeros(1, 300), accuracy_level=2)

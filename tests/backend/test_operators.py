"""The operators of compiled graphs: opcheck, gradients, and every kind of weight they may meet."""

from __future__ import annotations

import pytest
import torch
from quantized_layers import dense_weight, random_layer

from claq_export.backend.operators import embedding_of, linear_of
from claq_export.backend.store import STORES, Stack, WeightStore
from claq_export.format.rows import slice_rows
from claq_export.kernels import use_backend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = sorted(TOLERANCE, key=str)


def stacked(key: str, dtype: torch.dtype, transposed: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two parameters quantized as one layer, and the dense weight of both."""
    layer = random_layer(40, 24, (4, 2), outliers=0.05)
    shapes = [(16, 40), (8, 40)]
    weights = [torch.nn.Parameter(torch.zeros(s[::-1] if transposed else s, dtype=dtype), False) for s in shapes]
    STORES.setdefault(key, WeightStore(key)).add(weights, Stack("ab", layer, (16, 8), transposed, 0))
    return weights, dense_weight(layer)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
def test_opcheck(dtype: torch.dtype, quantized: bool) -> None:
    weights, _ = stacked("opcheck", dtype)
    if not quantized:
        weights = [torch.nn.Parameter(torch.randn(n, 40).to(dtype), False) for n in (16, 8)]
    biases = [torch.randn(16).to(dtype), None]
    for leading in ((), (0,), (2, 3)):
        torch.library.opcheck(linear_of, (torch.randn(*leading, 40).to(dtype), weights, biases, False, "opcheck"))
    torch.library.opcheck(embedding_of, (torch.tensor([[3, 0], [15, 3]]), weights[0], "opcheck"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_products_and_rows(dtype: torch.dtype, backend: str) -> None:
    key = f"products {dtype} {backend}"
    weights, dense = stacked(key, dtype)
    x, bias = torch.randn(5, 40).to(dtype), torch.randn(8).to(dtype)
    whole = x.double() @ dense.T
    whole[:, 16:] += bias.double()
    with use_backend(backend):
        close(linear_of(x, weights, [None, bias], False, key), whole, dtype)
        close(linear_of(x, weights[1:], [bias], False, key), whole[:, 16:], dtype)
        close(linear_of(x, weights[::-1], [bias, None], False, key), whole.roll(8, 1), dtype)
        close(embedding_of(torch.tensor([1, 7]), weights[1], key), dense[16:][[1, 7]], dtype)


def test_a_shared_weight_is_prepared_once_for_each_way_it_is_used() -> None:
    weights, _ = stacked("shared", torch.float32)
    bias, store = torch.randn(16), STORES["shared"]
    ways = [(weights[:1], [bias]), (weights[:1], [None]), (weights[:1], []), (weights, [bias, None]), (weights, [])]
    first = [store.product(some, biases, False) for some, biases in ways]
    assert all(store.product(some, biases, False) is run for (some, biases), run in zip(ways, first, strict=True))
    assert len(set(map(id, first))) == len(ways)


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
def test_autocast_is_that_of_linear(lower: torch.dtype, quantized: bool) -> None:
    key = f"autocast {lower} {quantized}"
    weights, dense = stacked(key, torch.float32)
    if not quantized:
        weights = [torch.nn.Parameter(torch.randn(n, 40), False) for n in (16, 8)]
        dense = torch.cat(weights).double()
    bias = torch.randn(16)
    for x in (torch.randn(5, 40), torch.randn(5, 40).to(lower)):
        wanted = x.to(lower).double() @ dense.T
        wanted[:, :16] += bias.double()
        with torch.autocast("cpu", lower):
            got = linear_of(x, weights, [bias, None], False, key)
            assert torch.nn.functional.linear(x, weights[0]).dtype == got.dtype
            with torch.autocast("cpu", enabled=False):
                assert linear_of(x.float(), weights, [bias, None], False, key).dtype == torch.float32
        close(got, wanted, lower)


def test_an_index_below_zero_is_refused_as_by_a_table() -> None:
    weights, _ = stacked("negative", torch.float32)
    for weight in (weights[0], torch.nn.Parameter(torch.randn(16, 40), False)):
        for index in (-1, -100, 16):
            with pytest.raises(IndexError, match=r"out of range|expected -16"):
                embedding_of(torch.tensor([[0, index]]), weight, "negative")
        assert embedding_of(torch.zeros(0, 2, dtype=torch.int64), weight, "negative").shape == (0, 2, 40)


def test_transposed_parameters() -> None:
    weights, dense = stacked("transposed", torch.float32, transposed=True)
    x = torch.randn(5, 40)
    close(linear_of(x, weights, [None, None], True, "transposed"), x.double() @ dense.T, torch.float32)
    plain = torch.nn.Parameter(torch.randn(40, 6), False)
    close(linear_of(x, [plain], [None], True, "transposed"), (x @ plain).double(), torch.float32)


def test_a_part_that_is_not_quantized() -> None:
    weights, dense = stacked("mixed", torch.float32)
    other = torch.nn.Parameter(torch.randn(4, 40), False)
    x = torch.randn(5, 40)
    got = linear_of(x, [weights[1], other], [None, None], False, "mixed")
    close(got, torch.cat([x.double() @ dense[16:].T, (x @ other.T).double()], 1), torch.float32)


def test_a_changed_parameter_counts_as_unknown() -> None:
    weights, _ = stacked("changed", torch.float32)
    weights[0].add_(1)
    assert STORES["changed"].find(weights[0]) is None
    entry = STORES["changed"].find(weights[1])
    assert entry is not None
    assert entry.stack is not None
    assert torch.equal(entry.layer.codes, slice_rows(entry.stack.layer, 16, 24).codes)


def test_gradients_are_refused() -> None:
    weights, _ = stacked("gradients", torch.float32)
    y = linear_of(torch.randn(2, 40, requires_grad=True), weights, [None, None], False, "gradients")
    with pytest.raises(RuntimeError, match="is for inference and has no gradient"):
        y.sum().backward()

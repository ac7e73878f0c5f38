"""claq::embedding against weights read one by one from the format, under every way PyTorch calls an operator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_layers import arguments, dense_weight, layers, random_layer

from claq_export.errors import FormatError
from claq_export.format.layer import QuantizedLinear
from claq_export.format.rows import take_rows
from claq_export.kernels import cpu, embedding, linear, use_backend
from claq_export.kernels.native import native_available
from claq_export.modules.layers import ClaqEmbedding

NATIVE = native_available()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def lookup(layer: QuantizedLinear, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """Arguments of ``claq::embedding``."""
    return (
        indices,
        *layer.tensors().values(),
        torch.zeros(0, dtype=dtype),
        layer.in_features,
        layer.out_features,
        list(layer.columns),
    )


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    layer=layers(),
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (40, 4)]),
    index=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 16),
)
def test_any_table(
    name: str, layer: QuantizedLinear, shape: tuple[int, ...], index: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    N = layer.out_features
    indices = torch.randint(-N, N, shape, generator=torch.Generator().manual_seed(seed)).to(index)
    with use_backend(name):
        rows = embedding(*lookup(layer, indices, dtype))
    assert rows.dtype == dtype
    assert rows.shape == (*shape, layer.in_features)
    # Both kernels round where dequantize() does, so they agree bit for bit; that is right by the weights one by one.
    dense = layer.dequantize()
    assert torch.equal(rows, dense.to(dtype)[indices.long()])
    exact = dense_weight(layer)
    assert (dense.double() - exact).abs().max() <= 1e-6 * exact.abs().max().clamp(min=1e-30)


def test_a_row_gathered_is_a_layer_of_its_own() -> None:
    layer = random_layer(45, 30, (4, 3, 2), outliers=0.1, full_row=True)
    rows = torch.tensor([29, 3, 3, 0])
    part = take_rows(layer, rows)
    part.validate()
    assert torch.equal(part.dequantize(), layer.dequantize()[rows])
    empty = dataclasses.replace(random_layer(45, 30, (4,)))
    assert take_rows(empty, rows).outlier_ptr.numel() == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_on_threads(name: str, threads: int) -> None:
    layer = random_layer(200, 501, (4, 2), outliers=0.02)
    indices = torch.randint(0, 501, (2000,), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with use_backend(name):
            rows = embedding(*lookup(layer, indices))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rows, layer.dequantize()[indices])


@pytest.mark.parametrize("name", BACKENDS)
def test_indices_that_are_not_contiguous(name: str) -> None:
    layer = random_layer(48, 16, (3, 2), outliers=0.1)
    indices = torch.arange(12).reshape(3, 4).T
    with use_backend(name):
        assert torch.equal(embedding(*lookup(layer, indices)), layer.dequantize()[indices])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("wrong", [24, -25])
def test_an_index_out_of_range_is_named(name: str, wrong: int) -> None:
    layer = random_layer(40, 24, (4,))
    with use_backend(name), pytest.raises(IndexError, match=f"element 2 (of indices )?is {wrong}, expected -24 to 23"):
        embedding(*lookup(layer, torch.tensor([0, 23, wrong])))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_opcheck(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = random_layer(40, 24, (4, 2), outliers=0.05)
    with use_backend(name):
        torch.library.opcheck(embedding, lookup(layer, torch.zeros(shape, dtype=torch.int64), dtype))


class TiedModel(torch.nn.Module):
    """Rows of a table, and products with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = random_layer(40, 24, (4, 3), outliers=0.05)
        for name, tensor in self.table.tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parts = [getattr(self, name) for name in self.table.tensors()]
        none = torch.zeros(0)
        x = embedding(ids, *parts, none, 40, 24, list(self.table.columns))
        return linear(torch.relu(x), *parts, none, 40, 24, list(self.table.columns), 0)


def test_export_keeps_one_node_a_use_and_dynamic_axes() -> None:
    model = TiedModel()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.zeros(2, 3, dtype=torch.int64),), dynamic_shapes=(dynamic,))
    assert sum(node.target is embedding for node in program.graph.nodes) == 1
    for shape in ((1, 1), (5, 2), (2, 9)):
        ids = torch.randint(0, 24, shape)
        torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(compiler: str) -> None:
    torch._dynamo.reset()
    model = TiedModel()
    compiled = torch.compile(model, fullgraph=True, backend=compiler, dynamic=True)
    with torch.no_grad():
        for rows in (1, 4, 6):
            ids = torch.randint(0, 24, (rows, 2))
            torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_module_refuses_indices_below_zero(name: str, dtype: torch.dtype) -> None:
    """As ``nn.Embedding`` does; the operator, as ONNX's Gather, counts them from the end."""
    torch._dynamo.reset()
    module = ClaqEmbedding(random_layer(40, 24, (4,)))
    right, dense = torch.tensor([[0, 23]], dtype=dtype), module.layer.dequantize()
    with use_backend(name), torch.no_grad():
        for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            assert torch.equal(run(right), dense[right.long()])
            for wrong in (-1, -100, -24):
                with pytest.raises(IndexError, match="expected -24 to 23"):
                    run(torch.tensor([[0, wrong]], dtype=dtype))


def test_gradients_are_refused_at_backward_only() -> None:
    layer = random_layer(8, 4)
    call = list(lookup(layer, torch.tensor([1])))
    call[9] = torch.zeros(0, requires_grad=True)
    rows = embedding(*call)
    with pytest.raises(RuntimeError, match=r"claq::embedding\) are for inference"):
        rows.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_arguments(name: str) -> None:
    layer = random_layer(8, 4)
    with use_backend(name):
        with pytest.raises(RuntimeError, match=r"indices must be int32 or int64, got torch.float32"):
            embedding(*lookup(layer, torch.zeros(2)))
        call = list(lookup(layer, torch.tensor([1])))
        call[9] = torch.zeros(3)
        with pytest.raises(RuntimeError, match=r"like must be of length zero .* got torch.float32 of length 3"):
            embedding(*call)
        call[9] = torch.zeros(0, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"got torch.float64 of length 0"):
            embedding(*call)


@pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
def test_a_table_and_its_head_are_prepared_once_each() -> None:
    layer = random_layer(64, 24)
    tensors = tuple(layer.tensors().values())
    bias = torch.randn(24)
    x = torch.randn(1, 64)
    prepared = []
    for _ in range(2):
        embedding(torch.tensor([3]), *tensors, torch.zeros(0), 64, 24, list(layer.columns))
        linear(*arguments(layer, x)[:-5], bias, 64, 24, list(layer.columns), 0)
        prepared.append((cpu._tables[layer.codes][1], cpu._layers[layer.codes][1]))
    assert prepared[0] == prepared[1]


@pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
def test_a_broken_table_is_refused_by_name() -> None:
    layer = random_layer(64, 8)
    layer.row_scale[3] = float("inf")
    with pytest.raises(FormatError, match="row_scale"):
        embedding(*lookup(layer, torch.tensor([0])))

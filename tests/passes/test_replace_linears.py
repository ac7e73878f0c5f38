"""Quantized layers in the place of linears: numbers, names of buffers, memory, and export of what comes out."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from claq_export.format.layer import TENSOR_NAMES
from claq_export.passes import ContractError, PassContext, Pipeline, RemoveUnused, ReplaceLinears

D = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D, bias=False)
        self.inner = nn.ModuleDict({"up": Conv1D(2 * D, D), "down": nn.Linear(2 * D, D, bias=False)})
        self.bare = nn.Parameter(torch.randn(D, D) / 8)
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        x = self.norm(self.q(x) * self.k(x))
        x = x + self.inner["down"](torch.relu(self.inner["up"](x)))
        return x @ self.bare


def quantized(helpers, model, *inputs, accuracy_level=0, **options):
    planned = helpers.plan(model, *inputs, **options)
    gm = planned.graph_module
    layers = {site.name: helpers.quantize(site.weight(gm)) for site in planned.plan}
    records = Pipeline([ReplaceLinears(layers, accuracy_level), RemoveUnused()]).run(gm, planned.context)
    assert records[0].modified
    return planned, layers


def dequantized_twin(model, planned, layers):
    """The same module with the dequantized weights in its own linears: the oracle."""
    state = dict(model.state_dict())
    for site in planned.plan:
        start = 0
        for part, rows in site.parts:
            weight = layers[site.name].dequantize()[start : start + rows]
            start += rows
            key = f"{part}.weight" if f"{part}.weight" in state else part
            state[key] = weight.T.contiguous() if site.transposed else weight
    twin = type(model)()
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("fuse", [False, True])
def test_numbers_are_those_of_the_dequantized_weights(helpers, fuse):
    model = Block()
    planned, layers = quantized(helpers, model, torch.randn(2, 5, D), fuse_siblings=fuse)
    assert len(layers) == (4 if fuse else 5)
    helpers.same(planned.captured, dequantized_twin(model, planned, layers), (1, 1, D), (4, 3, D), atol=1e-4)


def test_node_arguments_and_buffer_names(helpers):
    planned, layers = quantized(helpers, Block(), torch.randn(2, 5, D), accuracy_level=4, fuse_siblings=False)
    gm = planned.graph_module
    calls = [node for node in gm.graph.nodes if node.target is torch.ops.claq.linear.default]
    assert calls == [node for site in planned.plan for node in site.nodes]
    by_name = {site.name: site.node for site in planned.plan}
    for name, layer in layers.items():
        prefix = by_name[name].args[1].target.removesuffix(".codes")
        assert [argument.target for argument in by_name[name].args[1:9]] == [
            f"{prefix}.{part}" for part in TENSOR_NAMES
        ]
        assert by_name[name].args[10:] == (layer.in_features, layer.out_features, list(layer.columns), 4)
        for part, tensor in layer.tensors().items():
            assert torch.equal(gm.get_buffer(f"{prefix}.{part}"), tensor)
    assert by_name["q"].args[9].target == "q.bias"
    assert by_name["k"].args[9].target == by_name["bare"].args[9].target == "claq_no_bias_float32"
    assert gm.get_buffer("claq_no_bias_float32").shape == (0,)
    assert set(gm.state_dict()) == {
        *(f"{name}.{part}" for name in layers for part in TENSOR_NAMES),
        *("q.bias", "inner.up.bias", "norm.weight", "norm.bias", "claq_no_bias_float32"),
    }


def test_no_weight_stays_behind(helpers):
    model = Block()
    weights = [weakref.ref(model.q.weight), weakref.ref(model.inner["up"].weight), weakref.ref(model.bare)]
    before = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    planned, _ = quantized(helpers, model, torch.randn(2, 5, D))
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None, None, None]
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in planned.graph_module.state_dict().values()}
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) < 0.35 * before


def test_export_again_with_dynamic_axes(helpers):
    planned, _ = quantized(helpers, Block(), torch.randn(2, 5, D))
    captured = planned.captured
    again = torch.export.export(
        captured.graph_module, (), kwargs=captured.example_inputs, dynamic_shapes=captured.export_shapes
    ).module()
    for size in [(1, 1, D), (6, 9, D)]:
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(again(x=x), captured.run({"x": x})[0], rtol=0, atol=1e-5)


def test_shared_weight_becomes_one_layer_with_each_call_its_bias(helpers):
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))
            self.first = nn.Parameter(torch.randn(D))
            self.second = nn.Parameter(torch.randn(D))

        def forward(self, x):
            return F.linear(torch.relu(F.linear(x, self.weight, self.first)), self.weight, self.second)

    model = Shares()
    planned, layers = quantized(helpers, model, torch.randn(2, D))
    (site,) = planned.plan
    assert site.name == site.weight_name == "weight"
    first, second = site.nodes
    assert first.args[1] is second.args[1]
    assert (first.args[9].target, second.args[9].target) == ("first", "second")
    twin = Shares()
    twin.load_state_dict({**model.state_dict(), "weight": layers[site.name].dequantize()})
    helpers.same(planned.captured, twin, (3, D), atol=1e-3)


def test_weight_that_something_else_reads_stays(helpers):
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, 96, bias=False)

        def forward(self, x):
            return self.head(x) * self.head.weight.abs().mean()

    model = Reads()
    planned, layers = quantized(helpers, model, torch.randn(2, 3, D))
    gm = planned.graph_module
    assert torch.equal(gm.get_parameter("head.weight"), model.head.weight)
    assert gm.get_buffer("head.codes").dtype == torch.uint32
    x = torch.randn(1, 2, D)
    expected = F.linear(x, layers["head"].dequantize()) * model.head.weight.abs().mean()
    torch.testing.assert_close(planned.captured.run({"x": x})[0], expected.detach(), rtol=0, atol=1e-3)


def test_bare_parameter_that_stays_makes_room(helpers):
    """Buffers of ``bare`` would stand under a parameter's name while something else still reads it."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = nn.Parameter(torch.randn(96, D))

        def forward(self, x):
            return F.linear(x * self.bare[0], self.bare)

    planned, layers = quantized(helpers, Bare(), torch.randn(2, 3, D), include=["bare"])
    assert list(layers) == ["bare"]
    assert "bare_claq.codes" in planned.graph_module.state_dict()
    assert planned.captured.run({"x": torch.randn(1, 2, D)})[0].shape == (1, 2, 96)


def test_float16(helpers):
    planned, _ = quantized(helpers, Block().half(), torch.randn(2, 5, D).half())
    assert planned.captured.run({"x": torch.randn(1, 2, D).half()})[0].dtype == torch.float16
    assert planned.graph_module.get_buffer("claq_no_bias_float16").dtype == torch.float16


def test_sites_without_a_layer_stay(helpers):
    model = Block()
    planned = helpers.plan(model, torch.randn(2, 5, D), fuse_siblings=False)
    gm = planned.graph_module
    layer = helpers.quantize(planned.plan.site("q").weight(gm))
    record = ReplaceLinears({"q": layer})(gm, planned.context)
    assert record.modified
    assert "k has no quantized layer and stays as it is" in record.notes
    assert len(helpers.linears(gm)) == 4
    assert planned.captured.run({"x": torch.randn(1, 2, D)})[0].shape == (1, 2, D)


def test_layers_that_do_not_fit(helpers):
    planned = helpers.plan(Block(), torch.randn(2, 5, D), fuse_siblings=False)
    gm = planned.graph_module
    with pytest.raises(ContractError, match="layer 'nobody' is no site of the plan"):
        ReplaceLinears({"nobody": helpers.quantize(torch.randn(D, D))})(gm, planned.context)
    with pytest.raises(ContractError, match=r"layer q is \[32, 64\], the site is \[64, 64\]"):
        ReplaceLinears({"q": helpers.quantize(torch.randn(32, D))})(gm, planned.context)
    with pytest.raises(ContractError, match="there is no plan"):
        ReplaceLinears({})(gm, PassContext())


class Tied(nn.Module):
    """A table whose rows are looked up twice and which is multiplied by, and one that is looked up only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, D)
        self.other = nn.Embedding(45, D)
        self.head = nn.Linear(D, 97)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) * self.embed(ids.flip(0)) + self.other(ids % 45)
        return self.head(torch.relu(x))


def test_tables_and_a_tied_head(helpers):
    model = Tied().eval()
    planned, layers = quantized(helpers, model, torch.randint(0, 97, (2, 5)), task="text-generation")
    gm = planned.graph_module
    tied, other = planned.plan.sites
    assert (len(tied.nodes), len(tied.lookups), tied.role, len(other.lookups)) == (1, 2, "head", 1)
    assert [node.target for node in (*tied.lookups, *other.lookups)] == [torch.ops.claq.embedding.default] * 3
    # The three uses read the very same buffers, and no dense table is left.
    assert {node.args[1:9] for node in tied.lookups} == {tied.node.args[1:9]}
    assert [name for name, _ in gm.named_parameters()] == ["head.bias"]
    with torch.no_grad():
        model.embed.weight.copy_(layers[tied.name].dequantize())
        model.other.weight.copy_(layers[other.name].dequantize())
    for shape in ((1, 1), (3, 7)):
        ids = torch.randint(0, 97, shape)
        torch.testing.assert_close(planned.captured.run({"ids": ids})[0], model(ids), rtol=1e-5, atol=1e-5)
    again = torch.export.export(
        gm, (), {"ids": torch.zeros(2, 3, dtype=torch.int64)}, dynamic_shapes={"ids": {0: torch.export.Dim.DYNAMIC}}
    )
    assert sum(node.target is torch.ops.claq.embedding.default for node in again.graph.nodes) == 3

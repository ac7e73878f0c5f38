"""ClaqLinear as a module, and checkpoints loaded back into PyTorch models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from quantized_layers import random_layer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from claq_export.errors import ConfigError, ModelError
from claq_export.format.checkpoint import Checkpoint, save_checkpoint
from claq_export.format.layer import TENSOR_NAMES, QuantizedLinear
from claq_export.modules import (
    ClaqEmbedding,
    ClaqLinear,
    dense_embedding,
    linear_kind,
    load,
    replace_linears,
    restore,
)
from claq_export.modules.weight import DenseWeight


class Attention(nn.Module):
    """Query and key of one input, a module that is no plain linear, a raw weight, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.query = nn.Linear(32, 16)
        self.key = nn.Linear(32, 8, bias=False)
        self.mixer = nn.MultiheadAttention(32, 2, batch_first=True)
        self.raw = nn.Parameter(torch.randn(32, 32))
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.mixer(x, x, x, need_weights=False)[0] @ self.raw
        return torch.cat([self.query(x), self.key(x), self.head(x)], -1)


def quantized(model: nn.Module) -> Checkpoint:
    """Query and key quantized stacked, the mixer's projections, and the raw weight, which is stored as [K, N]."""
    return Checkpoint(
        layers={
            "query+key": random_layer(32, 24, (4, 2), outliers=0.05, seed=1),
            "mixer.out_proj": random_layer(32, 32, (3,), seed=2),
            "mixer.in_proj_weight": random_layer(32, 96, (4,), seed=3),
            "raw": random_layer(32, 32, (4, 3), seed=4),
        },
        tensors=model.state_dict(),
        config={"bits": 3},
        parts={"query+key": [("query", 16), ("key", 8)]},
        accuracy_levels={"query+key": 4},
        transposed=["raw"],
    )


def dense_equivalent(model: Attention, checkpoint: Checkpoint) -> Attention:
    """The same model with dequantized weights in plain modules."""
    dense = copy.deepcopy(model)
    stacked = checkpoint.layers["query+key"].dequantize()
    with torch.no_grad():
        dense.query.weight.copy_(stacked[:16])
        dense.key.weight.copy_(stacked[16:])
        dense.mixer.out_proj.weight.copy_(checkpoint.layers["mixer.out_proj"].dequantize())
        dense.mixer.in_proj_weight.copy_(checkpoint.layers["mixer.in_proj_weight"].dequantize())
        dense.raw.copy_(checkpoint.layers["raw"].dequantize().T)
    return dense


def test_a_checkpoint_goes_back_into_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    checkpoint = quantized(model)
    save_checkpoint(
        tmp_path,
        checkpoint.layers,
        checkpoint.tensors,
        checkpoint.config,
        parts=checkpoint.parts,
        accuracy_level=0,
        transposed=checkpoint.transposed,
    )
    torch.manual_seed(1)
    loaded = load(tmp_path, Attention().eval())
    assert type(loaded.query) is ClaqLinear
    assert type(loaded.key) is ClaqLinear
    assert type(loaded.mixer.out_proj) is not ClaqLinear
    assert loaded.head.weight is loaded.embed.weight
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), dense_equivalent(model, checkpoint)(tokens), rtol=1e-4, atol=1e-4)


def test_accuracy_levels_reach_the_modules() -> None:
    model = Attention()
    restore(model, quantized(model))
    assert model.query.accuracy_level == 4


def test_transformers_conv1d() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = random_layer(12, 12, (4,))
    model = nn.Sequential(Conv1D(12, 12))
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(12.0))
    replace_linears(model, {"0": layer})
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), x @ layer.dequantize().T + torch.arange(12.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"nothing": random_layer(32, 8)}, "the model has no linear layer 'nothing', which layer 'nothing' stands for"),
        ({"key": random_layer(32, 9)}, r"the weight of 'key' has shape \[8, 32\], layer 'key' is for \[9, 32\]"),
        ({"mixer": random_layer(32, 8)}, "the model has no linear layer 'mixer'"),
    ],
)
def test_layers_of_another_model(layers: dict[str, QuantizedLinear], message: str) -> None:
    model = Attention()
    with pytest.raises(ModelError, match=message):
        replace_linears(model, {"query": random_layer(32, 16), **layers})
    assert type(model.query) is nn.Linear


def test_a_tensor_that_is_missing() -> None:
    model = Attention()
    whole = quantized(model)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != "query.bias"}
    partial = Checkpoint(whole.layers, tensors, parts=whole.parts, transposed=whole.transposed)
    with pytest.raises(
        ModelError, match=r"the checkpoint has no tensor 'query\.bias', which the model has \(1 in all\)"
    ):
        restore(model, partial)
    assert type(model.query) is nn.Linear
    bias = model.query.bias.detach().clone()
    restore(model, partial, strict=False)
    assert torch.equal(model.query.bias, bias)


def test_one_name_of_a_tied_tensor_is_enough() -> None:
    model = Attention()
    whole = quantized(model)
    tensors = {name: tensor + 1 for name, tensor in whole.tensors.items() if name != "head.weight"}
    restore(model, Checkpoint(whole.layers, tensors, parts=whole.parts, transposed=whole.transposed))
    assert torch.equal(model.head.weight, tensors["embed.weight"])


def test_a_tensor_of_another_size() -> None:
    model = Attention()
    whole = quantized(model)
    tensors = {**whole.tensors, "query.bias": torch.zeros(3)}
    with pytest.raises(ModelError, match=r"tensor 'query\.bias' has shape \[16\] in the model, \[3\] here"):
        restore(model, Checkpoint(whole.layers, tensors, parts=whole.parts, transposed=whole.transposed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_model_keeps_the_format(dtype: torch.dtype) -> None:
    layer = random_layer(40, 12, (4, 2), outliers=0.1)
    module = ClaqLinear(layer, torch.randn(12)).to(dtype).to(torch.float16)
    assert module.bias.dtype == torch.float16
    module.layer.validate()
    for name in TENSOR_NAMES:
        assert torch.equal(getattr(module, name), getattr(layer, name)), name
    assert module(torch.randn(2, 40).half()).dtype == torch.float16


def test_state_dict_round_trip_of_a_module() -> None:
    first = ClaqLinear(random_layer(40, 12, (4,), seed=1), torch.randn(12))
    second = ClaqLinear(random_layer(40, 12, (4,), seed=2), torch.zeros(12))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 40)
    torch.testing.assert_close(second(x), first(x))
    assert set(first.state_dict()) == {*TENSOR_NAMES, "bias"}
    assert "bias" not in ClaqLinear(random_layer(8, 4)).state_dict()


def test_repr_tells_sizes_and_widths() -> None:
    module = ClaqLinear(random_layer(40, 12, (4,)), torch.zeros(12))
    assert repr(module) == "ClaqLinear(in_features=40, out_features=12, bias=True, 64 columns of 4 bits)"


def test_bias_of_another_size() -> None:
    with pytest.raises(ModelError, match=r"bias must have shape \[12\], got \[3\]"):
        ClaqLinear(random_layer(40, 12), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_weight_is_decoded_when_it_is_computed_with(dtype: torch.dtype) -> None:
    layer = random_layer(32, 8, outliers=0.1)
    weight = ClaqLinear(layer, torch.zeros(8)).to(dtype).weight
    assert (weight.shape, weight.dtype, weight.device) == ((8, 32), dtype, layer.codes.device)
    assert isinstance(weight, torch.Tensor)
    x = torch.randn(3, 32, dtype=dtype)
    dense = layer.dequantize(torch.float32).to(dtype)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, dense))
    assert torch.equal(weight[2:4].t().float() + 1, dense[2:4].t().float() + 1)
    assert torch.equal(weight.cpu(), dense)
    assert "8 x 32" in repr(weight)


def test_the_weight_cannot_be_written_to() -> None:
    module = ClaqLinear(random_layer(32, 8), torch.zeros(8))
    with pytest.raises(ModelError, match="would write to the weight of a quantized layer"), torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(ModelError, match="would write to the weight of a quantized layer"), torch.no_grad():
        torch.add(torch.ones(8, 32), 1, out=module.weight)


class HandTied(torch.nn.Module):
    """A head that multiplies by the table of its embedding, without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 32)
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.linear(self.embedding(tokens).to(self.linear.weight.dtype))
        return torch.nn.functional.linear(h, self.embedding.weight)


def quantized_by_hand(model: torch.nn.Module, names: Sequence[str]) -> torch.nn.Module:
    layers = {}
    for name in names:
        weight = model.get_submodule(name).weight
        layers[name] = random_layer(weight.shape[1], weight.shape[0], seed=len(layers))
    return replace_linears(model, layers)


@pytest.mark.parametrize("how", ["eager", "compiled", "exported"])
def test_a_head_tied_by_hand_uses_the_quantized_table(how: str) -> None:
    model = quantized_by_hand(HandTied().eval(), ["embedding", "linear"])
    tokens = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        hidden = model.linear(model.embedding(tokens))
        expected = hidden @ model.embedding.layer.dequantize(torch.float32).T
        if how == "compiled":
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens)
        elif how == "exported":
            found = torch.export.export(model, (tokens,)).module()(tokens)
        else:
            found = model(tokens)
    torch.testing.assert_close(found, expected)


def test_a_graph_drops_a_weight_of_which_only_the_dtype_was_asked() -> None:
    class Asks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.to(self.linear.weight.dtype))

    graph = torch.export.export(quantized_by_hand(Asks().eval(), ["linear"]), (torch.randn(2, 32),)).graph
    graph.eliminate_dead_code()
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "claq.linear.default" in called
    assert "claq.embedding.default" not in called


def test_torchs_encoder_layers_use_the_quantized_weights() -> None:
    """In evaluation mode their fast path takes the weights of all their linears at once."""
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    quantized_by_hand(encoder, ["linear1", "linear2"])
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        found = encoder(x)
        encoder.linear1, encoder.linear2 = (dense_linear(module) for module in (encoder.linear1, encoder.linear2))
        expected = encoder(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def dense_linear(module: torch.nn.Module) -> torch.nn.Linear:
    linear = torch.nn.Linear(module.in_features, module.out_features)
    linear.weight.data, linear.bias.data = module.layer.dequantize(torch.float32), module.bias
    return linear


def test_hooks_go_along_and_handles_still_remove_them() -> None:
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    seen: list[str] = []
    before = model[0].register_forward_pre_hook(lambda _module, args: seen.append("before"))
    after = model[0].register_forward_hook(lambda _module, args, output: output + 1)
    quantized_by_hand(model, ["0"])
    x = torch.randn(2, 32)
    plain = ClaqLinear(model[0].layer, model[0].bias)(x)
    torch.testing.assert_close(model(x), plain + 1)
    assert seen == ["before"]
    before.remove()
    after.remove()
    torch.testing.assert_close(model(x), plain)
    assert seen == ["before"]


def test_a_weight_that_is_a_buffer() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mixing", torch.randn(8, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.mixing)

    layer = random_layer(32, 8)
    model = replace_linears(Frozen(), {"mixing": layer})
    assert torch.equal(model.mixing, layer.dequantize(torch.float32))


def test_layers_go_where_the_weights_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors stand for a GPU's; calibration leaves its layers in the host's memory."""
    moved: list[torch.device] = []

    def to(layer: QuantizedLinear, device: torch.device) -> QuantizedLinear:
        moved.append(device)
        return dataclasses.replace(layer, **{name: value.to("meta") for name, value in layer.tensors().items()})

    monkeypatch.setattr(QuantizedLinear, "to", to)
    with FakeTensorMode():
        embed = nn.Embedding(20, 32, _weight=torch.empty(20, 32, device="cuda"))
    model = nn.ModuleDict({"embed": embed, "head": nn.Linear(32, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    replace_linears(model, {"head": random_layer(32, 20, (4,))})
    assert moved == [torch.device("cuda", 0)]  # once: a tied table stays one
    assert model["head"].codes.is_meta
    assert model["head"].codes is model["embed"].codes
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 20))
    replace_linears(empty, {"0": random_layer(32, 20, (4,))})
    assert moved == [torch.device("cuda", 0)]
    assert empty[0].codes.device.type == "cpu"


@pytest.mark.parametrize("model", [nn.Linear(32, 16), nn.Embedding(16, 32)], ids=["Linear", "Embedding"])
def test_a_model_that_is_itself_a_layer_is_refused(model: nn.Module) -> None:
    layers = {"": random_layer(32, 16, (4,))}
    message = f"the model is one {type(model).__name__}, .* put it into a module"
    with pytest.raises(ConfigError, match=message):
        replace_linears(model, layers)
    with pytest.raises(ConfigError, match=message):
        restore(model, Checkpoint(layers=layers, tensors={}, config={}))


def test_pickles_and_copies_of_modules_share_what_the_modules_shared() -> None:
    layer = random_layer(70, 64, (4, 2), outliers=0.1)
    model = torch.nn.ModuleDict({"head": ClaqLinear(layer, torch.randn(64)), "table": ClaqEmbedding(layer)})
    once = pickle.loads(pickle.dumps(model))
    for copied in (once, pickle.loads(pickle.dumps(once)), copy.deepcopy(model), copy.deepcopy(once)):
        for name in TENSOR_NAMES:
            assert torch.equal(getattr(copied["head"], name), getattr(layer, name)), name
            assert getattr(copied["head"], name).dtype == getattr(layer, name).dtype
            assert getattr(copied["head"], name).data_ptr() == getattr(copied["table"], name).data_ptr(), name
        copied["head"].layer.validate()


def test_empty_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    layer = random_layer(32, 8)
    cut = {
        name: tensor if tensor.numel() else torch.ones(4, dtype=tensor.dtype)[:0]
        for name, tensor in layer.tensors().items()
    }
    module = ClaqLinear(dataclasses.replace(layer, **cut), torch.zeros(8))
    program = torch.export.export(module, (torch.randn(2, 32),))
    torch.export.save(program, tmp_path / "module.pt2")
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in module.buffers() if not buffer.numel())


def test_the_weight_and_the_size_of_a_table_can_be_set_to_what_they_are() -> None:
    layer = random_layer(32, 8)
    table, head, other = ClaqEmbedding(layer), ClaqLinear(layer), ClaqLinear(random_layer(32, 8, seed=1))
    head.weight = table.weight
    table.num_embeddings = 8
    with pytest.raises(ModelError, match=r"the weight of a ClaqLinear cannot be replaced"):
        other.weight = table.weight
    with pytest.raises(ModelError, match=r"embedding of 8 rows cannot be resized to 9"):
        table.num_embeddings = 9


class ScaledEmbedding(nn.Embedding):
    """Rows times a factor in a buffer, as Gemma's; and indices that are moved, as OPT's."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.register_buffer("factor", torch.tensor(3.0), persistent=False)
        self.offset = 2

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices + self.offset) * self.factor.to(self.weight.dtype)


class OwnLookup(nn.Embedding):
    """Reads its weight itself."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(indices, self.weight, self.padding_idx) + 1


@pytest.mark.parametrize("kind", [ScaledEmbedding, OwnLookup])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_of_the_models_own_class_stays_of_that_class(kind: type, dtype: torch.dtype) -> None:
    layer = random_layer(70, 40, (4, 2), outliers=0.1)
    model = nn.ModuleDict({"table": kind(40, 70), "head": nn.Linear(70, 40, bias=False)}).to(dtype)
    model["head"].weight = model["table"].weight
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense["table"].weight.copy_(layer.dequantize(dtype))
    replace_linears(model, {"table": layer})
    indices = torch.tensor([[0, 37], [5, 5]])
    expected = dense["table"](indices)
    compiled = torch.compile(lambda table, tokens: table(tokens), backend="eager", fullgraph=True)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        table = copied["table"]
        assert isinstance(table, ClaqEmbedding)
        assert isinstance(table, kind)
        assert torch.equal(table(indices), expected)
        assert torch.equal(compiled(table, indices), expected)
        assert table.codes.data_ptr() == copied["head"].codes.data_ptr()
        assert not list(table.parameters())
    assert torch.equal(model.double()["table"].weight, layer.dequantize(torch.float64))


def test_rows_of_a_weight_are_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(70, 40, (4, 2), outliers=0.1)
    table = ClaqEmbedding(layer)
    monkeypatch.setattr(DenseWeight, "dequantize", lambda _: pytest.fail("the whole table was decoded"))
    rows = nn.functional.embedding(torch.tensor([[3, 39]]), table.weight)
    assert torch.equal(rows, layer.dequantize()[[3, 39]][None])
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            nn.functional.embedding(torch.tensor([outside]), table.weight)


def test_the_dense_module_of_an_embedding_of_the_models_own_class() -> None:
    layer = random_layer(70, 40, (4, 2))
    model = nn.ModuleDict({"table": ScaledEmbedding(40, 70)})
    replace_linears(model, {"table": layer})
    dense = dense_embedding(model["table"], nn.Parameter(layer.dequantize()))
    assert type(dense) is ScaledEmbedding
    assert set(vars(dense)) == set(vars(ScaledEmbedding(40, 70)))
    assert {**dict(dense.named_buffers()), **dense.state_dict()}.keys() == {"factor", "weight"}
    indices = torch.arange(38)
    torch.testing.assert_close(dense(indices), model["table"](indices), rtol=0, atol=0)


class Experts(nn.Module):
    """Takes matrices of one parameter in its own way, as JetMoE does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 32))
        self.other = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(nn.functional.linear(x, matrix) for matrix in self.weight) + self.other(x)


@pytest.mark.parametrize("count", [3, 2], ids=["all experts", "some"])
def test_matrices_of_a_stack_are_restored_dense(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Experts()
    layers = {f"weight.{index}": random_layer(32, 16, (4,), seed=index) for index in range(count)}
    stored = {name: tensor for name, tensor in model.state_dict().items() if count < 3 or name != "weight"}
    save_checkpoint(tmp_path, layers, stored, {})
    expected = [layer.dequantize() for layer in layers.values()] + list(model.weight.detach()[count:])
    fresh = load(tmp_path, Experts())
    assert torch.equal(fresh.weight, torch.stack(expected))
    assert torch.equal(fresh.other.weight, model.other.weight)
    with pytest.raises(ModelError, match=r"no linear layer 'weight\.3'"):
        replace_linears(Experts(), {"weight.3": random_layer(32, 16)})


def test_a_parametrized_embedding_gets_the_dequantized_table() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = nn.ModuleDict({"table": nn.Embedding(40, 70)})
    nn.utils.parametrize.register_parametrization(model["table"], "weight", Double())
    layer = random_layer(70, 40)
    assert linear_kind(model["table"]) is None
    replace_linears(model, {"table.parametrizations.weight.original": layer})
    assert torch.equal(model["table"](torch.arange(40)), 2 * layer.dequantize())

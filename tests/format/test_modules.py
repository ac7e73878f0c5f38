"""ClaqLinear as a module, and checkpoints loaded back into PyTorch models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from quantized_layers import random_layer
from torch import nn

from claq_export.errors import ModelError
from claq_export.format.checkpoint import Checkpoint, save_checkpoint
from claq_export.format.layer import TENSOR_NAMES, QuantizedLinear
from claq_export.modules import ClaqLinear, load, replace_linears, restore


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


def test_the_weight_stands_in_for_shape_and_type_and_its_values_are_no_numbers() -> None:
    module = ClaqLinear(random_layer(32, 8)).half()
    assert module.weight.shape == (8, 32)
    assert (module.weight.dtype, module.weight.device) == (torch.float16, module.codes.device)
    # PyTorch would multiply by a meta tensor and return what lies in memory.
    assert (torch.ones(3, 32) @ module.weight.float().t()).isnan().all()

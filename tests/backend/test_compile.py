"""The backend on small models: what is quantized, how often, and that results are those of claq_export.quantize."""

from __future__ import annotations

import copy
import gc
import shutil
from typing import Any

import pytest
import torch
from backend_models import FEATURES, Net, compiled, data, stacks_of, store_of
from torch import nn

import claq_export
from claq_export import Config
from claq_export.backend.store import WeightStore
from claq_export.errors import CalibrationError, ConfigError


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def quantized(model: nn.Module, config: Config) -> nn.Module:
    """An independent copy, quantized through the export's capture."""
    return claq_export.quantize(copy.deepcopy(model), (data()[0],), config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 3, "outliers": 0.01, "accuracy": "int8"},
        {"bits": 2, "fuse_siblings": False},
        {"preset": "claq-2.24"},
        {"bits": 4.5},
        {"exclude": ("blocks.1",)},
    ],
    ids=str,
)
def test_data_gives_the_layers_of_quantize(settings: dict[str, Any]) -> None:
    model, batches = Net(), data()
    expected = quantized(model, Config(calibration=batches, **settings))
    run = compiled(model, calibration=batches, **settings)
    for rows in (1, 5):
        x = data(1, rows, seed=9)[0]
        torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(run(x), model(x))


def test_no_calibration_gives_the_layers_of_quantize() -> None:
    model = Net()
    expected = quantized(model, Config(calibration="none"))
    run = compiled(model, calibration="none")
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bits": 4.5}], ids=str)
def test_observe_then_swap_gives_the_layers_of_quantize(settings: dict[str, Any]) -> None:
    model, batches = Net(), data(3)
    expected = quantized(model, Config(calibration=batches, **settings))
    run = compiled(model, observe=3, **settings)
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, None])
def test_observed_writes_into_parts_of_values_are_followed(dynamic: bool | None) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(FEATURES, 64), nn.Linear(128, FEATURES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(*x.shape[:-1], 128)
            out[..., :64] = 1.0
            out[..., 64:] = self.first(x)
            return self.second(out)

    model, batches = Joined().eval(), [*data(2), *data(2, 3)]
    expected = claq_export.quantize(copy.deepcopy(model), (batches[0],), Config(calibration=batches))
    run = compiled(model, observe=4, dynamic=dynamic)
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-3, atol=1e-3)


def test_progress_lines_tell_of_observation_and_swap(capsys: pytest.CaptureFixture[str]) -> None:
    run = compiled(Net(), observe=2, progress=True)
    told = []
    for x in data(3):
        run(x)
        told.append(" ".join(capsys.readouterr().err.split()))
    assert "the first 2 calls run in full precision and are observed; then the weights are quantized" in told[0]
    assert "2 calls observed, quantizing the weights" in told[1]
    assert "quantized weights are in use from the next call on" in told[1]
    assert told[2] == ""


def test_observed_graphs_of_several_shapes_are_walked_together() -> None:
    model, batches = Net(), [*data(2, 40), data(1, 1, seed=3)[0], data(1, 7, seed=4)[0]]
    expected = quantized(model, Config(calibration=batches))
    run = compiled(model, observe=4)  # three graphs: 40 rows, one row, any number
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, 11, seed=9)[0]
    # The order of the sums differs between the walks.
    torch.testing.assert_close(run(x), expected(x), rtol=1e-3, atol=1e-3)


def test_observed_inputs_stay_within_their_memory() -> None:
    model, batches = Net(), data(3)
    size = batches[0].numel() * 4
    expected = quantized(model, Config(calibration=batches[:2]))
    run = compiled(model, observe=3, observe_bytes=2 * size + 1)
    for x in batches:
        run(x)
    torch.testing.assert_close(run(batches[2]), expected(batches[2]), rtol=1e-5, atol=1e-5)


def test_a_weight_is_quantized_once_whatever_is_recompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    put = WeightStore.put

    def counting(store: WeightStore, weight: torch.Tensor, *rest: Any) -> None:
        added.append(id(weight))
        put(store, weight, *rest)

    monkeypatch.setattr(WeightStore, "put", counting)
    model = Net()
    run = compiled(model, calibration=data())
    for rows in (3, 1, 8, 9):
        run(data(1, rows)[0])
    run(data(1, 5)[0].double().float())
    assert len(added) == len(set(added)) > 0


def test_siblings_share_one_operator_and_their_parts_know_their_rows() -> None:
    model = Net(1)
    compiled(model, calibration=data())(data(1)[0])
    stacks = stacks_of(model)
    block = "blocks.0"
    assert stacks[f"{block}.q.weight"] is stacks[f"{block}.k.weight"] is stacks[f"{block}.v.weight"]
    assert stacks[f"{block}.q.weight"].rows == (32, FEATURES, FEATURES)  # k is the first in the graph
    assert stacks[f"{block}.out.weight"].rows == (FEATURES,)


def test_graph_breaks_are_fine() -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    model = Broken()
    expected = quantized(Net(), Config(calibration=data()))
    run = compiled(model, fullgraph=False, calibration=data())
    # Capture cannot follow a graph break of Dynamo's, but torch.export ignores this one.
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)
    assert all(stacks_of(model)[f"blocks.{i}.out.weight"] is not None for i in range(2))


def test_layers_of_one_class_may_share_compiled_code() -> None:
    model = Net(3)
    expected = quantized(model, Config(calibration="none"))
    dense = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend=claq_backend(), options={"fallback": "eager", "calibration": "none", "progress": False})
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        x = data(1, seed=9)[0]
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), dense(x))


def claq_backend() -> Any:
    from claq_export.backend import claq

    return claq


def test_changed_weights_are_quantized_again() -> None:
    model, other = Net(), Net(seed=5)
    run = compiled(model, calibration="none")
    x = data(1)[0]
    run(x)
    model.load_state_dict(other.state_dict())
    expected = quantized(other, Config(calibration="none"))
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


def test_weights_stored_transposed_and_tied() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(FEATURES, 64) / 7)
            self.bias = nn.Parameter(torch.randn(64))
            self.table = nn.Embedding(96, 64)
            self.tail = nn.Parameter(torch.randn(64, 40))
            self.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.addmm(self.bias, x, self.weight)
            ids = inner.abs().sum(-1).long() % 96
            return (inner + self.table(ids)) @ self.table.weight.t(), inner @ self.tail

    model = Odd()
    reference = copy.deepcopy(model)
    run = compiled(model, calibration="none", exclude=("tail",))
    store = store_of_after(run, model)
    for name in ("weight", "table.weight"):
        entry = store.find(model.get_parameter(name))
        assert entry is not None
        assert entry.stack is not None
        value = entry.layer.dequantize()
        reference.get_parameter(name).copy_(value.T if entry.stack.transposed else value)
    assert store.find(model.tail) is None
    x = data(1, seed=9)[0]
    for got, wanted in zip(run(x), reference(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def store_of_after(run: Any, model: nn.Module) -> WeightStore:
    run(data(1)[0])
    return store_of(model)


def test_floats_that_dynamo_takes_for_inputs() -> None:
    class Scaled(Net):
        scale = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model, x = Scaled(), data(1)[0]
    run = compiled(model, calibration="none", dynamic=True)
    first = run(x)
    model.scale = 0.25
    torch.testing.assert_close(run(x), first / 2)
    assert not torch.equal(first, model(x) * 2)


def test_tensors_made_from_a_size_do_not_fix_it() -> None:
    class Positions(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.arange(x.shape[0])[:, None]  # has no tensor among its inputs

    model = Positions()
    run = compiled(model, calibration="none", dynamic=True)
    expected = quantized(model, Config(calibration="none"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            x = data(1, rows, seed=9)[0]
            torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


def test_a_graph_that_cannot_be_traced_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_gm: Any) -> Any:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr("claq_export.backend.compile.trace_to_aten", refuse)
    model, x = Net(), data(1)[0]
    with pytest.warns(UserWarning, match="runs without quantization: NotImplementedError: no such operator"):
        assert torch.equal(compiled(model, calibration="none")(x), model(x))


def test_entries_die_with_their_model() -> None:
    model = Net()
    run = compiled(model, calibration="none")
    run(data(1)[0])
    store = store_of(model)
    assert list(store.entries())
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert not list(store.entries())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_rest_in_one_graph_for_every_batch_size() -> None:
    model = Net(1)
    expected = quantized(model, Config(calibration=data()))
    run = compiled(model, calibration=data(), fallback="inductor")
    modules = torch.compile(expected, backend="inductor", fullgraph=True, dynamic=True)  # claq::linear of ClaqLinear
    for rows in (5, 9):
        x = data(1, rows, seed=9)[0]
        torch.testing.assert_close(run(x), expected(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(modules(x), expected(x), rtol=1e-4, atol=1e-4)


class TestRefusals:
    def test_gradients(self) -> None:
        model = Net()
        run = compiled(model, calibration="none")
        with torch.enable_grad(), pytest.raises(ConfigError, match="compiles for inference: call the model under"):
            run(data(1)[0])
        with torch.enable_grad(), pytest.raises(ConfigError, match="compiles for inference"):
            compiled(model.train(), calibration="none")(data(1)[0])
        model.eval()
        assert not torch.equal(compiled(model, calibration="none")(data(1)[0]), model(data(1)[0]))

    def test_training_mode_without_gradients_is_allowed(self) -> None:
        model = Net().requires_grad_(False).train()
        with torch.enable_grad():
            compiled(model, calibration="none")(data(1)[0])

    @pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(FEATURES)], ids=["dropout", "batch_norm"])
    def test_layers_that_compute_as_in_training(self, layer: nn.Module) -> None:
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES), layer).train()
        with pytest.raises(ConfigError, match=r"training mode \(.*\): call model.eval\(\)"):
            compiled(model, calibration="none")(data(1)[0])
        compiled(model.eval(), calibration="none")(data(1)[0])

    def test_attention_that_drops_as_in_training(self) -> None:
        class Attention(Net):
            dropout = 0.1

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = super().forward(x)[None]
                dropout = self.dropout if self.training else 0.0
                return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout)

        model = Attention().train()
        with pytest.raises(ConfigError, match=r"attention with dropout of 0\.1"):
            compiled(model, calibration="none")(data(1)[0])
        compiled(model.eval(), calibration="none")(data(1)[0])

    def test_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="no option 'calibraton'; did you mean 'calibration'"):
            compiled(Net(), calibraton="none")(data(1)[0])

    def test_text_without_a_text_model(self) -> None:
        with pytest.raises(CalibrationError, match="needs a transformers model"):
            compiled(Net(), calibration="default")(data(1)[0])

    def test_data_without_a_module(self) -> None:
        model = Net()
        parameters = (model.blocks[0].q.weight, model.blocks[0].q.bias)

        def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, weight, bias)

        with pytest.raises(CalibrationError, match="not the forward of one"):
            compiled(function, calibration=data())(data(1)[0], *parameters)

    def test_patterns_that_match_nothing_are_an_error(self) -> None:
        with pytest.warns(UserWarning, match="no layer of this graph is quantized"):
            compiled(Net(), calibration="none", include=("nothing",))(data(1)[0])

    def test_other_settings_after_release(self) -> None:
        model = Net()
        compiled(model, calibration="none", release_weights=True)(data(1)[0])
        with pytest.raises(claq_export.errors.ModelError, match="were released"):
            compiled(model, calibration="none", bits=3)(data(1)[0])

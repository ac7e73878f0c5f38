"""Modules given in Python whose graphs are easily taken for others: the file computes what the module does, or is not there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import claq_export
from claq_export.errors import ConfigError, VerificationError
from claq_export.lowering import lower
from claq_export.passes import fuse_uncached_attention
from claq_export.sizing import PlannedLayer, Sizing

CONFIG = claq_export.Config(calibration="none", accuracy="fp32")


class Windows(nn.Module):
    """Attention among four tokens each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.reshape(-1, 4, 2, 16).transpose(1, 2) for part in self.linear(x).chunk(3, -1))
        found = functional.scaled_dot_product_attention(query, key, value)
        return self.out(found.transpose(1, 2).reshape(x.shape))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + shift


def written(model: nn.Module, example: tuple[torch.Tensor, ...], folder: Path) -> list[ort.InferenceSession]:
    """Sessions of the exported model, without and (if it is installed) with claq's runtime; ``model`` is quantized then."""
    path = claq_export.export(model, example, folder / "model.onnx", CONFIG).artifact.path
    claq_export.load(folder, model)
    options = [ort.SessionOptions()]
    try:
        import claq_runtime
    except ImportError:
        pass
    else:
        options.append(ort.SessionOptions())
        claq_runtime.register(options[-1])
    return [ort.InferenceSession(str(path), each, providers=["CPUExecutionProvider"]) for each in options]


def agree(sessions: list[ort.InferenceSession], model: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = model(*inputs)
    for session in sessions:
        names = [value.name for value in session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        (found,) = session.run(None, feeds)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_attention_in_windows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Windows().eval()
    sessions = written(model, (torch.randn(2, 8, 32),), tmp_path)
    agree(sessions, model, torch.randn(3, 12, 32))


def test_one_tensor_as_two_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Shifted().eval(), torch.randn(2, 5, 32)
    sessions = written(model, (x, x), tmp_path)
    agree(sessions, model, torch.randn(3, 4, 32), torch.randn(3, 4, 32))


@pytest.mark.parametrize("batches", [(2, 1), (1, 2)], ids=["a shift for all", "a row for all"])
def test_an_example_that_broadcasts_runs(batches: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shifted().eval()
    example = tuple(torch.randn(size, 5, 32) for size in batches)
    agree(written(model, example, tmp_path), model, *example)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_pass_changes_is_noticed(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubles(fuse_uncached_attention.FuseUncachedAttention):
        """A pass with a defect: what the last linear gives is doubled."""

        def run(self, gm: fx.GraphModule, context: object) -> object:
            output = next(iter(reversed(gm.graph.nodes)))
            (value,) = output.all_input_nodes
            with gm.graph.inserting_before(output):
                doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
            doubled.meta = dict(value.meta)
            output.replace_input_with(value, doubled)
            return super().run(gm, context)

    monkeypatch.setattr("claq_export.passes.FuseUncachedAttention", Doubles)
    config = claq_export.Config(calibration="none", accuracy="fp32", dtype=dtype)
    with pytest.raises(VerificationError, match=r"fusing operators changed output 'output' of .* by 1 of"):
        claq_export.export(Windows().eval(), torch.randn(2, 8, 32), tmp_path / "model.onnx", config)


def test_nothing_is_predicted_twice_or_kept_for_a_verification_that_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions, kept = [], []

    def predicting(sizing: Sizing) -> list[PlannedLayer]:
        predictions.append(sizing)
        return predicted_layers(sizing)

    def lowering(*given: Any, **named: Any) -> fx.Graph | None:
        kept.append(lower(*given, **named))
        if kept[-1] is None:  # nothing is left to see without a verification
            raise KeyboardInterrupt
        return kept[-1]

    predicted_layers = Sizing.predicted_layers
    monkeypatch.setattr(Sizing, "predicted_layers", predicting)
    monkeypatch.setattr("claq_export.compiler.lower", lowering)
    config = claq_export.Config(bits=3.5, calibration="none")
    for verify in (False, True):
        with contextlib.nullcontext() if verify else pytest.raises(KeyboardInterrupt):
            claq_export.export(Windows().eval(), torch.randn(2, 8, 32), tmp_path / "model.onnx", config, verify=verify)
    assert len(predictions) == 2
    assert [graph is not None for graph in kept] == [False, True]


@pytest.mark.parametrize("model", [nn.Linear(32, 32), nn.Embedding(32, 32)], ids=["Linear", "Embedding"])
def test_a_model_that_is_itself_a_layer_is_exported_but_has_no_place_in_pytorch(
    model: nn.Module, tmp_path: Path
) -> None:
    example = torch.randn(2, 32) if isinstance(model, nn.Linear) else torch.randint(0, 32, (2, 3))
    with pytest.raises(ConfigError, match="put it into a module"):
        claq_export.quantize(model, example, CONFIG)
    result = claq_export.export(model, example, tmp_path / "model.onnx", CONFIG)
    assert result.verification is not None
    assert len(result.layers) == 1
    with pytest.raises(ConfigError, match="put it into a module"):
        claq_export.modules.load(tmp_path, model)

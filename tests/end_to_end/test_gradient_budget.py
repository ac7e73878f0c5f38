"""Bit budgets weighed by gradients, from captured models to plans; budgets above the widest code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import sentences
from torch import nn

from claq_export.api import capture, export
from claq_export.calibration.progress import ProgressReporter
from claq_export.cli import main
from claq_export.compiler import Compilation
from claq_export.config import Config
from claq_export.errors import CalibrationError, ConfigError


class Reporter(ProgressReporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Net(nn.Module):
    """The second branch hardly matters to the output; a comparison at the end has no gradient."""

    def __init__(self, differentiable: bool = True, features: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(features, features), nn.Linear(features, features)
        self.differentiable = differentiable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.loud(x) + 1e-3 * self.quiet(torch.relu(x))
        return y if self.differentiable else (y > 0).to(x.dtype)


def compilation(model: Net, **settings: Any) -> tuple[Compilation, Reporter]:
    features = model.loud.in_features
    batches = [torch.randn(8, features, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    captured, _ = capture(model.eval(), (batches[0],))
    reporter = Reporter()
    return Compilation(captured, Config(calibration=batches, **settings), reporter), reporter


def bits_of(done: Compilation) -> dict[str, float]:
    return {name: site.bits.true_bits for name, site in done.sites.items()}


def test_layers_that_matter_get_the_bits() -> None:
    weighed, reporter = compilation(Net(), bits=3.5)
    weighed.quantize()
    bits = bits_of(weighed)
    assert bits["loud"] > bits["quiet"] + 1
    assert weighed.true_bits == pytest.approx(3.5, rel=0.01)
    assert not reporter.warnings
    alike, _ = compilation(Net(), bits=3.5, importance=False)
    alike.quantize()
    assert abs(bits_of(alike)["loud"] - bits_of(alike)["quiet"]) < 0.5


def test_a_graph_without_gradient_falls_back_and_says_so() -> None:
    done, reporter = compilation(Net(differentiable=False), bits=3.5)
    done.quantize()
    assert done.true_bits == pytest.approx(3.5, rel=0.01)
    assert any("gradient" in warning for warning in reporter.warnings)


def test_a_budget_above_four_bits_buys_outliers() -> None:
    done, _ = compilation(Net(features=320), bits=4.9)
    planned = done.sizing.predicted_layers()
    weights = sum(layer.in_features * layer.out_features for layer in planned)
    assert 8 * sum(layer.nbytes for layer in planned) / weights == pytest.approx(4.9, rel=0.02)
    done.quantize()
    assert done.true_bits == pytest.approx(4.9, rel=0.01)
    assert any(site.layer.outliers for site in done.sites.values())


def test_tuning_as_a_setting(tiny_bert: Path) -> None:
    captured, _ = capture(tiny_bert, task="feature-extraction")
    config = Config(bits=2, calibration=sentences(60), samples=16, tune=1e-6)
    done = Compilation(captured, config, ProgressReporter(quiet=True))
    done.quantize()
    assert done.tuning is not None
    assert done.tuning.steps == 1
    assert done.seconds["tuning"] > 0
    with pytest.raises(ConfigError, match="tune"):
        Config(tune=-1)


class Gated(nn.Module):
    """Half of the tokens do not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (x[..., :1] > 0)


@pytest.mark.parametrize("bits", [2, 2.9])
def test_guided_hessians_see_the_tokens_that_matter(bits: float) -> None:
    def tokens(seed: int, kept: bool) -> torch.Tensor:
        x = torch.randn(128, 64, generator=torch.Generator().manual_seed(seed))
        if kept:  # few directions, in which errors of columns can make up for one another
            x = x[:, :8] @ torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) / 8**0.5
        x[:, 0] = x[:, 0].abs() if kept else -x[:, 0].abs()
        return x

    batches = [torch.cat([tokens(i, True), tokens(100 + i, False)]) for i in range(4)]
    unseen = tokens(200, True)
    model = Gated().eval()
    wanted = model(unseen).detach()

    def error(guided: bool) -> float:
        captured, _ = capture(model, (batches[0],))
        config = Config(calibration=batches, bits=bits, guided=guided)
        done = Compilation(captured, config, ProgressReporter(quiet=True))
        done.quantize_sites()
        (site,) = done.sites.values()
        found = unseen @ site.layer.dequantize().T + model.layer.bias.detach()
        return float((found - wanted).square().mean())

    assert error(guided=True) < 0.5 * error(guided=False)


def quantized(source: Any, task: str | None, batches: Any, **settings: Any) -> tuple[Compilation, Reporter]:
    captured, _ = capture(source, task=task) if task else capture(source, (batches[0],))
    reporter = Reporter()
    done = Compilation(captured, Config(calibration=batches, **settings), reporter)
    done.quantize_sites()
    return done, reporter


def same_codes(one: Compilation, other: Compilation) -> bool:
    return all(torch.equal(done.layer.codes, other.sites[name].layer.codes) for name, done in one.sites.items())


@pytest.mark.parametrize(
    ("source", "task"), [("tiny_llama", "text-generation"), ("tiny_bert", "feature-extraction"), ("net", None)]
)
def test_models_of_hugging_face_are_guided_by_default(
    source: str, task: str | None, request: pytest.FixtureRequest
) -> None:
    model, data = (Net().eval(), [torch.randn(8, 96) for _ in range(4)]) if task is None else (None, sentences(40))
    model = request.getfixturevalue(source) if model is None else model
    given, options = (model, task, data), {"samples": 8, "bits": 3}
    usual, guided, unguided = (
        quantized(*given, **options, **settings)[0] for settings in ({}, {"guided": True}, {"guided": False})
    )
    assert same_codes(usual, unguided if task is None else guided)
    assert not same_codes(guided, unguided)
    assert [done.settings()["guided"] for done in (usual, guided, unguided)] == [task is not None, True, False]


def test_outputs_that_matter_are_fitted_closer() -> None:
    """Error feedback leaves no output out, but a column's codebook belongs to all rows."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 128)
            self.register_buffer("matters", torch.where(torch.arange(128) < 16, 10.0, 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.matters

    batches = [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    errors = []
    for row_weights in ("importance", "uniform"):
        done, _ = quantized(Uneven().eval(), None, batches, guided=True, bits=2, algorithm={"row_weights": row_weights})
        (site,) = done.sites.values()
        difference = site.layer.dequantize() - Uneven().layer.weight.detach()
        errors.append(float(difference[:16].square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_a_limit_on_memory_leaves_guidance_out_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    for guided, warned in ((None, 1), (False, 0)):
        reporter = Reporter()
        config = Config(calibration=sentences(20), samples=2, sequence_length=16, guided=guided)
        export(tiny_llama, out=tmp_path / "m.onnx", config=config, memory=64 << 30, cache=False, reporter=reporter)
        assert ["count by their norms" in warning for warning in reporter.warnings] == [True] * warned
        assert json.loads((tmp_path / "claq.json").read_text(encoding="utf-8"))["config"]["guided"] is False


def test_without_a_gradient_guidance_is_left_out_unless_it_is_asked_for(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gradient(*_: Any, **__: Any) -> None:
        raise CalibrationError("gradients cannot be had: of a comparison there is none")

    monkeypatch.setattr("claq_export.compiler.guidance", no_gradient)
    given, options = (tiny_bert, "feature-extraction", sentences(20)), {"samples": 4, "bits": 3}
    usual, reporter = quantized(*given, **options)
    assert [warning for warning in reporter.warnings if "of a comparison there is none" in warning]
    assert same_codes(usual, quantized(*given, **options, guided=False)[0])
    with pytest.raises(CalibrationError, match="of a comparison"):
        quantized(*given, **options, guided=True)


def test_gradients_are_kept_for_a_run_that_goes_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> Compilation:
        captured, _ = capture(tiny_llama, task="text-generation")
        config = Config(calibration=sentences(20), samples=2, sequence_length=16, bits=3.5)
        return Compilation(captured, config, ProgressReporter(quiet=True))

    first, again = compiled(), compiled()
    first.quantize_sites(tmp_path / "work")
    first.store.close()
    # As after a kill while the second layer was quantized: gradients and the budget are there, layers are not.
    for path in (tmp_path / "work").glob("*.safetensors"):
        if path.stem not in ("gradients", "plans"):
            path.unlink()
    monkeypatch.setattr("claq_export.compiler.guidance", None)  # would fail
    again.quantize_sites(tmp_path / "work")
    assert same_codes(first, again)
    again.store.remove()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["--guided", "--no-guided"])
def test_the_command_line_exports_a_guided_model(tiny_llama: Path, tmp_path: Path, option: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(64)), encoding="utf-8")
    options = ["--calibration", str(text), "--samples", "4", "--sequence-length", "32", "--quiet"]
    assert main([str(tiny_llama), "--out", str(tmp_path / "model.onnx"), option, *options]) == 0
    config = json.loads((tmp_path / "claq.json").read_text(encoding="utf-8"))["config"]
    assert config["guided"] is (option == "--guided")


def test_guidance_needs_data_and_is_not_the_papers() -> None:
    for settings in ({"calibration": "none"}, {"preset": "claq-3"}):
        with pytest.raises(ConfigError, match="guided"):
            Config(guided=True, **settings)

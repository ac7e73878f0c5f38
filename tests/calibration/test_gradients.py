"""Captured graphs under autograd, and output importance taken through them, against the models they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from claq_export.algorithm.importance import OutputImportance, sampled_loss
from claq_export.api import capture
from claq_export.calibration.gradients import DifferentiableGraph, fast_dtype, multiply, pieces
from claq_export.calibration.progress import ProgressReporter
from claq_export.calibration.sensitivity import output_importance
from claq_export.capture import capture_module
from claq_export.errors import CalibrationError
from claq_export.passes import PassContext, planning_pipeline


def planned(captured):
    context = PassContext(task=captured.task, aliases=captured.aliases)
    planning_pipeline().run(captured.graph_module, context)
    return context.plan.sites


def token_batches(captured, count: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [captured.inputs_from_tokens(torch.randint(4, 60, (2, length), generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_run_under_autograd_gives_the_models_output(tiny_llama: Path, dtype: torch.dtype) -> None:
    captured, _ = capture(tiny_llama, task="text-generation")
    sites = planned(captured)
    weights = {site.name: site.weight(captured.graph_module).detach().to(dtype).requires_grad_() for site in sites}
    linears = {node: (lambda x, name=site.name: multiply(x, weights[name])) for site in sites for node in site.nodes}
    (batch,) = token_batches(captured, 1, 12)
    (logits,) = DifferentiableGraph(captured.graph_module, linears, dtype)(batch)
    (expected,) = captured.run(batch)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    logits.float().square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights.values())


def test_importance_is_that_of_the_modules(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claq_export.calibration.sensitivity.fast_dtype", lambda device: torch.float32)
    captured, model = capture(tiny_llama, task="text-generation")
    sites = planned(captured)
    batches = token_batches(captured, 2, 10)
    found = output_importance(
        captured.graph_module, sites, batches, task="text-generation", seed=3, reporter=ProgressReporter(quiet=True)
    )
    generator = torch.Generator().manual_seed(3)
    parts = {name for site in sites for name, _ in site.parts}
    modules = {name: module for name, module in model.named_modules() if name in parts}
    with OutputImportance(modules) as expected:
        for batch in batches:
            for row in range(2):
                sampled_loss(model(input_ids=batch["input_ids"][row : row + 1]).logits, generator).backward()
    rows = expected.result()
    assert len(modules) > len(sites)
    for site in sites:
        torch.testing.assert_close(
            found[site.name], torch.cat([rows[name] for name, _ in site.parts]), rtol=1e-4, atol=0
        )


def test_decoder_samples_are_cut_into_sequences_of_their_own(tiny_llama: Path) -> None:
    captured, _ = capture(tiny_llama, task="text-generation")
    batches = token_batches(captured, 1, 21)
    found = pieces(batches, "text-generation", tokens=8)
    assert [piece["input_ids"].shape for piece in found] == [(1, 8)] * 4
    tokens = batches[0]["input_ids"]
    assert torch.equal(found[1]["input_ids"], tokens[:1, 8:16])
    for piece in found:
        assert torch.equal(piece["position_ids"], torch.arange(8)[None])
        captured.run(piece)
    assert [piece["input_ids"].shape for piece in pieces(batches, "feature-extraction", tokens=8)] == [(1, 21)] * 2
    assert pieces(batches, None) == batches


def test_operators_without_gradient_are_reported() -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.second(torch.relu(self.first(x))) > 0).to(x.dtype)

    captured = capture_module(Rounding().eval(), (torch.randn(2, 48),))
    with pytest.raises(CalibrationError, match="gradient"):
        output_importance(
            captured.graph_module,
            planned(captured),
            [{"x": torch.randn(2, 48)}],
            task=None,
            seed=0,
            reporter=ProgressReporter(quiet=True),
        )


def test_a_layer_that_no_sample_uses_counts_like_the_others() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + (self.unused(2 * x) > 0).to(x.dtype)

    captured = capture_module(Branch().eval(), (torch.randn(2, 48),))
    sites = planned(captured)
    samples = [{"x": torch.randn(2, 48)}]
    found = output_importance(
        captured.graph_module, sites, samples, task=None, seed=0, reporter=ProgressReporter(quiet=True)
    )
    torch.testing.assert_close(found["used"], torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(found["unused"], found["used"])


def test_values_of_mixed_dtype_fall_back_to_float32() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(x, self.layer(x), x.T @ x)

    model = Mixed().eval()
    captured = capture_module(model, (torch.randn(8, 8),))
    x = torch.randn(8, 8)
    (found,) = DifferentiableGraph(captured.graph_module, {}, torch.bfloat16)({"x": x})
    torch.testing.assert_close(found, model(x))
    with pytest.raises(CalibrationError, match="batch has 2"):
        DifferentiableGraph(captured.graph_module, {}, torch.float32)({"x": x, "y": x})


def test_fast_dtype_of_a_gpu_is_bfloat16() -> None:
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16
    assert fast_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)

"""Captured graphs under autograd, and output importance taken through them, against the models they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from claq_export.algorithm import Hessian, LayerSettings, quantize_layer
from claq_export.algorithm.importance import OutputImportance, fisher_gradient, projected_gradient
from claq_export.api import capture
from claq_export.calibration.gradients import DifferentiableGraph, fast_dtype, multiply, pieces
from claq_export.calibration.progress import ProgressReporter
from claq_export.calibration.sensitivity import (
    SAMPLES,
    Guidance,
    Importance,
    evenly_spaced,
    guidance,
    output_importance,
)
from claq_export.calibration.stage import CalibrationStage
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
                logits = model(input_ids=batch["input_ids"][row : row + 1]).logits
                logits.backward(fisher_gradient(logits, generator))
    rows = expected.result()
    assert len(modules) > len(sites)
    for site in sites:
        torch.testing.assert_close(
            found.rows[site.name], torch.cat([rows[name] for name, _ in site.parts]), rtol=1e-4, atol=0
        )


def test_guidance_is_the_squared_gradient_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some processors multiply in bfloat16.
    monkeypatch.setattr("claq_export.calibration.sensitivity.fast_dtype", lambda device: torch.float32)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model = Two().eval()
    batches = [{"x": torch.randn(2, 5, 48)}, {"x": torch.randn(2, 5, 48)}]
    captured = capture_module(model, (batches[0]["x"],))
    found = guidance(
        captured.graph_module, planned(captured), batches, task=None, seed=7, reporter=ProgressReporter(quiet=True)
    )
    # The loss is the output times signs, so these are the gradients of the second layer's outputs.
    generator = torch.Generator().manual_seed(7)
    signs = [torch.randint(0, 2, (2, 5, 32), generator=generator) * 2.0 - 1 for _ in batches]
    weight = model.second.weight.detach()
    gradients = torch.cat(
        [(sign @ weight) * (model.first(batch["x"]) > 0) for sign, batch in zip(signs, batches, strict=True)]
    ).reshape(20, 64)
    torch.testing.assert_close(found.tokens["second"], torch.ones(20))
    torch.testing.assert_close(found.tokens["first"], gradients.square().mean(1))
    torch.testing.assert_close(found.importance.rows["first"], gradients.square().mean(0).double(), check_dtype=False)


@pytest.mark.parametrize("known", ["every token", "too few tokens", "another layer"])
def test_hessians_weigh_tokens_as_the_guidance_says(known: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).eval()
    batches = [{"x": torch.randn(3, 5, 64)} for _ in range(2)]
    captured = capture_module(model, (batches[0]["x"],))
    (site,) = planned(captured)
    importance = torch.rand(30) * 4
    given = {
        "every token": {site.name: importance},
        "too few tokens": {site.name: importance[1:]},
        "another layer": {"other": importance},
    }[known]
    stage = CalibrationStage(
        captured.graph_module,
        [site],
        settings=LayerSettings(bits=3),
        token_clip=2.0,
        devices=["cpu"],
        reporter=ProgressReporter(quiet=True),
        guidance=Guidance(Importance({}, {}), given),
    )
    found = stage.run(batches)[site.name]
    weighted = known == "every token"
    hessian = Hessian(64, token_clip=None if weighted else 2.0)
    hessian.add(torch.cat([batch["x"] for batch in batches]), importance / importance.mean() if weighted else None)
    expected = quantize_layer(model[0].weight, hessian, LayerSettings(bits=3))
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    for name, tensor in expected.layer.tensors().items():
        assert torch.equal(found.layer.tensors()[name], tensor), name


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
    whole = pieces(batches, "text-generation", tokens=8, whole=True)
    assert torch.equal(torch.cat([piece["input_ids"][0] for piece in whole]), tokens.flatten())
    assert [piece["input_ids"].shape for piece in pieces(batches, "feature-extraction", tokens=8)] == [(1, 21)] * 2
    together = pieces(batches, "feature-extraction", tokens=50, whole=True)
    assert [piece["input_ids"].shape for piece in together] == [(2, 21)]
    assert pieces(batches, None) == batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_of_padded_samples_keep_their_own_masks(side: str) -> None:
    real = torch.arange(20) >= 10 if side == "left" else torch.arange(20) < 10
    tokens = torch.arange(100, 120) * real
    positions = (real.cumsum(0) - 1).clamp(min=0).masked_fill(~real, 1)
    sample = {"input_ids": tokens, "attention_mask": real.long(), "token_type_ids": tokens, "position_ids": positions}
    found = pieces([{name: value[None] for name, value in sample.items()}], "text-generation", tokens=8, whole=True)
    # Of three pieces, one holds nothing but padding.
    assert [piece["input_ids"].shape for piece in found] == ([(1, 8), (1, 4)] if side == "left" else [(1, 8)] * 2)
    for piece in found:
        mask = piece["attention_mask"] == 1
        assert torch.equal(mask, piece["input_ids"] != 0)
        assert torch.equal(piece["token_type_ids"], piece["input_ids"])
        assert torch.equal(piece["position_ids"][mask], torch.arange(int(mask.sum())))
        assert bool((piece["position_ids"] >= 0).all())
    assert torch.equal(torch.cat([piece["input_ids"][0] for piece in found]).unique(), tokens.unique())


def test_samples_of_padding_alone_are_no_samples() -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])}
    assert len(pieces([batch], "feature-extraction")) == 1


@pytest.mark.parametrize("length", [1, 24, 25, 40, 47, 48, 71, 95, 512])
def test_samples_are_spread_over_all_of_them(length: int) -> None:
    found = evenly_spaced(length, SAMPLES)
    assert len(found) == min(length, SAMPLES)
    gaps = torch.tensor([*found, length]).diff()
    assert found[0] == 0
    assert int(gaps.min()) >= 1
    assert int(gaps.max()) <= 1 + length // SAMPLES + length // 8 * (length > 100)


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
    torch.testing.assert_close(found.rows["used"], torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(found.rows["unused"], found.rows["used"])


def test_what_is_looked_up_is_weighed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some processors multiply in bfloat16.
    monkeypatch.setattr("claq_export.calibration.sensitivity.fast_dtype", lambda device: torch.float32)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(1024, 128), nn.Linear(128, 128)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    model = Tagger().eval()
    ids = torch.tensor([[1, 7, 7, 3]])
    captured = capture_module(model, (ids,))
    sites = planned(captured)
    assert {site.name for site in sites} == {"table", "head"}

    def importance(exact: dict[str, torch.Tensor]) -> torch.Tensor:
        return output_importance(
            captured.graph_module,
            sites,
            [{"ids": ids}],
            task=None,
            seed=0,
            reporter=ProgressReporter(quiet=True),
            exact=exact,
        ).columns["table"]

    values = model.table(ids).detach().requires_grad_()
    output = model.head(values)
    output.backward(projected_gradient(output, torch.Generator().manual_seed(0)))
    squared = values.grad[0].double().square()
    torch.testing.assert_close(importance({}), squared.mean(0))
    # Of rows that are stored exactly no error counts: here the second and third token.
    torch.testing.assert_close(importance({"table": torch.tensor([7])}), squared[[0, 3]].mean(0))
    # Nothing but such rows: no error of this table matters.
    assert not importance({"table": torch.tensor([1, 3, 7])}).any()


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

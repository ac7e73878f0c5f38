"""Output importance against gradients worked out by hand and by perturbation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from claq_export.algorithm.importance import OutputImportance, fisher_gradient, projected_gradient
from claq_export.errors import CalibrationError


def test_linear_model_by_hand() -> None:
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    generator = torch.Generator().manual_seed(0)
    with OutputImportance({"first": first, "second": second}) as importance:
        for _ in range(400):
            output = second(first(torch.randn(5, 4)))
            output.backward(projected_gradient(output, generator))
    found = importance.result()
    torch.testing.assert_close(found["second"], torch.ones(2, dtype=torch.float64))
    expected = second.weight.detach().double().square().sum(dim=0)
    torch.testing.assert_close(found["first"], expected, rtol=0.1, atol=1e-3)


def test_predicts_the_divergence_of_a_perturbed_model() -> None:
    torch.manual_seed(1)
    layer, head = nn.Linear(8, 16), nn.Linear(16, 5)
    inputs = torch.randn(4000, 8)
    generator = torch.Generator().manual_seed(2)
    with OutputImportance({"layer": layer}) as importance:
        logits = head(torch.tanh(layer(inputs)))
        logits.backward(fisher_gradient(logits, generator))
    weight = importance.result()["layer"]
    noise = 0.02 * torch.randn(4000, 16) * torch.linspace(0, 2, 16)
    with torch.no_grad():
        before = head(torch.tanh(layer(inputs))).log_softmax(-1)
        after = head(torch.tanh(layer(inputs) + noise)).log_softmax(-1)
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = float(0.5 * (weight * noise.double().square().mean(dim=0)).sum())
    assert predicted == pytest.approx(divergence, rel=0.2)


def test_signs_draw_the_covariance_of_a_distribution() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5).log_softmax(0)
    found = fisher_gradient(scores.expand(200_000, 5), torch.Generator().manual_seed(3))
    drawn, p = found.double(), scores.exp().double()
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), torch.diag(p) - p.outer(p), rtol=0, atol=2e-3)
    assert not found.eq(found[0]).all()


def test_rows_that_do_not_count_are_left_out() -> None:
    layer, head = nn.Linear(3, 4), nn.Linear(4, 5)
    inputs, counted = torch.randn(2, 3, 3), torch.tensor([True, True, False, True, False, False])

    def importance_of(draw, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        importance = OutputImportance({})
        output = head(importance.watch("layer", layer(x), real))
        gradient = draw(output, torch.Generator().manual_seed(1), real)
        if real is not None:
            assert not gradient.reshape(6, 5)[~real].any()
        output.backward(gradient)
        return importance.result(["layer"])["layer"]

    for draw in (fisher_gradient, projected_gradient):
        alone = importance_of(draw, inputs.reshape(6, 3)[counted], None)
        torch.testing.assert_close(importance_of(draw, inputs, counted), alone)


def test_a_pass_without_a_row_of_a_layer_says_nothing_about_it() -> None:
    importance = OutputImportance({})
    for rows in (0, 2):
        output = importance.watch("expert", torch.ones(rows, 3))
        output.sum().backward()
        assert importance.seen == (["expert"] if rows else [])
    assert importance.result(["expert"])["expert"].tolist() == [1.0, 1.0, 1.0]


def test_frozen_models_work_and_hooks_go_away() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with OutputImportance({"0": model[0], "2": model[2]}) as importance:
        output = model(torch.randn(6, 3))
        output.backward(projected_gradient(output, generator))
    assert set(importance.result()) == {"0", "2"}
    assert not model[0]._forward_hooks


def test_layer_without_part_in_the_output_is_named() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    with OutputImportance({"used": used, "unused": unused}) as importance:
        output = used(torch.ones(1, 2))
        output.backward(projected_gradient(output, torch.Generator()))
    with pytest.raises(CalibrationError, match="unused"):
        importance.result()

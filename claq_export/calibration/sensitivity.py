"""How much the model's output depends on each planned layer, by backward passes through the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..algorithm.importance import OutputImportance, projected_loss, sampled_loss
from ..errors import CalibrationError, first_line
from ..passes import LinearSite
from ..passes.plan import LINEAR_ROLE
from .data import Batch
from .gradients import DISTRIBUTIONS, DifferentiableGraph, LinearFunction, fast_dtype, multiply, pieces
from .padding import real_rows, real_tokens
from .progress import ProgressReporter

SAMPLES = 24
"""Pieces of at most 256 tokens that are enough: the budget depends on a mean over all tokens of all of them."""


@dataclass(frozen=True)
class Guidance:
    """How much errors at each layer's outputs matter, by output and by calibration token.

    Attributes:
        rows: mean over tokens of the squared gradient of every output, float64 ``[out_features]`` by site name.
        tokens: mean over outputs of the squared gradient of every token, float32 ``[T]`` by site name, tokens in the order of
            the batches, without padding; only sites that stand at one place and saw every token once.
    """

    rows: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]


def output_importance(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    batches: Sequence[Batch],
    *,
    task: str | None,
    seed: int,
    reporter: ProgressReporter,
) -> dict[str, torch.Tensor]:
    """Mean squared gradient of every output of every site, in the unquantized model.

    One sample is in flight at a time, so that memory is what autograd keeps of that one.

    Args:
        graph_module: captured graph after the passes.
        sites: the linears, at least one; all products with a weight count.
        batches: calibration inputs; at most :data:`SAMPLES` pieces, evenly spaced, are used.
        task: decides the loss: log-likelihood of labels drawn from the model where the first output is a
            distribution, else a random projection of all outputs.
        seed: of labels and projections.
        reporter: told of every sample.

    Returns:
        float64 ``[out_features]`` by site name.

    Raises:
        CalibrationError: the graph has an operator without gradient, or gradients that are not finite.
    """
    samples = pieces(batches, task)
    importance = OutputImportance({})
    chosen = [samples[i] for i in evenly_spaced(len(samples), SAMPLES)]
    _backward_passes(graph_module, sites, chosen, importance, task, seed, reporter)
    return _rows(importance, sites)


def evenly_spaced(length: int, count: int) -> list[int]:
    """``count`` indices below ``length``, spread over all of it; all of them if there are no more."""
    if length <= count:
        return list(range(length))
    step, left_out = divmod(length, count)
    # A whole step where it leaves out little at the end: the samples that budgets of long texts have always been made of.
    if 8 * left_out < length:
        return list(range(0, step * count, step))
    return [i * length // count for i in range(count)]


def guidance(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    batches: Sequence[Batch],
    *,
    task: str | None,
    seed: int,
    reporter: ProgressReporter,
) -> Guidance:
    """The same over all calibration tokens, for Hessians that weigh each token by its squared gradient (GuidedQuant, arXiv
    2505.07004, with one group of outputs a layer).

    Args, Raises:
        as for :func:`output_importance`. Sequences of decoders are cut into pieces, so a token's gradient is that of the
        following tokens of its piece.
    """
    importance = OutputImportance({}, per_token=True)
    _backward_passes(graph_module, sites, pieces(batches, task, whole=True), importance, task, seed, reporter)
    once = {site.name for site in sites if len(site.nodes) == 1 and site.role == LINEAR_ROLE}
    tokens = {name: weights for name, weights in importance.tokens.items() if name in once and bool(weights.sum() > 0)}
    return Guidance(_rows(importance, sites), tokens)


def _backward_passes(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    samples: Sequence[Batch],
    importance: OutputImportance,
    task: str | None,
    seed: int,
    reporter: ProgressReporter,
) -> None:
    """Run every sample forward and backward, one in flight at a time; ``importance`` collects."""
    device = sites[0].weight(graph_module).device
    dtype = fast_dtype(device)
    linears: dict[fx.Node, LinearFunction] = {}
    real: torch.Tensor | None = None

    def counted(value: torch.Tensor) -> torch.Tensor | None:
        return real_rows(value.shape, real)  # of the sample that is in flight

    for site in sites:
        weight = site.weight(graph_module).detach().to(dtype)
        for node in site.nodes:
            linears[node] = _watched(site.name, weight, importance, counted)
    graph = DifferentiableGraph(graph_module, linears, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    reporter.start_layers(len(samples), "gradients")
    try:
        for number, sample in enumerate(samples):
            real = _on(device, real_tokens(sample))
            with torch.enable_grad():
                outputs = graph(sample)
                if not outputs:
                    raise CalibrationError("gradients cannot be had: the model returns no floating tensor")
                if task in DISTRIBUTIONS:
                    loss = sampled_loss(outputs[0], generator, counted(outputs[0]))
                else:
                    losses = [projected_loss(output, generator, counted(output)) for output in outputs]
                    loss = torch.stack(losses).sum()
                try:
                    loss.backward()
                except RuntimeError as error:
                    raise CalibrationError(f"gradients cannot be had: {first_line(error)}") from error
            reporter.layer(f"sample {number + 1}", phase="gradients")
    finally:
        reporter.finish_layers()


def _rows(importance: OutputImportance, sites: Sequence[LinearSite]) -> dict[str, torch.Tensor]:
    """By site name; one that no sample used counts as much as the others on average."""
    found = importance.result(importance.seen)
    if not found:
        raise CalibrationError("gradients cannot be had: no layer takes part in the model's output")
    # An expert that these samples are never routed to: as much as the others on average.
    mean = float(torch.stack([rows.mean() for rows in found.values()]).mean())
    return {
        site.name: found.get(site.name, torch.full((site.out_features,), mean, dtype=torch.float64)) for site in sites
    }


def _on(device: torch.device, value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.to(device)


def _watched(
    name: str,
    weight: torch.Tensor,
    importance: OutputImportance,
    counted: Callable[[torch.Tensor], torch.Tensor | None],
) -> LinearFunction:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = multiply(x, weight)
        return importance.watch(name, y, counted(y))

    return run

"""How much the model's output depends on each planned layer, by backward passes through the captured graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..algorithm.importance import OutputImportance, projected_loss, sampled_loss
from ..errors import CalibrationError
from ..passes import LinearSite
from .data import Batch
from .gradients import DISTRIBUTIONS, DifferentiableGraph, LinearFunction, fast_dtype, multiply, pieces
from .progress import ProgressReporter

SAMPLES = 24
"""Pieces of at most 256 tokens that are enough: the budget depends on a mean over all tokens of all of them."""


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
    device = sites[0].weight(graph_module).device
    dtype = fast_dtype(device)
    importance = OutputImportance({})
    linears: dict[fx.Node, LinearFunction] = {}
    for site in sites:
        weight = site.weight(graph_module).detach().to(dtype)
        for node in site.nodes:
            linears[node] = _watched(site.name, weight, importance)
    graph = DifferentiableGraph(graph_module, linears, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    samples = pieces(batches, task)
    step = max(1, len(samples) // SAMPLES)
    chosen = samples[::step][:SAMPLES]
    reporter.start_layers(len(chosen), "gradients")
    try:
        for number, sample in enumerate(chosen):
            with torch.enable_grad():
                outputs = graph(sample)
                if not outputs:
                    raise CalibrationError("gradients cannot be had: the model returns no floating tensor")
                if task in DISTRIBUTIONS:
                    loss = sampled_loss(outputs[0], generator)
                else:
                    loss = torch.stack([projected_loss(output, generator) for output in outputs]).sum()
                try:
                    loss.backward()
                except RuntimeError as error:
                    raise CalibrationError(f"gradients cannot be had: {str(error).splitlines()[0]}") from error
            reporter.layer(f"sample {number + 1}", phase="gradients")
    finally:
        reporter.finish_layers()
    found = importance.result(importance.seen)
    if not found:
        raise CalibrationError("gradients cannot be had: no layer takes part in the model's output")
    # An expert that these samples are never routed to: as much as the others on average.
    mean = float(torch.stack([rows.mean() for rows in found.values()]).mean())
    return {
        site.name: found.get(site.name, torch.full((site.out_features,), mean, dtype=torch.float64)) for site in sites
    }


def _watched(name: str, weight: torch.Tensor, importance: OutputImportance) -> LinearFunction:
    def run(x: torch.Tensor) -> torch.Tensor:
        return importance.watch(name, multiply(x, weight))

    return run

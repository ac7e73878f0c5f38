"""How much the model's output depends on each planned layer, by backward passes through the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn.functional import embedding

from ..algorithm.importance import OutputImportance, fisher_gradient, projected_gradient
from ..deferred import materialize
from ..errors import CalibrationError, first_line
from ..passes import LinearSite
from ..passes.plan import LINEAR_ROLE
from ..process_memory import returned_from, trim_freed_memory
from .data import Batch
from .gradients import DISTRIBUTIONS, DifferentiableGraph, LinearFunction, fast_dtype, multiply, pieces
from .padding import real_rows, real_tokens
from .progress import ProgressReporter

SAMPLES = 24
"""Pieces of at most 256 tokens that are enough: the budget depends on a mean over all tokens of all of them."""

_BLOCKS_RETURNED_FROM = 1 << 19
"""Bytes from which freed memory goes back to the operating system during a backward pass. What autograd keeps of a piece of a
small model are blocks just below a megabyte, and they left the heap in holes that the rest of an export did not fill."""


@dataclass(frozen=True)
class Importance:
    """How much errors of each layer matter.

    Attributes:
        rows: mean over tokens of the squared gradient of every output, float64 ``[out_features]`` by the name of a site that is
            multiplied by.
        columns: the same of every value of a row that is looked up, float64 ``[in_features]`` by the name of a table's site;
            rows that are stored exactly are left out, because no error of theirs matters.
    """

    rows: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """How much errors of each layer matter, as a whole and by calibration token.

    Attributes:
        importance: over all tokens.
        tokens: mean over outputs of the squared gradient of every token, float32 ``[T]`` by site name, tokens in the order of
            the batches, without padding; only sites that stand at one place and saw every token once.
    """

    importance: Importance
    tokens: dict[str, torch.Tensor]


def output_importance(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    batches: Sequence[Batch],
    *,
    task: str | None,
    seed: int,
    reporter: ProgressReporter,
    exact: Mapping[str, torch.Tensor] | None = None,
) -> Importance:
    """Mean squared gradient of every output of every site, in the unquantized model.

    One sample is in flight at a time, so that memory is what autograd keeps of that one.

    Args:
        graph_module: captured graph after the passes.
        sites: linears and tables, at least one; all products with a weight and all lookups count.
        batches: calibration inputs; at most :data:`SAMPLES` pieces, evenly spaced, are used.
        task: decides the loss: the Fisher information of the first output where that is a distribution, else a random
            projection of all outputs.
        seed: of the draws.
        reporter: told of every sample.
        exact: int64, rows of a table that are stored exactly, by site name.

    Raises:
        CalibrationError: the graph has an operator without gradient, or gradients that are not finite.
    """
    samples = pieces(batches, task)
    chosen = [samples[i] for i in evenly_spaced(len(samples), SAMPLES)]
    collected = _Collected(OutputImportance({}), OutputImportance({}), dict(exact or {}))
    _backward_passes(graph_module, sites, chosen, collected, task, seed, reporter)
    return collected.result(sites)


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
    exact: Mapping[str, torch.Tensor] | None = None,
) -> Guidance:
    """The same over all calibration tokens, for Hessians that weigh each token by its squared gradient (GuidedQuant, arXiv
    2505.07004, with one group of outputs a layer).

    Args, Raises:
        as for :func:`output_importance`. Sequences of decoders are cut into pieces, so a token's gradient is that of the
        following tokens of its piece.
    """
    collected = _Collected(OutputImportance({}, per_token=True), OutputImportance({}), dict(exact or {}))
    _backward_passes(graph_module, sites, pieces(batches, task, whole=True), collected, task, seed, reporter)
    once = {site.name for site in sites if len(site.nodes) == 1 and site.role == LINEAR_ROLE}
    by_token = collected.outputs.tokens.items()
    tokens = {name: weights for name, weights in by_token if name in once and bool(weights.sum() > 0)}
    return Guidance(collected.result(sites), tokens)


@dataclass(frozen=True)
class _Collected:
    """Gradients of the outputs of linears, and of the rows that tables give, those stored ``exact``ly left out."""

    outputs: OutputImportance
    looked_up: OutputImportance
    exact: dict[str, torch.Tensor]

    def result(self, sites: Sequence[LinearSite]) -> Importance:
        """What was collected. A linear that no sample used (an expert that no token is routed to) counts as much as the others
        on average; a table that no gradient came to, not at all.

        Raises:
            CalibrationError: no linear was used, or a gradient is not finite.
        """
        linears = [site for site in sites if site.nodes]
        rows = self.outputs.result(self.outputs.seen)
        if linears and not rows:
            raise CalibrationError("gradients cannot be had: no layer takes part in the model's output")
        if linears:
            mean = float(torch.stack([found.mean() for found in rows.values()]).mean())
            rows |= {
                site.name: torch.full((site.out_features,), mean, dtype=torch.float64)
                for site in linears
                if site.name not in rows
            }
        columns = self.looked_up.result(self.looked_up.seen)
        columns |= {
            site.name: torch.zeros(site.in_features, dtype=torch.float64)
            for site in sites
            if site.lookups and site.name not in columns
        }
        return Importance(rows, columns)


def _backward_passes(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    samples: Sequence[Batch],
    collected: _Collected,
    task: str | None,
    seed: int,
    reporter: ProgressReporter,
) -> None:
    """Run every sample forward and backward, one in flight at a time; ``collected`` takes the gradients."""
    device = sites[0].weight(graph_module).device
    dtype = fast_dtype(device)
    linears: dict[fx.Node, LinearFunction] = {}
    real: torch.Tensor | None = None

    def counted(value: torch.Tensor) -> torch.Tensor | None:
        return real_rows(value.shape, real)  # of the sample that is in flight

    for site in sites:
        # Where a model's files give its weights again, these are all of them that is in memory.
        stored = site.weight(graph_module).detach()
        weight = materialize(stored).to(dtype)
        for node in site.nodes:
            linears[node] = _watched(site.name, weight, collected.outputs, counted)
        for node in site.lookups:
            linears[node] = _watched_lookups(site.name, weight, stored.dtype, collected, counted)
    graph = DifferentiableGraph(graph_module, linears, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    reporter.start_layers(len(samples), "gradients")
    try:
        for number, sample in enumerate(samples):
            real = _on(device, real_tokens(sample))
            with torch.enable_grad(), returned_from(_BLOCKS_RETURNED_FROM):
                outputs = graph(sample)
                if not outputs:
                    raise CalibrationError("gradients cannot be had: the model returns no floating tensor")
                distribution = task in DISTRIBUTIONS
                draw = fisher_gradient if distribution else projected_gradient
                # All but the ones that depend on no layer; if there is no other, the backward pass says so.
                outputs = outputs[:1] if distribution else [x for x in outputs if x.requires_grad] or outputs
                try:
                    torch.autograd.backward(outputs, [draw(x, generator, counted(x)) for x in outputs])
                except RuntimeError as error:
                    raise CalibrationError(f"gradients cannot be had: {first_line(error)}") from error
            outputs.clear()
            trim_freed_memory()
            reporter.layer(f"sample {number + 1}", phase="gradients")
    finally:
        reporter.finish_layers()


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


def _watched_lookups(
    name: str,
    table: torch.Tensor,
    dtype: torch.dtype,
    collected: _Collected,
    counted: Callable[[torch.Tensor], torch.Tensor | None],
) -> LinearFunction:
    rounded = torch.ones(len(table), dtype=torch.bool, device=table.device)
    if name in collected.exact:
        rounded[collected.exact[name].to(table.device)] = False

    def run(indices: torch.Tensor) -> torch.Tensor:
        y = embedding(indices, table).to(dtype)
        own, real = rounded[indices].flatten(), counted(y)
        return collected.looked_up.watch(name, y, own if real is None else own & real)

    return run

"""Tuning by gradient: codebooks, row scales and reserved weights of all layers are moved so that the quantized model's
output comes closer to the unquantized model's. Codes stay, and with them the size.

The whole model is distilled at once, end to end (the last step of AQLM, arXiv 2401.06118, and PV-tuning, arXiv
2405.14852): the loss is the KL divergence of the logits, or the
error of the output for models that return vectors. A share of the calibration samples is held out; what is kept is the
best state on those, rounded to what the format stores, and never one that is worse than the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..algorithm.scales import round_codebook
from ..errors import CalibrationError, first_line
from ..format.layer import QuantizedLinear, assemble
from ..passes import LinearSite
from .data import Batch
from .gradients import DISTRIBUTIONS, DifferentiableGraph, LinearFunction, fast_dtype, multiply, pieces
from .padding import real_rows, real_tokens
from .progress import ProgressReporter

_ROWS_AT_ONCE = 256
"""Positions of logits whose divergence is computed together."""


@dataclass(frozen=True)
class TuneSettings:
    """How to tune.

    Attributes:
        steps: updates at most.
        minutes: time at most, checked after every update; None = no limit.
        samples: pieces of at most 256 tokens an update sees.
        rate: of Adam, in units of a column's largest centroid at 2 bits, of half and a quarter of it at 3 and 4 bits, at
            its height; it rises for the first twentieth of the updates or minutes, whichever end first, and falls to a
            twentieth along a cosine.
        row_rate: the same for row scales, in units of themselves.
        check: updates between two looks at the held-out samples.
        patience: looks without a gain after which tuning ends.
        held_out: pieces held out.
    """

    steps: int = 200
    minutes: float | None = None
    samples: int = 4
    rate: float = 2e-3
    row_rate: float = 1e-3
    check: int = 20
    patience: int = 3
    held_out: int = 8


@dataclass(frozen=True)
class TuneResult:
    """What tuning made.

    Attributes:
        layers: by site name; the given ones where nothing was gained.
        before, after: loss on the held-out samples, of the stored values both times.
        steps: updates done.
        seconds: time taken.
    """

    layers: dict[str, QuantizedLinear]
    before: float
    after: float
    steps: int
    seconds: float


@torch.inference_mode(False)
@torch.enable_grad()
def tune(
    graph_module: fx.GraphModule,
    sites: Sequence[LinearSite],
    layers: Mapping[str, QuantizedLinear],
    batches: Sequence[Batch],
    *,
    task: str | None,
    settings: TuneSettings,
    seed: int,
    reporter: ProgressReporter,
) -> TuneResult:
    """Tune all layers of a model together, whether the caller has gradients switched off or not.

    Args:
        graph_module: captured graph after the passes, with its original weights: the teacher.
        sites: where the layers stand. Embeddings, and heads tied to one, are as they are stored and stay so.
        layers: quantized layers by site name.
        batches: calibration inputs.
        task: decides the loss, see :data:`~claq_export.calibration.gradients.DISTRIBUTIONS`.
        settings: lengths and rates.
        seed: of the order of samples.
        reporter: told of every look at the held-out samples.

    Raises:
        CalibrationError: too few samples, or an operator of the graph has no gradient.
    """
    began = time.perf_counter()
    device = sites[0].weight(graph_module).device
    dtype = fast_dtype(device)
    # Autograd keeps no tensor that was made in inference mode.
    samples = [{name: _usable(value) for name, value in sample.items()} for sample in pieces(batches, task)]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(samples), generator=generator).tolist()
    held = max(1, min(settings.held_out, len(samples) // 8))
    if len(samples) <= held:
        raise CalibrationError(f"tuning needs more than {held} calibration samples, there are {len(samples)}")
    test, train = [samples[i] for i in shuffled[:held]], [samples[i] for i in shuffled[held:]]

    tuned: dict[str, TunedLayer] = {}
    linears: dict[fx.Node, LinearFunction] = {}
    for site in sites:
        if site.lookups:
            dense = layers[site.name].to(device).dequantize(site.dtype)
            linears |= dict.fromkeys(site.lookups, _rows(dense))
            linears |= dict.fromkeys(site.nodes, _product(dense.to(dtype)))
        else:
            tuned[site.name] = TunedLayer(layers[site.name].to(device), dtype)
            linears |= dict.fromkeys(site.nodes, tuned[site.name].run)
    student = DifferentiableGraph(graph_module, linears, dtype)
    teacher = DifferentiableGraph(graph_module, {}, dtype)
    pooled = task == "feature-extraction"

    def loss(sample: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(sample)
        found = student(sample)
        if not found:
            raise CalibrationError("tuning needs a model that returns floating tensors")
        real = real_tokens(sample)
        return (
            _divergence(found[0], wanted[0], real)
            if task in DISTRIBUTIONS
            else output_error(found, wanted, pooled, real)
        )

    @torch.no_grad()
    def look() -> float:
        for layer in tuned.values():
            layer.decode()
        return sum(float(loss(sample)) for sample in test) / len(test)

    optimizer = torch.optim.Adam(
        [
            {"params": [layer.table for layer in tuned.values()], "rate": settings.rate},
            {"params": [layer.row for layer in tuned.values()], "rate": settings.row_rate},
            {
                "params": [layer.kept for layer in tuned.values() if layer.kept.numel()],
                "rate": settings.rate,
            },
        ],
        betas=(0.9, 0.98),
        eps=1e-12,
    )
    before = best = look()
    kept = {name: layer.state() for name, layer in tuned.items()}
    order: list[int] = []
    patience, done = settings.patience, 0
    allowed = math.inf if settings.minutes is None else 60 * settings.minutes
    reporter.event("tuning", step=0, held_out=before)
    reporter.start_layers(settings.steps, "tuning")
    try:
        for step in range(settings.steps):
            for layer in tuned.values():
                layer.decode()
            total = 0.0
            for _ in range(settings.samples):
                if not order:
                    order = torch.randperm(len(train), generator=generator).tolist()
                value = _backward(loss(train[order.pop()]))
                total += value / settings.samples
            for layer in tuned.values():
                layer.collect()
            share = _schedule(max((step + 1) / settings.steps, (time.perf_counter() - began) / allowed))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.step()
            done = step + 1
            late = time.perf_counter() - began > allowed
            last = done == settings.steps or late
            if done % settings.check == 0 or last:
                current = look()
                reporter.event("tuning", step=done, held_out=current, train=total)
                if current < best:
                    best, patience = current, settings.patience
                    kept = {name: layer.state() for name, layer in tuned.items()}
                else:
                    patience -= 1
            reporter.layer(f"loss {total:.4f}, held out {best:.4f} (from {before:.4f})", phase="tuning")
            if last or patience == 0:
                break
    finally:
        reporter.finish_layers()
    result, after = dict(layers), before
    if best < before:
        for name, layer in tuned.items():
            layer.restore(kept[name])
        stored = {name: layer.store() for name, layer in tuned.items()}
        for name, layer in tuned.items():
            layer.load(stored[name])
        after = look()
        if after < before:
            result |= {name: layer.to("cpu") for name, layer in stored.items()}
        else:
            after = before
    return TuneResult(result, before, after, done, time.perf_counter() - began)


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _rows(weight: torch.Tensor) -> LinearFunction:
    return lambda indices: torch.nn.functional.embedding(indices, weight)


def _product(weight: torch.Tensor) -> LinearFunction:
    return lambda x: multiply(x, weight)


def _backward(loss: torch.Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise CalibrationError("the loss of tuning is not finite")
    try:
        loss.backward()
    except RuntimeError as error:
        raise CalibrationError(f"gradients cannot be had: {first_line(error)}") from error
    return value


def _schedule(done: float) -> float:
    """Height of the rates when the share ``done`` of the updates or, if less is left of it, of the time is over."""
    warm = 0.05
    if done < warm:
        return done / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm))))


class TunedLayer:
    """A quantized layer whose codebooks, row scales and reserved weights are parameters.

    The dense weight is decoded once an update (:meth:`decode`), gathers gradients over the samples of the update, and
    hands them to the parameters (:meth:`collect`): decoding costs as much as a product with a few dozen tokens.

    Args:
        layer: on the device to tune on.
        dtype: of the dense weight.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        self._layer = layer
        self._dtype = dtype
        K, device = layer.in_features, layer.scale.device
        feature = layer.feature_of_column()
        real = feature < K
        position = torch.empty(K, dtype=torch.int64, device=device)
        position[feature[real]] = torch.nonzero(real).flatten()
        self.bits = layer.column_bits()
        self._codes = layer.codes_by_column()[position]
        self._unit = torch.ones(K, device=device)
        self._row_unit = layer.row_scale.to(torch.float32)
        self._column, self._output = _outlier_places(layer, feature)
        self.table = torch.zeros(K, 16, device=device)
        self.row = torch.ones(layer.out_features, device=device)
        self.kept = torch.zeros(len(self._column), device=device)
        self._position = position
        self.load(layer)
        largest = (127 * layer.scale.to(torch.float32)[position]).clamp(min=1e-12)
        # Neighbouring centroids of wider codes lie closer together, and so do the steps of Adam.
        self._unit = largest * torch.exp2(2.0 - self.bits.to(largest))
        self.load(layer)
        self.weight = torch.zeros(0)

    @torch.no_grad()
    def load(self, layer: QuantizedLinear) -> None:
        """Set the parameters to what ``layer`` stores; its codes are those of this layer."""
        scale = layer.scale.to(torch.float32)[self._position]
        entries = _codebook_by_column(layer)[self._position] * (scale / self._unit)[:, None]
        self.table.copy_(entries)
        self.row.copy_(
            torch.where(self._row_unit == 0, 1.0, layer.row_scale.to(torch.float32) / self._row_unit.clamp(min=1e-30))
        )
        if len(self._column):
            codes = self._codes[self._column, self._output].to(torch.int64)
            added = layer.outlier_value.to(torch.float32) * (scale / self._unit)[self._column]
            self.kept.copy_(self.table[self._column, codes] + added)

    def _value(self) -> torch.Tensor:
        """float32 ``[K, N]``: decoded weights without the scales of rows and columns, as they would be stored."""
        peak = self.table.abs().amax(1, keepdim=True).clamp(min=1e-12)
        rounded = (self.table * (127 / peak)).round() * (peak / 127)
        value = rounded.gather(1, self._codes.to(torch.int64))
        if len(self._column):
            value[self._column, self._output] = self.kept
        return value

    @torch.no_grad()
    def decode(self) -> None:
        """Make :attr:`weight` ``[K, N]`` from the parameters."""
        dense = self._value() * self._unit[:, None] * (self.row * self._row_unit)
        self.weight = dense.to(self._dtype).requires_grad_()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T`` with the decoded weight."""
        return multiply(x, self.weight.T)

    @torch.no_grad()
    def collect(self) -> None:
        """Gradients of the parameters from that of the decoded weight, which is dropped. Rounding passes straight
        through; a layer that no sample used (an expert) has none."""
        gradient = self.weight.grad
        self.table.grad = self.row.grad = self.kept.grad = None
        if gradient is None:
            return
        pull = gradient.to(torch.float32) * self._unit[:, None]
        pull *= self._row_unit
        self.row.grad = (pull * self._value()).sum(0)
        pull *= self.row
        if len(self._column):
            self.kept.grad = pull[self._column, self._output]
            pull[self._column, self._output] = 0
        self.table.grad = torch.zeros_like(self.table).scatter_add_(1, self._codes.to(torch.int64), pull)
        self.weight = torch.zeros(0)

    def state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of the parameters."""
        return self.table.clone(), self.row.clone(), self.kept.clone()

    def restore(self, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Set the parameters to a :meth:`state`."""
        for parameter, value in zip((self.table, self.row, self.kept), state, strict=True):
            parameter.copy_(value)

    def store(self) -> QuantizedLinear:
        """The layer with the parameters rounded to the format."""
        layer = self._layer
        K, N = layer.in_features, layer.out_features
        unit = self._unit.cpu().numpy().astype(np.float64)
        table = self.table.cpu().numpy().astype(np.float64) * unit[:, None]
        kept = self.kept.cpu().numpy().astype(np.float64) * unit[self._column.cpu().numpy()]
        reach = np.zeros(K)
        np.maximum.at(reach, self._column.cpu().numpy(), np.abs(kept))
        integers = torch.zeros(K, 16, dtype=torch.int8)
        scale = np.zeros(K, dtype=np.float16)
        for k, width in enumerate(self.bits.tolist()):
            entries = 1 << width
            found, scale[k], _ = round_codebook(table[k, :entries], float(reach[k]))
            integers[k, :entries] = torch.from_numpy(found)
        outliers = None
        if len(kept):
            column, output = self._column.cpu(), self._output.cpu()
            codes = self._codes.cpu()[column, output].to(torch.int64)
            step = scale.astype(np.float64)[column.numpy()]
            added = np.divide(kept, step, out=np.zeros_like(kept), where=step > 0)
            added -= integers[column, codes].numpy()
            added = torch.from_numpy(added.astype(np.float32))
            # An outlier of zero would not be stored, and the next one would take its place.
            added[added == 0] = 2.0**-24
            outliers = torch.sparse_coo_tensor(torch.stack([output, column]), added, (N, K), check_invariants=True)
        row = (self.row * self._row_unit).clamp(-65504, 65504).to(torch.float16).cpu()
        return assemble(self._codes.cpu(), integers, torch.from_numpy(scale), row, self.bits, outliers).to(
            layer.scale.device
        )


def _codebook_by_column(layer: QuantizedLinear) -> torch.Tensor:
    """float32 ``[P, 16]``: the integers of each stored column, zeros past its ``2^b``."""
    found = torch.zeros(layer.stored_columns, 16, device=layer.scale.device)
    column = entry = 0
    for width, count in zip((4, 3, 2), layer.columns, strict=True):
        entries = count << width
        found[column : column + count, : 1 << width] = (
            layer.codebook[entry : entry + entries].view(count, 1 << width).float()
        )
        column, entry = column + count, entry + entries
    return found


def _outlier_places(layer: QuantizedLinear, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Input feature and output row of each reserved weight, as stored."""
    if not layer.outliers:
        nothing = torch.zeros(0, dtype=torch.int64, device=layer.scale.device)
        return nothing, nothing
    per_row = layer.outlier_ptr.to(torch.int64).diff()
    rows = torch.repeat_interleave(torch.arange(layer.out_features, device=per_row.device), per_row)
    return feature[layer.outlier_index.to(torch.int64)], rows


class _Divergence(torch.autograd.Function):
    """Mean KL divergence over positions; keeps its gradient, in the dtype of the logits, instead of distributions."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            theirs = wanted[rows].float().log_softmax(-1)
            ours = logits[rows].float().log_softmax(-1)
            probability = theirs.exp()
            # What the teacher rules out (a masked vocabulary has logits of -inf) adds nothing.
            terms = torch.where(probability == 0, 0.0, probability * (theirs - ours))
            total += terms.sum(dtype=torch.float64)
            gradient[rows] = ours.exp_().sub_(probability).div_(len(logits)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return (total / len(logits)).to(torch.float32)

    @staticmethod
    def backward(ctx, pull: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def, override]
        (gradient,) = ctx.saved_tensors
        return gradient * pull.to(gradient.dtype), None


def _divergence(logits: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over positions of KL(wanted || found), in nats.

    Args:
        logits, wanted: ``[..., classes]``.
        real: bool ``[batch, sequence]``, False for padding, which is left out; None: there is none.
    """
    classes = logits.shape[-1]
    counted = real_rows(logits.shape, real)
    ours, theirs = logits.reshape(-1, classes), wanted.reshape(-1, classes)
    if counted is not None:
        ours, theirs = ours[counted], theirs[counted]
    return _Divergence.apply(ours, theirs)


def output_error(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], pooled: bool, real: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error relative to the wanted outputs, mean over outputs.

    Args:
        found, wanted: outputs of both models.
        pooled: outputs ``[batch, sequence, features]`` also count by their mean over the sequence, which is what
            embeddings are made of.
        real: bool ``[batch, sequence]``, False for padding, which is left out; None: there is none.
    """
    terms = []
    for ours, theirs in zip(found, wanted, strict=True):
        pairs = [(ours.float(), theirs.float())]
        counted = real_rows(ours.shape, real)
        if counted is not None:
            counted = counted.to(ours.device).reshape(*ours.shape[:-1], 1)
            pairs = [(torch.where(counted, a, 0), torch.where(counted, b, 0)) for a, b in pairs]
        if pooled and ours.dim() == 3:
            pairs.append((_mean(pairs[0][0], counted), _mean(pairs[0][1], counted)))
        terms += [(a - b).square().sum() / b.square().sum().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(terms).mean()


def _mean(value: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Mean over the sequence of ``[batch, sequence, features]``, zero where ``counted`` ``[batch, sequence, 1]`` says padding."""
    return value.mean(1) if counted is None else value.sum(1) / counted.sum(1).clamp(min=1)

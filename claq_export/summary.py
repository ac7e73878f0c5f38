"""The tables the command line prints: the plan of a dry run, and what an export made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .api import ExportResult
from .config import NO_CALIBRATION, Config
from .passes import Skipped
from .passes.plan import site_kind
from .sizing import PlannedLayer

if TYPE_CHECKING:
    from .verify import VerificationReport

_WORST_SHOWN = 5
_UNEVEN = (2.0, 3.0)
"""Widths at which a budget of the same size was much nearer to the original (benchmarks/equal_size.py); at 4 bits it was not
everywhere."""


def megabytes(nbytes: float) -> str:
    """Bytes as a person reads them (decimal megabytes)."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e4 else f"{nbytes / 1e3:.2f} kB"


def print_plan(console: Console, layers: Sequence[PlannedLayer], skipped: Sequence[Skipped]) -> None:
    """The plan of a dry run: every layer with its predicted size, every weight left alone with the reason."""
    table = Table(title="to quantize", title_justify="left")
    for heading in ("layer", "out x in", "columns at 4 / 3 / 2 bits", "before", "after", "true bits", "nominal"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for layer in layers:
        table.add_row(
            Text(f"{layer.name} ({kind})" if (kind := site_kind(layer.role, layer.tied)) else layer.name),
            f"{layer.out_features} x {layer.in_features}",
            " / ".join(str(count) for count in layer.columns),
            megabytes(layer.dense_bytes),
            megabytes(layer.nbytes),
            f"{layer.true_bits:.3f}",
            f"{layer.nominal_bits:.3f}",
        )
    console.print(table)
    if skipped:
        left = Table(title="left alone", title_justify="left")
        left.add_column("weight", overflow="fold")
        left.add_column("shape", justify="right")
        left.add_column("size", justify="right")
        left.add_column("reason", overflow="fold")
        for entry in skipped:
            shape = " x ".join(map(str, entry.shape))
            left.add_row(Text(entry.name), shape, megabytes(entry.nbytes), Text(entry.reason))
        console.print(left)
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    dense = sum(layer.dense_bytes for layer in layers)
    nbytes = sum(layer.nbytes for layer in layers)
    if weights:
        console.print(
            f"{len(layers)} layers, {weights / 1e6:.1f} M weights: {megabytes(dense)} -> {megabytes(nbytes)} predicted, "
            f"{8 * nbytes / weights:.3f} true bits a weight",
            highlight=False,
        )


def print_result(console: Console, result: ExportResult) -> None:
    """Size, bits, error and latency of a finished export."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    weights = sum(layer.out_features * layer.in_features for layer in result.layers)
    nbytes = sum(layer.nbytes for layer in result.layers)
    ratio = result.original_bytes / result.artifact_bytes
    first, *others = result.artifact.models
    table.add_row("artifact", Text(", ".join([str(first), *(other.name for other in others)])))
    table.add_row(
        "size", f"{megabytes(result.original_bytes)} -> {megabytes(result.artifact_bytes)} ({ratio:.2f} times smaller)"
    )
    table.add_row("quantized", f"{len(result.layers)} layers, {weights / 1e6:.1f} M weights in {megabytes(nbytes)}")
    for layer in result.layers:
        kind = site_kind(layer.role, layer.tied)
        if kind:
            size = f"{layer.out_features} x {layer.in_features} in {megabytes(layer.nbytes)}"
            table.add_row(kind, Text(f"{layer.name}, {size}, {layer.true_bits:.3f} true bits a weight"))
    left = sum(entry.nbytes for entry in result.skipped)
    if result.skipped:
        table.add_row("left alone", f"{len(result.skipped)} weights, {megabytes(left)} (--dry-run tells why)")
    table.add_row("true bits", f"{result.true_bits:.3f} a weight (nominal {result.nominal_bits:.3f})")
    worst = sorted(result.layers, key=lambda layer: -layer.error)[:_WORST_SHOWN]
    table.add_row("worst layers", Text(", ".join(f"{layer.name} {layer.error:.1e}" for layer in worst)))
    table.add_row("time", _seconds(result.seconds))
    table.add_row("quantization", _seconds(result.quantization_seconds))
    console.print(table)
    for path, report in result.verifications.items():
        print_verification(console, report, path.name if others else "")


def print_tip(console: Console, config: Config, result: ExportResult) -> None:
    """After an export at 2 or 3 bits: the budget that makes a file of the same size.

    Args:
        console: where to.
        config: of the export. Nothing is printed where a budget was given, or could not be weighed by gradients.
        result: what came of it.
    """
    weighed = config.importance and config.guided is not False and config.calibration != NO_CALIBRATION
    if (
        config.budgeted
        or config.preset
        or config.outliers
        or config.algorithm
        or config.bits not in _UNEVEN
        or not weighed
    ):
        return
    budget = math.floor(100 * result.true_bits) / 100
    console.print(
        f"tip: --bits {budget:g} makes a file of this size that is usually much nearer to the original, by a budget over all "
        "layers that is spent where the model's output depends on it",
        highlight=False,
    )


def _seconds(spent: Mapping[str, float]) -> str:
    return ", ".join(f"{step} {seconds:.1f} s" for step, seconds in spent.items())


def print_verification(console: Console, report: VerificationReport, file: str = "") -> None:
    """Agreement of the runs, distance from the unquantized model, latencies; ``file`` is the model file's name, of several."""
    labels = {
        "original": "unquantized, ONNX Runtime",
        "stock": "artifact, ONNX Runtime alone",
        "runtime": "artifact, with claq-runtime",
        "runtime, fp32": "the same with CLAQ_ACCURACY=fp32",
    }
    if "runtime, fp32" in report.runs:
        labels["runtime"] += ", int8"
    title = f"{file} verified" if file else "verified"
    table = Table(title=f"{title} with ONNX Runtime {report.onnxruntime}", title_justify="left")
    for heading in ("run", "agrees with PyTorch within", "session", "latency"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name in labels:
        run = report.runs.get(name)
        if run is None:
            continue
        agreement = max((d.maximum for d in run.deviations.values()), default=math.nan)
        table.add_row(
            labels[name],
            "-" if math.isnan(agreement) else f"{agreement:.1e}",
            f"{run.load_seconds:.2f} s",
            "-" if math.isnan(run.latency_ms) else f"{run.latency_ms:.2f} ms",
        )
    console.print(table)
    if report.note:
        console.print(Text(report.note, style="yellow"))
    for output, deviation in report.fidelity.items():
        distance = f"cosine to the unquantized model {deviation.cosine:.4f}, relative error {deviation.rms:.4f}"
        console.print(Text(f"{output}: {distance}"))

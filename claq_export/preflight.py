"""What a run will need, before its first minute of work: memory, disk, time and the artifact's size."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .algorithm import LayerSettings, quantize_layer
from .algorithm.hessian import FEW
from .calibration.data import Batch
from .calibration.store import finished_bytes
from .config import Config
from .deferred import is_deferred, logical_bytes, materialize
from .errors import ConfigError, OutputError
from .passes import LinearSite
from .process_memory import resident_bytes
from .sizing import PlannedLayer

LAYER_BYTES_PER_WEIGHT = 9.5
"""Working memory of a layer's quantization, a weight: it in float32, the columns in float32 (whose place errors take), codes."""

BLOCK_BYTES = 13 * 512
"""The same for each output feature: three copies of the columns that are quantized at once, and their codes; and for each
input of a Hessian, whose rows are gathered as many at once."""

HESSIAN_BYTES_PER_ENTRY = 8.5
"""The same for each of the K x K entries of its Hessian: sums and the factor of the inverse, float32, and blocks of them."""

TOKEN_BYTES_PER_INPUT = 20.0
"""In the place of a Hessian of few tokens, for each input of each token: it twice in float32 and once in float64."""

REFINED_BYTES_PER_WEIGHT = 30.0
"""The working memory where columns are refined after the loop (descent, refits): decoded and wanted columns, products."""

REFINED_BYTES_PER_ENTRY = 12.0
"""More of it for each entry of the Hessian: the damped one in float64 and float32."""

TENSOR_COPIES = 2.2
"""Times the largest unquantized tensor is in memory while it is converted and written."""

EXPORTER_BYTES = 250 << 20
"""Grown by torch.export and the ONNX exporter themselves, seen on decoders of 20 layers."""

_SAMPLE_COLUMNS = 32


@dataclass(frozen=True)
class Preflight:
    """A prediction, in bytes and seconds.

    Attributes:
        memory: resident memory at the peak.
        activations: part of it that activations may take; more is spilled to disk.
        disk: written to the output and work folders together at the worst moment.
        artifact: of the ONNX files.
        seconds: of quantization, from a measured sample.
        work_disk: part of ``disk`` that is written to the work folder.
    """

    memory: int
    activations: int
    disk: int
    artifact: int
    seconds: float
    work_disk: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"predicted: {_gigabytes(self.memory)} of memory at the peak, {_gigabytes(self.disk)} on disk while it runs, "
            f"an artifact of {_gigabytes(self.artifact)}, about {_duration(self.seconds)} of quantization"
        )


def predict_resources(
    graph: nn.Module,
    sites: Sequence[LinearSite],
    batches: Sequence[Batch] | None,
    settings: LayerSettings,
    layers: Sequence[PlannedLayer],
    other_bytes: int,
    limit: int,
) -> Preflight:
    """Predict what a run with a memory limit needs.

    Args:
        graph: the captured graph.
        sites: what is quantized.
        batches: calibration batches; None = no calibration.
        settings: the algorithm's switches.
        layers: predicted sizes of what becomes of the sites.
        other_bytes: of the artifact, beside its layers.
        limit: bytes of resident memory.
    """
    tokens = _tokens(batches)
    layer = max((layer_bytes(site, tokens, settings) for site in sites), default=0)
    others = [logical_bytes(tensor) for tensor in (*graph.parameters(), *graph.buffers())]
    planned = {site.weight_target for site in sites}
    largest = max(
        (logical_bytes(p) for name, p in graph.named_parameters() if name not in planned),
        default=max(others, default=0),
    )
    base = resident_bytes()
    kept = _kept_bytes(sites, layers, calibrated=batches is not None)
    fixed = base + kept + max(int(layer), int(TENSOR_COPIES * largest) + EXPORTER_BYTES)
    activations = max(limit - fixed, 0)
    quantized_bytes = sum(planned.nbytes for planned in layers)
    artifact = quantized_bytes + other_bytes
    held = _activation_bytes(sites, batches)
    work_disk = quantized_bytes + max(0, held - activations)
    return Preflight(
        memory=fixed + min(activations, held),
        activations=activations,
        # The layers of the work folder, the ONNX data, the PyTorch container, and what is spilled.
        disk=work_disk + 2 * artifact,
        artifact=artifact,
        seconds=_quantization_seconds(graph, sites, settings, tokens),
        work_disk=work_disk,
    )


def check_settings(config: Config, *, memory: int | None, report: object = None) -> None:
    """Refuse settings that contradict a limit on memory.

    Args:
        config: the settings.
        memory: bytes of resident memory the run may take; None = no limit.
        report: anything but None: a report is wanted.

    Raises:
        ConfigError: see above.
    """
    if memory is None:
        return
    if len(config.devices) > 1:
        raise ConfigError("--memory is kept for one layer at a time; give one device")
    if report is not None or config.tune is not None:
        raise ConfigError("a report and tuning need the unquantized weights in memory; leave them or --memory out")
    if config.guided:
        raise ConfigError("--guided needs the whole model in memory; leave it or --memory out")


def check_processes(config: Config, memory: int | None) -> None:
    """Refuse what several processes cannot do together; arguments as :func:`check_settings` has them.

    Raises:
        ConfigError: see above.
    """
    if memory is not None:
        raise ConfigError("several processes keep their finished layers in memory; leave --memory out")
    if config.guided:
        raise ConfigError("--guided needs one process; leave it out with torchrun")


def check(preflight: Preflight, limit: int, out: Path, work: Path | None = None) -> None:
    """Refuse a run that cannot fit.

    Args:
        preflight: what is needed.
        limit: bytes of resident memory.
        out: the model file.
        work: folder of finished layers; those that an interrupted run left are not needed again. None: beside ``out``.

    Raises:
        ConfigError: more memory is needed than ``limit``.
        OutputError: more disk than there is.
    """
    if preflight.memory > limit:
        raise ConfigError(
            f"--memory {_gigabytes(limit)} is not enough: the largest layer and the process itself need "
            f"{_gigabytes(preflight.memory)} at the peak"
        )
    layers = work or out.parent
    needed = {out.parent: preflight.disk - preflight.work_disk}
    if _existing(layers).stat().st_dev == _existing(out.parent).stat().st_dev:
        layers = out.parent
    needed[layers] = needed.get(layers, 0) + preflight.work_disk - (0 if work is None else finished_bytes(work))
    for folder, size in needed.items():
        free = shutil.disk_usage(_existing(folder)).free
        if size > free:
            raise OutputError(
                f"the run needs {_gigabytes(size)} of disk for {str(folder)!r}, {_gigabytes(free)} are free"
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _tokens(batches: Sequence[Batch] | None) -> int:
    """Tokens of all batches."""
    return sum(max((tensor.numel() for tensor in batch.values()), default=0) for batch in batches or [])


def layer_bytes(site: LinearSite, tokens: int, settings: LayerSettings) -> float:
    """Working memory of a layer's quantization; ``tokens`` = 0 without calibration."""
    K, N = site.in_features, site.out_features
    refined = bool(settings.descent or settings.refit_codebook or settings.refit_row_scale)
    weight = (REFINED_BYTES_PER_WEIGHT if refined and tokens else LAYER_BYTES_PER_WEIGHT) * K * N
    if tokens and site.nodes:
        few = tokens * FEW <= K and not refined
        few_bytes = tokens * (TOKEN_BYTES_PER_INPUT * K + 4 * N)
        an_entry = HESSIAN_BYTES_PER_ENTRY + (REFINED_BYTES_PER_ENTRY if refined else 0.0)
        weight += few_bytes if few else an_entry * K**2 + BLOCK_BYTES * K
    return weight + BLOCK_BYTES * N


def _kept_bytes(sites: Sequence[LinearSite], layers: Sequence[PlannedLayer], calibrated: bool) -> int:
    """What stays in memory of layers that are finished: all of those that are looked up while the walk lasts, of the others
    codebooks, scales and order."""
    looked_up = {site.name for site in sites if site.lookups} if calibrated else set()
    whole = sum(layer.nbytes for layer in layers if layer.name in looked_up)
    return whole + sum(
        20 * layer.in_features + 2 * layer.out_features for layer in layers if layer.name not in looked_up
    )


def _activation_bytes(sites: Sequence[LinearSite], batches: Sequence[Batch] | None) -> int:
    """What all batches hold between two layers: the residual stream and the widest layer's input and output."""
    if batches is None or not sites:
        return 0
    tokens = _tokens(batches)
    widest = max(site.in_features + site.out_features for site in sites)
    return 4 * tokens * (widest + 2 * min(site.in_features for site in sites))


def _quantization_seconds(graph: nn.Module, sites: Sequence[LinearSite], settings: LayerSettings, tokens: int) -> float:
    """From a few columns, the smallest weight and a matrix product timed now; ``tokens`` = 0 without calibration."""
    if not sites:
        return 0.0
    rows = max(site.out_features for site in sites)
    weight = torch.randn(rows, _SAMPLE_COLUMNS, generator=torch.Generator().manual_seed(0))
    quantize_layer(weight[:, :1].repeat(1, _SAMPLE_COLUMNS), None, settings)  # warms up
    start = time.perf_counter()
    layer = quantize_layer(weight, None, settings).layer
    if tokens:
        layer.dequantize()  # for the layers after it
    a_weight = (time.perf_counter() - start) / weight.numel()
    weights = sum(site.in_features * site.out_features for site in sites)
    seconds = (a_weight + _read_seconds(graph, sites)) * weights
    if tokens:
        size = 768
        matrix = torch.ones(size, size)
        matrix @ matrix
        start = time.perf_counter()
        matrix @ matrix
        a_product = (time.perf_counter() - start) / size**3
        seconds += a_product * sum(_products(site, tokens) for site in sites if site.nodes)
    return seconds


def _read_seconds(graph: nn.Module, sites: Sequence[LinearSite]) -> float:
    """Of reading a weight from disk, checking and converting it, taken on the smallest layer that has a stand-in."""
    deferred = [site for site in sites if is_deferred(site.weight(graph))]
    if not deferred:
        return 0.0
    site = min(deferred, key=lambda site: site.in_features * site.out_features)
    start = time.perf_counter()
    materialize(site.weight(graph).detach()).to(torch.float32)
    return (time.perf_counter() - start) / (site.in_features * site.out_features)


def _products(site: LinearSite, tokens: int) -> float:
    """Multiply-adds of a calibrated layer: forward pass, Hessian, factor, error feedback."""
    K, N = site.in_features, site.out_features
    if tokens * FEW <= K:
        # T x T matrices in float64, which counts twice, for every block of columns.
        return tokens * N * K * 3 + K / 512 * 2 * tokens**2 * (tokens / 3 + 3 * 512)
    return tokens * (N * K + K**2 / 2) + K**3 * 2 / 3 + N * K**2 / 2


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"

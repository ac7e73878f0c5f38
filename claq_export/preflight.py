"""What a run will need, before its first minute of work: memory, disk, time and the artifact's size."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .algorithm import LayerSettings, quantize_layer
from .calibration.data import Batch
from .deferred import logical_bytes
from .errors import ConfigError, OutputError
from .passes import LinearSite

LAYER_BYTES_PER_WEIGHT = 24.0
"""Working memory of a layer's quantization, a weight, seen at 4 bits (float32 copies, codes, packing)."""

HESSIAN_BYTES_PER_ENTRY = 44.0
"""The same for each of the K x K entries of its Hessian: float32 sums, float64 factorization and its inverse."""

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
    """

    memory: int
    activations: int
    disk: int
    artifact: int
    seconds: float

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
    quantized_bytes: int,
    other_bytes: int,
    limit: int,
) -> Preflight:
    """Predict what a run with a memory limit needs.

    Args:
        graph: the captured graph.
        sites: what is quantized.
        batches: calibration batches; None = no calibration.
        settings: the algorithm's switches.
        quantized_bytes, other_bytes: of the artifact: its layers, and everything else.
        limit: bytes of resident memory.
    """
    layer = max((_layer_bytes(site, batches is not None) for site in sites), default=0)
    others = [logical_bytes(tensor) for tensor in (*graph.parameters(), *graph.buffers())]
    planned = {site.weight_target for site in sites}
    largest = max(
        (logical_bytes(p) for name, p in graph.named_parameters() if name not in planned),
        default=max(others, default=0),
    )
    base = resident_bytes()
    fixed = base + max(int(layer), int(TENSOR_COPIES * largest) + EXPORTER_BYTES)
    activations = max(limit - fixed, 0)
    artifact = quantized_bytes + other_bytes
    held = _activation_bytes(sites, batches)
    return Preflight(
        memory=fixed + min(activations, held),
        activations=activations,
        # The layers of the work folder, the ONNX data, the PyTorch container, and what is spilled.
        disk=quantized_bytes + 2 * artifact + max(0, held - activations),
        artifact=artifact,
        seconds=_quantization_seconds(sites, settings, batches is not None),
    )


def check(preflight: Preflight, limit: int, out: Path) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ConfigError: more memory is needed than ``limit``.
        OutputError: more disk than there is.
    """
    if preflight.memory > limit:
        raise ConfigError(
            f"--memory {_gigabytes(limit)} is not enough: the largest layer and the process itself need "
            f"{_gigabytes(preflight.memory)} at the peak"
        )
    free = shutil.disk_usage(out.parent).free
    if preflight.disk > free:
        raise OutputError(
            f"the run needs {_gigabytes(preflight.disk)} of disk for {str(out.parent)!r}, {_gigabytes(free)} are free"
        )


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak so far stands for it
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The operating system's count of this process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _layer_bytes(site: LinearSite, calibrated: bool) -> float:
    hessian = HESSIAN_BYTES_PER_ENTRY * site.in_features**2 if calibrated else 0.0
    return LAYER_BYTES_PER_WEIGHT * site.in_features * site.out_features + hessian


def _activation_bytes(sites: Sequence[LinearSite], batches: Sequence[Batch] | None) -> int:
    """What all batches hold between two layers: the residual stream and the widest layer's input and output."""
    if batches is None or not sites:
        return 0
    tokens = sum(max((tensor.numel() for tensor in batch.values()), default=0) for batch in batches)
    widest = max(site.in_features + site.out_features for site in sites)
    return 4 * tokens * (widest + 2 * min(site.in_features for site in sites))


def _quantization_seconds(sites: Sequence[LinearSite], settings: LayerSettings, calibrated: bool) -> float:
    """From a few columns quantized now, and one factorization where Hessians are used."""
    if not sites:
        return 0.0
    rows = max(site.out_features for site in sites)
    weight = torch.randn(rows, _SAMPLE_COLUMNS, generator=torch.Generator().manual_seed(0))
    quantize_layer(weight[:, :1].repeat(1, _SAMPLE_COLUMNS), None, settings)  # warms up
    start = time.perf_counter()
    quantize_layer(weight, None, settings)
    a_weight = (time.perf_counter() - start) / weight.numel()
    seconds = a_weight * sum(site.in_features * site.out_features for site in sites)
    if calibrated:
        size = 512
        matrix = torch.eye(size, dtype=torch.float64)
        start = time.perf_counter()
        torch.linalg.cholesky(matrix)
        torch.linalg.solve_triangular(matrix, matrix, upper=False)
        a_cube = (time.perf_counter() - start) / size**3
        # Error feedback updates each layer's remaining columns: as many multiplications as weights times columns.
        seconds += sum(a_cube * site.in_features**2 * (site.in_features + site.out_features / 2) for site in sites)
    return seconds


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"

"""What users call, on the GPU: torch.ops.claq.*, quantized modules in CUDA graphs, and torch.compile(backend="claq")."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from layers import BOUNDS, arguments, layer_of
from machine import Machine, reason_of
from torch import nn

from claq_export import Config, quantize
from claq_export.format.layer import QuantizedLinear
from claq_export.kernels import ops

COMPILED_BOUND = 2e-2
"""Largest difference of a compiled model to the same quantized modules in eager mode, as a share of the largest output,
in float16: Inductor rounds between operators elsewhere than eager code."""


def operators(machine: Machine, found: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append a finding for each way to ``found``; ``save`` is called after each. An error is a finding, too."""
    for what, error in (*_products(machine), *_rows(machine), *_models(machine)):
        entry: dict[str, Any] = {"what": what}
        try:
            largest, bound = error()
            entry |= {"error": largest, "passed": largest <= bound}
        except Exception as failure:  # of CUDA, Triton, Dynamo or Inductor
            entry |= {"passed": False, "failure": reason_of(failure)}
        found.append(entry)
        print(entry, flush=True)
        save()


Finding = tuple[str, Callable[[], tuple[float, float]]]


def _share(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def _layer(machine: Machine, outliers: float) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer and its dense weight in float64, both on the device."""
    features = (70, 37) if machine.dry else (1000, 777)
    layer = layer_of(*features, (2, 3, 4), outliers)
    return layer.to(machine.device), layer.dequantize().to(machine.device).double()


def _products(machine: Machine) -> Iterator[Finding]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for vectors in (1, 5) if machine.dry else (1, 8, 64, 600):
            for outliers in (0.0, 0.01):

                def error(
                    dtype: torch.dtype = dtype, vectors: int = vectors, outliers: float = outliers
                ) -> tuple[float, float]:
                    layer, dense = _layer(machine, outliers)
                    x = torch.randn(vectors, layer.in_features, device=machine.device).to(dtype)
                    bias = torch.randn(layer.out_features, device=machine.device).to(dtype)
                    with torch.inference_mode():
                        got = ops.linear(*arguments(layer, x, bias), 0)
                    return _share(got, x.double() @ dense.T + bias.double()), BOUNDS[dtype]

                yield f"claq::linear, {dtype}, {vectors} rows, {outliers:.0%} outliers", error


def _rows(machine: Machine) -> Iterator[Finding]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):

        def error(dtype: torch.dtype = dtype) -> tuple[float, float]:
            layer, dense = _layer(machine, 0.01)
            ids = torch.randint(-layer.out_features, layer.out_features, (3, 7), device=machine.device)
            like = torch.zeros(0, dtype=dtype, device=machine.device)
            sizes = (layer.in_features, layer.out_features, list(layer.columns))
            rows = ops.embedding(ids, *layer.tensors().values(), like, *sizes)
            return (0.0 if torch.equal(rows, dense.float()[ids].to(dtype)) else float("inf")), 0.0

        yield f"claq::embedding, {dtype}", error


def _models(machine: Machine) -> Iterator[Finding]:
    width = 32 if machine.dry else 512
    dtype = torch.float32 if machine.dry else torch.float16  # the CPU kernels' own, or the GPU's
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).eval()
    model = model.to(machine.device, dtype).requires_grad_(False)
    inputs = [torch.randn(rows, width, device=machine.device, dtype=dtype) for rows in (2, 5)]

    def in_place() -> nn.Module:
        return quantize(copy.deepcopy(model), (inputs[0],), Config(calibration="none"))

    def compiled() -> tuple[float, float]:
        expected = in_place()
        run = torch.compile(model, backend="claq", fullgraph=True, dynamic=True, options={"calibration": "none"})
        return max(_share(run(x), expected(x)) for x in inputs), COMPILED_BOUND

    def replayed() -> tuple[float, float]:
        module, x = in_place(), inputs[0].clone()
        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                module(x)  # kernels are compiled and checked outside of the graph
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = module(x)
            other = torch.randn_like(x)
            x.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
            return _share(y, module(other)), 0.0

    yield "torch.compile(backend='claq'), two batch sizes", compiled
    if not machine.dry:
        yield "quantized modules in a CUDA graph", replayed

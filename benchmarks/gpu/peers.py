"""What our products are timed beside: cuBLAS, torch's int4 kernel (torchao's), GemLite. Each says why where it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from machine import Machine, reason_of

Times = dict[int, float] | str
"""Seconds by number of vectors, or why there are none."""


def cublas(machine: Machine, in_features: int, out_features: int, vectors: Iterable[int]) -> dict[int, float]:
    """Seconds of a bf16 matrix product, weights rotating."""
    count = machine.sizes.copies(in_features * out_features * 2)
    weights = [
        torch.randn(out_features, in_features, device=machine.device, dtype=torch.bfloat16) * 0.02 for _ in range(count)
    ]
    times = {}
    for m in vectors:
        x = torch.randn(m, in_features, device=machine.device, dtype=torch.bfloat16)
        times[m] = machine.seconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], graph=True)
    return times


def torch_int4(machine: Machine, in_features: int, out_features: int, vectors: Iterable[int]) -> Times:
    """Seconds of torch's 4-bit kernel (groups of 128), which torchao's int4 weights run on."""
    count = machine.sizes.copies(in_features * out_features // 2)
    try:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(
                torch.randint(0, 256, (out_features, in_features // 2), device=machine.device, dtype=torch.uint8), 8
            )
            for _ in range(count)
        ]
        scales = torch.rand(in_features // 128, out_features, 2, device=machine.device, dtype=torch.bfloat16)
        times = {}
        for m in vectors:
            x = torch.randn(m, in_features, device=machine.device, dtype=torch.bfloat16)
            calls = [lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in packed]
            times[m] = machine.seconds(calls, graph=True)
    except (RuntimeError, NotImplementedError) as failure:
        return reason_of(failure)
    return times


def gemlite(machine: Machine, in_features: int, out_features: int, vectors: Iterable[int]) -> Times:
    """Seconds of GemLite's 4-bit kernel (groups of 128)."""
    if machine.dry:
        return "a dry run has no GPU"
    if find_spec("gemlite") is None:
        return "gemlite is not installed"
    try:
        from gemlite.core import DType, GemLiteLinear

        count = machine.sizes.copies(in_features * out_features // 2)
        layers = []
        for _ in range(count):
            layer = GemLiteLinear(
                4,
                group_size=128,
                in_features=in_features,
                out_features=out_features,
                input_dtype=DType.BF16,
                output_dtype=DType.BF16,
            )
            codes = torch.randint(0, 16, (out_features, in_features), device=machine.device, dtype=torch.uint8)
            scales = torch.rand(out_features, in_features // 128, device=machine.device, dtype=torch.bfloat16)
            layer.pack(codes, scales, torch.full_like(scales, 8), None)
            layers.append(layer)
        times = {}
        for m in vectors:
            x = torch.randn(m, in_features, device=machine.device, dtype=torch.bfloat16)
            times[m] = machine.seconds([lambda layer=layer, x=x: layer(x) for layer in layers], graph=True)
    except Exception as failure:  # somebody else's kernels: whatever stops them is what the table says
        return reason_of(failure)
    return times

"""HQQ, half-quadratic quantization (Badri and Shaji, 2023), after ``optimize_weights_proximal_legacy`` of the package
hqq.

Zero points are fitted by a half-quadratic splitting with an l_0.7 penalty on the error; no calibration data. Scale and
zero point are float16 here (the package's 8-bit meta quantization is off).
"""

from __future__ import annotations

import torch

from .common import Quantized


def _shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    return x.sign() * (x.abs() - x.abs().clamp(min=1e-12).pow(p - 1) / beta).relu()


def hqq(
    weight: torch.Tensor,
    bits: int,
    group: int,
    steps: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> Quantized:
    """Groups of ``group`` neighbouring inputs; a rest of a row is a smaller group."""
    N, K = weight.shape
    top = 2**bits - 1
    parts = []
    for part in weight.split(group, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        inverse = (top / (high - low)).clamp(max=2e4)
        zero = -low * inverse
        if bits == 4:
            zero = zero.round()
        best, kept, b = float("inf"), zero, beta
        for _ in range(steps):
            codes = (part * inverse + zero).round().clamp(0, top)
            decoded = (codes - zero) / inverse
            error = _shrink(part - decoded, b, p)
            zero = (codes - (part - error) * inverse).mean(1, keepdim=True)
            b *= kappa
            current = float((part - decoded).abs().mean())
            if current >= best:
                break
            best, kept = current, zero
        scale, zero = (1 / inverse).half().float(), kept.half().float()
        codes = (part / scale + zero).round().clamp(0, top)
        parts.append((codes - zero) * scale)
    groups = -(-K // group)
    return Quantized(torch.cat(parts, 1), N * K * bits + N * groups * 32)

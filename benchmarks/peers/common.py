"""What a peer's quantizer returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes:
        weight: float32 ``[N, K]``, dequantized.
        bits: everything stored for it, in bits: codes, scales, zero points, codebooks, indices.
    """

    weight: torch.Tensor
    bits: float

"""What the walks hand to a peer's quantizer, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes:
        weight: float32 ``[N, K]``, dequantized.
        bits: everything stored for it, in bits: codes, scales, zero points, codebooks, indices.
    """

    weight: torch.Tensor
    bits: float


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same input, such as q/k/v.

    Attributes:
        name: such as ``3.qkv``.
        linears: by name; their weights, stacked, are what is quantized.
        scale_folds: whether a scale of the input folds into what comes before (AWQ).
        frozen_rows: first rows that belong to q and k.
    """

    name: str
    linears: dict[str, nn.Linear]
    scale_folds: bool = True
    frozen_rows: int = 0

    def stacked(self) -> torch.Tensor:
        return torch.cat([linear.weight.data for linear in self.linears.values()])

    def assign(self, weight: torch.Tensor) -> None:
        rows = [linear.out_features for linear in self.linears.values()]
        for linear, part in zip(self.linears.values(), weight.split(rows), strict=True):
            linear.weight.data.copy_(part)


@dataclass
class Inputs:
    """What a group reads, over all calibration tokens: X^T X ``[K, K]``, sum of ``|x|`` ``[K]``, and how many
    tokens."""

    hessian: torch.Tensor
    magnitude: torch.Tensor
    tokens: int = 0

    @classmethod
    def of(cls, values: list[torch.Tensor]) -> Inputs:
        K = values[0].shape[-1]
        inputs = cls(torch.zeros(K, K), torch.zeros(K))
        for value in values:
            x = value.reshape(-1, K)
            inputs.hessian.addmm_(x.T, x)
            inputs.magnitude += x.abs().sum(0)
            inputs.tokens += len(x)
        inputs.magnitude /= inputs.tokens
        return inputs

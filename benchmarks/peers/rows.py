"""SqueezeLLM (Kim et al., arXiv 2306.07629): a codebook a row by k-means weighted with the squared gradient of the
loss.

Dense-and-sparse keeps the given shares of largest and of most sensitive weights in float16 with 16-bit column indices,
out of the clustering. Codebooks are float16. The Lloyd iteration starts from weighted quantiles (the authors:
scikit-learn).
"""

from __future__ import annotations

import torch

from .common import Quantized

LARGEST_SHARE = 8 / 9  # of the sparse weights; the authors' 0.40 % by size and 0.05 % by sensitivity


def _weighted_codebooks(weight: torch.Tensor, sensitivity: torch.Tensor, entries: int, steps: int) -> torch.Tensor:
    """Weighted 1-D k-means of each row: ``[N, entries]``."""
    value, order = weight.sort(1)
    mass = sensitivity.gather(1, order).double()
    mass_sum = torch.cat([torch.zeros(len(mass), 1, dtype=torch.float64), mass.cumsum(1)], 1)
    value_sum = torch.cat([torch.zeros(len(mass), 1, dtype=torch.float64), (mass * value).cumsum(1)], 1)
    # The cube root of the density-like mass spreads the first centroids as an optimal quantizer would.
    spread = mass.pow(1 / 3).cumsum(1)
    wanted = (torch.arange(entries) + 0.5) / entries * spread[:, -1:]
    codebook = value.gather(1, torch.searchsorted(spread, wanted).clamp(max=value.shape[1] - 1)).double()
    ends = torch.full((len(value), 1), value.shape[1])
    for _ in range(steps):
        border = torch.searchsorted(value, ((codebook[:, 1:] + codebook[:, :-1]) / 2).float().contiguous())
        border = torch.cat([torch.zeros_like(ends), border, ends], 1)
        cell = mass_sum.gather(1, border).diff(dim=1)
        mean = value_sum.gather(1, border).diff(dim=1) / cell.clamp(min=1e-300)
        fresh = torch.where(cell > 0, mean, codebook).sort(1).values
        if torch.equal(fresh, codebook):
            break
        codebook = fresh
    return codebook.half().float()


def squeezellm(
    weight: torch.Tensor, fisher: torch.Tensor, bits: int, sparse: float = 0.0, steps: int = 100
) -> Quantized:
    """``fisher``: summed squared gradients ``[N, K]``; ``sparse``: share of weights kept apart."""
    N, K = weight.shape
    sensitivity = fisher + 1e-6 * fisher.mean() + 1e-30
    keep = torch.zeros(N * K, dtype=torch.bool)
    if sparse:
        keep[weight.abs().flatten().topk(round(sparse * LARGEST_SHARE * N * K)).indices] = True
        rest = sensitivity.flatten().clone()
        rest[keep] = 0
        keep[rest.topk(round(sparse * (1 - LARGEST_SHARE) * N * K)).indices] = True
    keep = keep.view(N, K)
    codebook = _weighted_codebooks(weight, torch.where(keep, torch.zeros(()), sensitivity), 2**bits, steps)
    border = (codebook[:, 1:] + codebook[:, :-1]) / 2
    quantized = codebook.gather(1, torch.searchsorted(border.contiguous(), weight.contiguous()))
    quantized = torch.where(keep, weight.half().float(), quantized)
    kept = int(keep.sum())
    return Quantized(quantized, N * K * bits + N * 2**bits * 16 + (kept * 32 + (N + 1) * 32 if kept else 0))

"""Matrix products in float32 by the faster of the libraries that torch carries.

torch multiplies float32 matrices on the CPU by MKL, which on AMD processors uses half of the vector width: oneDNN, which
torch brings along as well, takes half the time there and the same elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

_GRAM_BLOCK = 192
_ENOUGH = 1 << 20
"""Multiply-adds from which oneDNN's preparations pay."""


def _onednn() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR = _onednn()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x[..., K] @ weight[N, K]^T + bias``, as ``torch.nn.functional.linear`` up to the order of sums.

    What oneDNN is not for (another device or type, few products, gradients) goes the usual way.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        _LINEAR is not None
        and torch.backends.mkldnn.enabled
        and x.numel() * weight.shape[0] >= _ENOUGH
        and all(
            tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.layout == torch.strided
            for tensor in tensors
        )
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        product: torch.Tensor = _LINEAR(x.contiguous(), weight.contiguous(), bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def add_gram(matrix: torch.Tensor, rows: torch.Tensor, factor: torch.Tensor | None = None) -> None:
    """Add ``R^T @ R`` to a symmetric matrix in place, R being the rows times their factors; it stays exactly symmetric.

    On the CPU only the blocks on and above the diagonal are computed, and no second matrix of K x K is made.

    Args:
        matrix: float32 ``[K, K]``, symmetric.
        rows: float32 ``[T, K]``.
        factor: float32 ``[T]``; None = 1.
    """
    if rows.device.type != "cpu":
        scaled = rows if factor is None else rows * factor[:, None]
        matrix.addmm_(scaled.T, scaled)
        return
    columns = torch.empty(rows.shape[1], rows.shape[0], dtype=rows.dtype)
    if factor is None:
        columns.copy_(rows.T)
    else:
        torch.mul(rows.T, factor, out=columns)
    for start in range(0, len(columns), _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        matrix[start:stop, start:] += linear(columns[start:stop], columns[start:])
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T

"""Round-to-nearest and GPTQ on a uniform grid, per row or in groups, asymmetric: what ONNX Runtime's MatMulNBits
stores.

A group keeps a float16 scale and a zero point of the code's width. Nothing is counted for padding a row to whole
groups, although MatMulNBits stores it. GPTQ follows Frantar et al. (arXiv 2210.17323) and the authors' gptq.py: damping
of 1 % of the mean diagonal, blocks of 128 columns, optional act-order, its groups either formed along that order or
("static groups") those of the stored columns.
"""

from __future__ import annotations

import torch

from .common import Quantized


def grid(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float16-rounded) and zero point of each row's min-max grid: ``[N, 1]`` each. The range always holds 0."""
    low = weight.amin(-1, keepdim=True).clamp(max=0)
    high = weight.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, top)


def snap(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest grid points."""
    return scale * ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def stored_bits(rows: int, columns: int, bits: int, group: int | None, act_order: bool = False) -> float:
    """Codes, scales, zero points; with act-order in groups also g_idx, 16 bits a column."""
    groups = 1 if group is None else -(-columns // group)
    order = 16 * columns if act_order and group is not None else 0
    return rows * columns * bits + rows * groups * (16 + bits) + order


def round_to_nearest(weight: torch.Tensor, bits: int, group: int | None) -> Quantized:
    """Min-max grid a group of ``group`` neighbouring inputs (None: a row)."""
    N, K = weight.shape
    parts = [snap(part, *grid(part, bits), bits) for part in weight.split(group or K, dim=1)]
    return Quantized(torch.cat(parts, 1), stored_bits(N, K, bits, group))


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group: int | None,
    act_order: bool = True,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> Quantized:
    """GPTQ with error feedback; ``hessian`` is X^T X ``[K, K]`` in any scale.

    With ``static_groups`` a group is ``group`` neighbouring inputs, its grid that of the original weights; without, it
    is ``group`` columns in the order of quantization, its grid that of the weights when its first column is reached.
    """
    N, K = weight.shape
    W, H = weight.clone(), hessian.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    W[:, dead] = 0
    order = diagonal.argsort(descending=True) if act_order else torch.arange(K)
    static = [grid(part, bits) for part in W.split(group, dim=1)] if group is not None and static_groups else None
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    U = torch.linalg.cholesky(inverse, upper=True).float()
    Q = torch.empty_like(W)
    scale, zero = grid(W, bits)
    for start in range(0, K, block):
        stop = min(start + block, K)
        errors = torch.empty(N, stop - start)
        for j in range(start, stop):
            if group is not None and static is not None:
                scale, zero = static[int(order[j]) // group]
            elif group is not None and j % group == 0:
                # As in the authors' code, a group's grid is fitted when its first column is reached.
                scale, zero = grid(W[:, j : j + group], bits)
            w = W[:, j : j + 1]
            q = snap(w, scale, zero, bits)
            Q[:, j : j + 1] = q
            error = (w - q) / U[j, j]
            W[:, j:stop] -= error * U[j, j:stop]
            errors[:, j - start] = error[:, 0]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    dense = torch.empty_like(Q)
    dense[:, order] = Q
    return Quantized(dense, stored_bits(N, K, bits, group, act_order and not static_groups))

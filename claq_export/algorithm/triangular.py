"""Factorization and inverse of large matrices in place, in blocks, where a second matrix of that size would not fit beside
them.

Nearly all of the work are products of a few hundred rows with thousands, which run at the speed of a matrix product;
LAPACK's factorization by MKL gets half of that on AMD processors.
"""

from __future__ import annotations

import torch

_BLOCK = 256
_ROWS_AT_ONCE = 1024


def factor_upper(matrix: torch.Tensor) -> bool:
    """Replace a symmetric matrix by the upper triangular R with ``R R^T`` = matrix.

    Column blocks are finished from the last to the first: what the finished ones contribute is subtracted, the corner is
    factorized (in float64), the rows above it are divided by it.

    Args:
        matrix: float ``[K, K]``; only its upper triangle is read, the lower one is set to zero.

    Returns:
        False if the matrix is not positive definite in its precision; its content is undefined then.
    """
    size = matrix.shape[0]
    for start in range((size - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        stop = min(size, start + _BLOCK)
        if stop < size:
            finished = matrix[start:stop, stop:].T
            for row in range(0, stop, _ROWS_AT_ONCE):
                end = min(stop, row + _ROWS_AT_ONCE)
                matrix[row:end, start:stop].addmm_(matrix[row:end, stop:], finished, alpha=-1)
        corner = matrix[start:stop, start:stop]
        whole = corner.triu() + corner.triu(1).T
        lower, info = torch.linalg.cholesky_ex(whole.flip(0, 1).to(torch.float64))
        if int(info) != 0:
            return False
        corner.copy_(lower.flip(0, 1))
        unit = torch.eye(stop - start, dtype=torch.float64, device=matrix.device)
        inverse = torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).to(matrix.dtype)
        matrix[:start, start:stop] = matrix[:start, start:stop] @ inverse.T
        matrix[stop:, start:stop] = 0
    return True


def invert_upper(matrix: torch.Tensor) -> None:
    """Replace an upper triangular matrix by its inverse.

    The inverse of ``[[A, B], [0, D]]`` is ``[[A^-1, -A^-1 B D^-1], [0, D^-1]]`` (LAPACK's trtri); the products with the
    triangle ``A^-1`` leave its zeros out, a thousand rows at a time. ``torch.linalg.solve_triangular`` on a unit matrix
    takes three times the operations and twice the memory.

    Args:
        matrix: float ``[K, K]``, zero below a diagonal without zeros.
    """
    size = matrix.shape[0]
    for start in range(0, size, _BLOCK):
        stop = min(size, start + _BLOCK)
        corner = matrix[start:stop, start:stop]
        unit = torch.eye(stop - start, dtype=torch.float64, device=matrix.device)
        corner.copy_(torch.linalg.solve_triangular(corner.to(torch.float64), unit, upper=True))
        right = matrix[:start, start:stop] @ corner.neg()
        for row in range(0, start, _ROWS_AT_ONCE):
            end = min(start, row + _ROWS_AT_ONCE)
            matrix[row:end, start:stop] = matrix[row:end, row:start] @ right[row:]

"""Factorization and inverse in place against torch.linalg."""

from __future__ import annotations

import pytest
import torch

from claq_export.algorithm.triangular import factor_upper, invert_upper


def positive_definite(size: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(2 * size + 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return (rows.T @ rows / size + 0.1 * torch.eye(size, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600, 1300])
def test_factor_and_inverse(size: int, dtype: torch.dtype) -> None:
    matrix = positive_definite(size, dtype)
    upper = matrix.triu() + 7 * torch.ones_like(matrix).tril(-1)  # what is below the diagonal is not read
    assert factor_upper(upper)
    assert torch.equal(upper, upper.triu())
    accuracy = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(upper @ upper.T, matrix, rtol=accuracy, atol=accuracy)
    inverse = upper.clone()
    invert_upper(inverse)
    assert torch.equal(inverse, inverse.triu())
    expected = torch.linalg.inv(upper.double())
    assert float((inverse.double() - expected).norm() / expected.norm()) < accuracy


def test_what_is_not_positive_definite_is_told() -> None:
    matrix = positive_definite(300, torch.float32)
    matrix[280, 280] = -1
    assert not factor_upper(matrix.clone())
    matrix[280, 280] = 100
    matrix[3, 3] = -1
    assert not factor_upper(matrix)

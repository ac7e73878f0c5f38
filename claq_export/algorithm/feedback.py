"""What quantized columns leave to the later ones, block by block: from the factor of the whole inverse Hessian, or, where the
calibration has few tokens, from these alone.

Both give the same columns up to rounding. With T tokens and K inputs the Hessian X^T X + D has rank T beside its diagonal,
and all that a block of columns needs of its K x K inverse comes from T x T matrices by Woodbury's identity: for T well
below K that saves nearly all of the operations and the K x K matrices themselves.
"""

from __future__ import annotations

from typing import Protocol

import torch

from .hessian import Factor, Hessian


class Feedback(Protocol):
    """The state of one layer's error feedback; the loop enters and leaves blocks of columns in order.

    Attributes:
        order: int64 ``[K]``: the input feature processed at each step.
    """

    order: torch.Tensor

    def enter(self, target: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Take what the columns before ``first`` owe off the block ``target[first:last]``, in place.

        Args:
            target: float32 ``[K, N]``, columns in processing order; of the columns before ``first`` it holds what the
                loop left there: (wanted - decoded) / U_jj.
            first, last: the block.

        Returns:
            float32 ``[B, B]``: the block of U, upper triangular, with U^T U the inverse of the damped Hessian.
        """

    def leave(self, target: torch.Tensor, first: int, last: int, value: torch.Tensor) -> None:
        """Note what the block decodes to, ``value`` float32 ``[B, N]``."""


class FactorFeedback:
    """:class:`Feedback` from the factor of the whole inverse Hessian."""

    def __init__(self, factor: Factor) -> None:
        self.order = factor.order
        self._upper = factor.upper

    def enter(self, target: torch.Tensor, first: int, last: int) -> torch.Tensor:
        if first:
            target[first:last].addmm_(self._upper[:first, first:last].T, target[:first], alpha=-1)
        return self._upper[first:last, first:last]

    def leave(self, target: torch.Tensor, first: int, last: int, value: torch.Tensor) -> None:
        """The errors in ``target`` say all."""


class TokenFeedback:
    """:class:`Feedback` from the calibration tokens X ``[T, K]`` and the diagonal D that is added to X^T X.

    Let F be the columns that are not quantized yet, Q the others and r = X_Q (w_Q - q_Q) what the tokens saw of their errors.
    The best F, given Q, is w_F + r M_F X_F with M_F = (X_F X_F^T + damping)^-1: a T x T matrix whose inverse loses a block
    with every block. U of a block B follows from the Schur complement of the columns F' after it in those of F, damping (1 +
    X_B^T M_F' X_B), by Cholesky. Inputs that are 0 for all tokens have another D; they are coupled with nothing.

    Args:
        tokens: float32 ``[T, K]``.
        added: float64 ``[K]``: D.
        order: int64 ``[K]``, the processing order.
    """

    def __init__(self, tokens: torch.Tensor, added: torch.Tensor, order: torch.Tensor) -> None:
        self.order = order
        self._tokens = tokens[:, order]
        self._added = added[order]
        self._damping = added.min()
        wide = self._tokens.to(torch.float64)
        self._remaining = wide @ wide.T
        self._remaining.diagonal().add_(self._damping)
        self._lower = torch.linalg.cholesky(self._remaining)
        self._owed: torch.Tensor | None = None
        self._original: torch.Tensor | None = None

    def enter(self, target: torch.Tensor, first: int, last: int) -> torch.Tensor:
        block = self._tokens[:, first:last].to(torch.float64)
        self._original = target[first:last].clone()
        if self._owed is not None:
            solved = torch.cholesky_solve(block, self._lower).to(torch.float32)
            target[first:last].addmm_(solved.T, self._owed)
        self._remaining -= block @ block.T
        self._lower = torch.linalg.cholesky(self._remaining)
        half = torch.linalg.solve_triangular(self._lower, block, upper=False)
        complement = self._damping * (half.T @ half)
        complement.diagonal().add_(self._added[first:last])
        # The upper factor R of R R^T is the lower one of the matrix with both axes reversed.
        lower = torch.linalg.cholesky(complement.flip(0, 1))
        unit = torch.eye(last - first, dtype=torch.float64, device=lower.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).to(torch.float32)

    def leave(self, target: torch.Tensor, first: int, last: int, value: torch.Tensor) -> None:
        assert self._original is not None
        if self._owed is None:
            self._owed = torch.zeros(len(self._tokens), target.shape[1], device=target.device)
        self._owed.addmm_(self._tokens[:, first:last], self._original - value)
        self._original = None


def feedback_of(hessian: Hessian, damping: float, act_order: bool, device: torch.device) -> Feedback:
    """The cheaper kind for a layer with that Hessian.

    Raises:
        CalibrationError: as :meth:`Hessian.factor`.
    """
    tokens = hessian.few_tokens
    if tokens is None:
        factor = hessian.factor(damping, act_order)
        return FactorFeedback(Factor(factor.order.to(device), factor.upper.to(device)))
    order, added = hessian.order(act_order), hessian.damping(damping)
    return TokenFeedback(tokens.to(device), added.to(device), order.to(device))

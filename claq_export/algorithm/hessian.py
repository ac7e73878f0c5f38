"""The layer Hessian X^T X of calibration inputs, and the factor of its inverse that error feedback uses.

A layer's quantization error on the calibration data is tr(dW H dW^T) with H = X^T X (GPTQ, arXiv 2210.17323, section 3;
claq.md, 1.2). All layers that read the same input share one :class:`Hessian` and with it one Cholesky factorization.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ..errors import CalibrationError, ConfigError
from .products import add_gram, linear
from .triangular import factor_upper, invert_upper

FEW = 4
"""A Hessian of at most K / FEW tokens is kept as these tokens (feedback.py)."""

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of the damped inverse Hessian, in processing order.

    Attributes:
        order: int64 ``[K]``; ``order[i]`` is the input feature processed at step i.
        upper: float32 ``[K, K]`` upper triangular U with ``U^T U = (H + damping)^-1``, rows and columns in
            processing order.
    """

    order: torch.Tensor
    upper: torch.Tensor


class Hessian:
    """Accumulates H = X^T X over calibration tokens.

    Args:
        in_features: K.
        token_clip: each token's norm is clipped to this multiple of the median norm of its call; None leaves tokens
            as they are. Attention sinks have norms hundreds of times the median and would own H; leaving them out
            breaks the model (design.md, section 4).
        device: where the matrix lives; None = the CPU.

    Raises:
        ConfigError: ``in_features`` or ``token_clip`` not positive.
    """

    def __init__(
        self, in_features: int, *, token_clip: float | None = 2.0, device: torch.device | str | None = None
    ) -> None:
        if in_features < 1:
            raise ConfigError(f"in_features must be positive, got {in_features}")
        if token_clip is not None and not token_clip > 0:
            raise ConfigError(f"token_clip must be positive or None, got {token_clip}")
        self.in_features = in_features
        self.token_clip = token_clip
        self.tokens = 0
        self._device = torch.device("cpu" if device is None else device)
        # Either the sums, or few tokens and, once somebody needed it, their matrix.
        self._sums: torch.Tensor | None = None
        self._few: list[torch.Tensor] = []
        self._matrix_of_few: torch.Tensor | None = None
        self._lock = threading.RLock()
        self._cross: torch.Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor] = {}

    def add(
        self, inputs: torch.Tensor, weights: torch.Tensor | None = None, *, reference: torch.Tensor | None = None
    ) -> None:
        """Add the tokens of one batch.

        Args:
            inputs: float ``[..., K]``: what the layer reads, upstream layers quantized.
            weights: ``[...]``, how much each token counts (0 for padding); None = 1.
            reference: ``[..., K]``: what the layer reads in the unquantized model. Given in every call or in none; then
                :meth:`target` moves the weight so that the unquantized output is matched (GPTAQ, arXiv 2504.02692).

        Raises:
            CalibrationError: wrong width, values that are not finite, or a reference in some calls only.
        """
        x = self._rows(inputs)
        if (reference is None) != (self._cross is None) and self.tokens:
            raise CalibrationError("reference inputs must be given for every calibration batch or for none")
        root = None if weights is None else weights.reshape(-1).to(x).clamp(min=0).sqrt()
        if root is not None and root.numel() != x.shape[0]:
            raise CalibrationError(f"{x.shape[0]} tokens but {root.numel()} token weights")
        norms = x.norm(dim=1)
        if not torch.isfinite(norms).all():
            raise CalibrationError("calibration inputs of a layer are not finite (overflow or NaN upstream)")
        counted = torch.ones_like(norms, dtype=torch.bool) if root is None else root > 0
        factor = torch.ones_like(norms)
        if self.token_clip is not None and counted.any():
            limit = self.token_clip * norms[counted].median()
            if limit > 0:
                factor = limit / norms.clamp(min=float(limit))
        if root is not None:
            factor = factor * root
        if self._sums is None and reference is None and self._are_few(x):
            self._keep(x * factor[:, None])
        else:
            add_gram(self.matrix, x, factor)
        if reference is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self.matrix)
            self._cross.addmm_((self._rows(reference) * factor[:, None]).T, x * factor[:, None])
        self.tokens += int(counted.sum())
        self._factors.clear()

    def merge(self, other: Hessian) -> None:
        """Add what another one accumulated, on whatever device; adding a call's tokens or a Hessian of this call gives
        the same bits.

        Raises:
            CalibrationError: another width.
            NotImplementedError: it has reference inputs.
        """
        if other.in_features != self.in_features:
            raise CalibrationError(
                f"a Hessian of {other.in_features} inputs cannot be added to one of {self.in_features}"
            )
        if other._cross is not None or self._cross is not None:
            raise NotImplementedError("Hessians with reference inputs are not merged")
        few = other.few_tokens
        if few is None:
            self.matrix.add_(other.matrix.to(self._device))
        elif self._sums is None and self._are_few(few):
            self._keep(few.to(self._device))
        else:
            add_gram(self.matrix, few.to(self._device))
        self.tokens += other.tokens
        self._factors.clear()

    def _are_few(self, more: torch.Tensor) -> bool:
        return (sum(len(part) for part in self._few) + len(more)) * FEW <= self.in_features

    def _keep(self, rows: torch.Tensor) -> None:
        self._few.append(rows)
        self._matrix_of_few = None

    def _rows(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[-1] != self.in_features:
            raise CalibrationError(
                f"inputs have width {inputs.shape[-1]}, the layer has in_features = {self.in_features}"
            )
        return inputs.detach().reshape(-1, self.in_features).to(device=self._device, dtype=torch.float32)

    @property
    def matrix(self) -> torch.Tensor:
        """float32 ``[K, K]``: H, to be read or added to; few tokens are given up for it."""
        with self._lock:
            self._sums = self._summed()
            self._few.clear()
            self._matrix_of_few = None
            return self._sums

    def _summed(self) -> torch.Tensor:
        """H, to be read; few tokens stay."""
        with self._lock:
            if self._sums is not None:
                return self._sums
            if self._matrix_of_few is None:
                whole = torch.zeros(self.in_features, self.in_features, device=self._device)
                for rows in self._few:
                    add_gram(whole, rows)
                self._matrix_of_few = whole
            return self._matrix_of_few

    @property
    def few_tokens(self) -> torch.Tensor | None:
        """float32 ``[T, K]``: X, the tokens with their weights, while T is at most a quarter of K and nobody asked for
        :attr:`matrix`; else None."""
        with self._lock:
            if self._sums is not None or not self._few:
                return None
            return self._few[0] if len(self._few) == 1 else torch.cat(self._few)

    @property
    def diagonal(self) -> torch.Tensor:
        """float32 ``[K]``: H_jj, the energy of each input feature."""
        few = self.few_tokens
        return self._summed().diagonal() if few is None else few.square().sum(dim=0)

    def order(self, act_order: bool) -> torch.Tensor:
        """int64 ``[K]``: input features in processing order: by falling H_jj (GPTQ's act-order), or as they stand."""
        if act_order:
            return torch.argsort(self.diagonal, descending=True, stable=True)
        return torch.arange(self.in_features, device=self._device)

    def damped(self, damping: float) -> torch.Tensor:
        """float64 ``[K, K]``: H plus ``damping`` times its mean diagonal; dead inputs (H_jj = 0) get that mean as
        their diagonal.

        Raises:
            ConfigError: ``damping`` not positive.
        """
        matrix = self._summed().to(torch.float64)
        matrix.diagonal().add_(self.damping(damping))
        return matrix

    def damping(self, damping: float) -> torch.Tensor:
        """float64 ``[K]``: what :meth:`damped` adds to the diagonal.

        Raises:
            ConfigError: ``damping`` not positive.
        """
        if not damping > 0:
            raise ConfigError(f"damping must be positive, got {damping}")
        diagonal = self.diagonal.to(torch.float64)
        mean = float(diagonal.mean())
        mean = mean if mean > 0 else 1.0
        return torch.where(diagonal == 0, mean, damping * mean)

    def factor(self, damping: float = 0.01, act_order: bool = True) -> Factor:
        """The factor for error feedback; computed once for each pair of arguments and kept, whatever the number of threads
        that ask for it.

        Args:
            damping: share of the mean diagonal that is added to the diagonal.
            act_order: process input features by falling H_jj, not as they stand (GPTQ's act-order).

        Raises:
            CalibrationError: the matrix is not positive definite even so.
        """
        with self._lock:
            key = (damping, act_order)
            if key not in self._factors:
                order = self.order(act_order)
                self._factors[key] = Factor(order, self._inverse_factor(order, damping))
            return self._factors[key]

    def _inverse_factor(self, order: torch.Tensor, damping: float) -> torch.Tensor:
        """U of :class:`Factor`, made where it is kept.

        H = R R^T with R upper; then H^-1 = R^-T R^-1, so U = R^-1: one factorization and one triangular inverse instead
        of two factorizations and a full inverse. In float32, as GPTQ's authors do it; a Hessian that is not positive
        definite in float32 gets a second chance in float64.
        """
        added = self.damping(damping)[order]
        sums = self._summed()
        for dtype in (torch.float32, torch.float64):
            matrix = torch.empty(sums.shape, dtype=dtype, device=sums.device)
            for start in range(0, self.in_features, _ROWS_AT_ONCE):
                part = order[start : start + _ROWS_AT_ONCE]
                matrix[start : start + len(part)] = sums[part][:, order]
            matrix.diagonal().add_(added)
            if factor_upper(matrix):
                invert_upper(matrix)
                return matrix.to(torch.float32)
        raise CalibrationError("the Hessian is not positive definite; raise the damping or use more calibration text")

    def target(self, weight: torch.Tensor, damping: float) -> torch.Tensor:
        """The weight that best reproduces the unquantized output from quantized inputs; ``weight`` itself without
        references.

        W* = W + W (C - H) (H + damping)^-1 with C = X_ref^T X: the minimum of ||W X_ref - W* X||^2, pulled towards W
        by the damping.
        """
        if self._cross is None:
            return weight
        lower = torch.linalg.cholesky(self.damped(damping))
        right = weight.to(torch.float64) @ (self._cross - self._summed()).to(torch.float64)
        return weight + torch.cholesky_solve(right.T, lower).T.to(weight.dtype)

    def energy(self, difference: torch.Tensor) -> torch.Tensor:
        """float64 ``[N]``: d H d^T of each row of ``difference`` ``[N, K]``."""
        parts = []
        few = self.few_tokens
        for some in difference.split(_ROWS_AT_ONCE):
            rows = some.to(device=self._device, dtype=torch.float32)
            squares = linear(rows, self._summed()) * rows if few is None else linear(rows, few).square()
            parts.append(squares.sum(dim=1, dtype=torch.float64))
        return torch.cat(parts)

"""The layer Hessian X^T X of calibration inputs, and the factor of its inverse that error feedback uses.

A layer's quantization error on the calibration data is tr(dW H dW^T) with H = X^T X (GPTQ, arXiv 2210.17323, section 3;
claq.md, 1.2). All layers that read the same input share one :class:`Hessian` and with it one Cholesky factorization.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ..errors import CalibrationError, ConfigError
from .products import gram, linear


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
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self._cross: torch.Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor] = {}
        self._factoring = threading.Lock()

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
        x = x * factor[:, None]
        self.matrix.add_(gram(x))
        if reference is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self.matrix)
            self._cross.addmm_((self._rows(reference) * factor[:, None]).T, x)
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
        self.matrix.add_(other.matrix.to(self.matrix.device))
        self.tokens += other.tokens
        self._factors.clear()

    def _rows(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[-1] != self.in_features:
            raise CalibrationError(
                f"inputs have width {inputs.shape[-1]}, the layer has in_features = {self.in_features}"
            )
        return inputs.detach().reshape(-1, self.in_features).to(device=self.matrix.device, dtype=torch.float32)

    @property
    def diagonal(self) -> torch.Tensor:
        """float32 ``[K]``: H_jj, the energy of each input feature."""
        return self.matrix.diagonal()

    def damped(self, damping: float) -> torch.Tensor:
        """float64 ``[K, K]``: H plus ``damping`` times its mean diagonal; dead inputs (H_jj = 0) get that mean as
        their diagonal.

        Raises:
            ConfigError: ``damping`` not positive.
        """
        if not damping > 0:
            raise ConfigError(f"damping must be positive, got {damping}")
        matrix = self.matrix.to(torch.float64)
        mean = float(matrix.diagonal().mean())
        mean = mean if mean > 0 else 1.0
        added = torch.full((self.in_features,), damping * mean, dtype=torch.float64, device=matrix.device)
        added[matrix.diagonal() == 0] = mean
        return matrix + torch.diag(added)

    def factor(self, damping: float = 0.01, act_order: bool = True) -> Factor:
        """The factor for error feedback; computed once for each pair of arguments and kept, whatever the number of threads
        that ask for it.

        Args:
            damping: share of the mean diagonal that is added to the diagonal.
            act_order: process input features by falling H_jj, not as they stand (GPTQ's act-order).

        Raises:
            CalibrationError: the matrix is not positive definite even so.
        """
        with self._factoring:
            key = (damping, act_order)
            if key not in self._factors:
                self._factors[key] = self._factor(damping, act_order)
            return self._factors[key]

    def _factor(self, damping: float, act_order: bool) -> Factor:
        matrix = self.damped(damping)
        count = self.in_features
        order = torch.arange(count, device=matrix.device)
        if act_order:
            order = torch.argsort(self.diagonal, descending=True, stable=True)
        # H = R R^T with R upper comes from the Cholesky factor of H with both axes reversed; then H^-1 = R^-T R^-1, so
        # U = R^-1: one factorization and one triangular inverse instead of two factorizations and a full inverse.
        flipped = order.flip(0)
        lower, info = torch.linalg.cholesky_ex(matrix[flipped[:, None], flipped])
        if int(info) != 0:
            raise CalibrationError(
                "the Hessian is not positive definite; raise the damping or use more calibration text"
            )
        upper = lower.flip(0, 1)
        eye = torch.eye(count, dtype=torch.float64, device=matrix.device)
        inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
        return Factor(order, inverse.to(torch.float32))

    def target(self, weight: torch.Tensor, damping: float) -> torch.Tensor:
        """The weight that best reproduces the unquantized output from quantized inputs; ``weight`` itself without
        references.

        W* = W + W (C - H) (H + damping)^-1 with C = X_ref^T X: the minimum of ||W X_ref - W* X||^2, pulled towards W
        by the damping.
        """
        if self._cross is None:
            return weight
        lower = torch.linalg.cholesky(self.damped(damping))
        right = weight.to(torch.float64) @ (self._cross - self.matrix).to(torch.float64)
        return weight + torch.cholesky_solve(right.T, lower).T.to(weight.dtype)

    def energy(self, difference: torch.Tensor) -> torch.Tensor:
        """float64 ``[N]``: d H d^T of each row of ``difference`` ``[N, K]``."""
        rows = difference.to(device=self.matrix.device, dtype=torch.float32)
        return (linear(rows, self.matrix) * rows).sum(dim=1, dtype=torch.float64)

"""How much the model's output depends on each layer's outputs, by gradients: what makes errors of different layers
comparable.

A small error d in the outputs of a layer raises the loss by about half of sum (g d)^2, g the gradient of the
log-likelihood at that output (the Fisher information; SqueezeLLM, arXiv 2306.07629; GuidedQuant, arXiv 2505.07004).
The bit budget weighs each output row with its mean g^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import CalibrationError

_VALUES_AT_ONCE = 1 << 18
"""Values of logits and of gradients that are worked on together, a megabyte of float32."""


class OutputImportance:
    """Collects the mean squared gradient of every output of some layers, while a caller runs forward and backward
    passes.

    Use as a context manager around the passes::

        with OutputImportance({"fc": model.fc}) as importance:
            for batch in batches:
                logits = model(batch).logits
                logits.backward(fisher_gradient(logits, generator))
        rows = importance.result()["fc"]

    Args:
        layers: modules by name, with a tensor as output; its last axis is out_features. Outputs that come from no
            module are given to :meth:`watch`.
        per_token: keep the mean squared gradient of every token too, see :meth:`tokens`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, per_token: bool = False) -> None:
        self._layers = dict(layers)
        self._by_token: dict[str, list[torch.Tensor]] | None = {} if per_token else None
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> OutputImportance:
        for name, module in self._layers.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self, name: str, output: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Collect the gradient of ``output`` ``[..., out_features]`` of layer ``name``; use what is returned instead of
        it.

        Args:
            name: of the layer.
            output: of the layer.
            counted: bool ``[T]``: which of its rows are tokens, not padding; None: all.
        """
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda gradient: self._collect(name, gradient, counted))
        return output

    def _collect(self, name: str, gradient: torch.Tensor, counted: torch.Tensor | None) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        rows = rows if counted is None else rows[counted]
        if not len(rows):
            return  # an expert that this pass routes no token to
        added = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in rows.split(_rows_at_once(rows)):
            squares = part.to(torch.float32).square()
            added += squares.sum(dim=0)
            if self._by_token is not None:
                self._by_token.setdefault(name, []).append(squares.mean(dim=1))
        self._sums[name] = self._sums[name] + added if name in self._sums else added
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
            return self.watch(name, output)

        return hook

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        """float32 ``[T]`` for each layer: mean over outputs of the squared gradient of each token, in the order of the
        passes; meant for layers that run once a pass. Empty without ``per_token``."""
        return {name: torch.cat(parts) for name, parts in (self._by_token or {}).items()}

    @property
    def seen(self) -> list[str]:
        """The layers that got a gradient."""
        return list(self._sums)

    def result(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """float64 ``[out_features]`` for each layer: mean over tokens of the squared gradient.

        Args:
            names: of the layers; None: those the collector was made with.

        Raises:
            CalibrationError: a layer saw no gradient, or one that is not finite.
        """
        wanted = list(self._layers if names is None else names)
        for name in wanted:
            if name not in self._sums:
                raise CalibrationError(f"layer {name} got no gradient: it takes no part in the model's output")
            if not torch.isfinite(self._sums[name]).all():
                raise CalibrationError(f"the gradients at layer {name} are not finite")
        return {name: self._sums[name] / self._tokens[name] for name in wanted}


def fisher_gradient(
    logits: torch.Tensor, generator: torch.Generator, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Where to begin a backward pass at ``logits``, so that squared gradients are, on average over the draw, the Fisher
    information of the distribution.

    With p = softmax of a row that is diag(p) - p p^T, the covariance of v = sqrt(p) * e - p (sqrt(p) . e) for random signs e:
    the row's gradient is v. Labels drawn from the model, the usual way, have the same mean; but where it is sure of a word,
    nearly all of them have no gradient and a rare one a large one (the squared gradients of a token under two draws differ by
    a factor of 1.60 in the median, with signs of 1.42; SmolLM2-135M).

    Args:
        logits: ``[..., classes]``.
        generator: of the signs, on the device of ``logits``.
        counted: bool ``[T]``: which rows of ``logits`` are tokens, not padding; None: all.

    Returns:
        as ``logits``; zeros in rows that do not count.
    """
    rows = logits.detach().reshape(-1, logits.shape[-1])
    gradient = torch.zeros_like(rows)
    places = torch.arange(len(rows), device=rows.device) if counted is None else counted.nonzero().flatten()
    for some in places.split(_rows_at_once(rows)):
        p = rows[some].float().softmax(dim=-1)
        v = p.sqrt().mul_(_signs(p.shape, generator, p.device))
        gradient[some] = v.sub_(p.mul_(v.sum(dim=-1, keepdim=True))).to(gradient.dtype)
    return gradient.view(logits.shape)


def _signs(shape: torch.Size, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Random signs ``[T, classes]``, int8; a random number gives eight of them, since a vocabulary wants many."""
    T, classes = shape
    drawn = torch.randint(256, (T, -(-classes // 8), 1), generator=generator, device=device, dtype=torch.uint8)
    bits = drawn.bitwise_right_shift(torch.arange(8, device=device, dtype=torch.uint8)).bitwise_and_(1)
    return bits.flatten(1)[:, :classes].to(torch.int8).mul_(2).sub_(1)


def projected_gradient(
    output: torch.Tensor, generator: torch.Generator, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Random signs to begin a backward pass with at ``output``; squared gradients are those of the squared output error.

    For models whose output is a vector to be preserved (embeddings), not a distribution.

    Args:
        output: ``[..., features]``.
        generator: of the signs, on the device of ``output``.
        counted: bool ``[T]``: which rows of ``output`` are tokens, not padding; None: all.

    Returns:
        as ``output``; zeros in rows that do not count.
    """
    shape = output.shape if counted is None else (int(counted.sum()), output.shape[-1])
    signs = torch.randint(0, 2, shape, generator=generator, device=output.device).to(output) * 2 - 1
    if counted is None:
        return signs
    gradient = output.new_zeros(output.shape)
    gradient.view(-1, output.shape[-1])[counted] = signs
    return gradient


def _rows_at_once(rows: torch.Tensor) -> int:
    """How many rows ``[T, features]`` to work on together, so that float32 copies of them stay in a processor's cache."""
    return max(1, _VALUES_AT_ONCE // rows.shape[-1])

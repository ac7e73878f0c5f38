"""Gradients through a captured graph: the graph is run node by node, its planned linears by whatever the caller puts in
their place.

No architecture needs a class of its own, and the graph is not rewritten. Matrix products run in bfloat16 where the
processor multiplies in it, and what follows them as PyTorch promotes it: sums with float32 values in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..deferred import materialize
from ..errors import CalibrationError, first_line
from ..passes.attributes import get_attribute
from .data import Batch
from .padding import real_tokens

TOKENS_AT_ONCE = 256
"""Tokens of a decoder's sample that go through the graph together at most: what autograd keeps grows with them."""

DISTRIBUTIONS = (
    "text-generation",
    "fill-mask",
    "text-classification",
    "text2text-generation",
    "automatic-speech-recognition",
)
"""Tasks whose first output is a distribution (logits), not a vector to be preserved."""

_LINEAR = torch.ops.aten.linear.default
_PRODUCTS = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
)
"""Operators that take values of one dtype only."""

LinearFunction = Callable[[torch.Tensor], torch.Tensor]
"""``x [..., K] -> x W^T [..., N]``; for an embedding ``indices [...] -> rows [..., K]``."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype to multiply in when rounding of the products does not matter: bfloat16 where it is faster."""
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


class DifferentiableGraph:
    """A graph module of ATen operators whose planned linears are functions of the caller.

    Args:
        graph_module: captured graph; stays as it is.
        linears: what runs in the place of linear nodes and of embeddings; others run with their weights.
        dtype: of the products with constant weights.
    """

    def __init__(
        self, graph_module: fx.GraphModule, linears: Mapping[fx.Node, LinearFunction], dtype: torch.dtype
    ) -> None:
        self._interpreter = _Interpreter(graph_module, linears, dtype)
        self._plain = _Interpreter(graph_module, linears, torch.float32)
        self._placeholders = sum(node.op == "placeholder" for node in graph_module.graph.nodes)

    def __call__(self, batch: Batch) -> list[torch.Tensor]:
        """The graph's floating outputs for one batch (inputs in the order of the graph's).

        Raises:
            CalibrationError: an operator fails, or has no gradient.
        """
        if len(batch) != self._placeholders:
            raise CalibrationError(
                f"the model takes {self._placeholders} inputs, the calibration batch has {len(batch)}"
            )
        try:
            try:
                found = self._interpreter.run(*batch.values())
            except RuntimeError:
                if self._interpreter is self._plain:
                    raise
                # An operator that does not take bfloat16, or not beside float32.
                self._interpreter = self._plain
                found = self._interpreter.run(*batch.values())
        except (RuntimeError, NotImplementedError) as error:
            raise CalibrationError(f"gradients cannot be had: {first_line(error)}") from error
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        return [value for value in outputs if isinstance(value, torch.Tensor) and value.is_floating_point()]


class _Interpreter(fx.Interpreter):
    def __init__(
        self, graph_module: fx.GraphModule, linears: Mapping[fx.Node, LinearFunction], dtype: torch.dtype
    ) -> None:
        super().__init__(graph_module)
        self._linears = linears
        self._dtype = dtype
        self._rounded: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = get_attribute(self.module, str(n.target))
            if not isinstance(value, torch.Tensor):
                return value
            # Weights of the caller's linears are the caller's; a stand-in for one is not read.
            theirs = all(user in self._linears for user in n.users)
            return value.detach() if theirs else materialize(value.detach())
        if n.op != "call_function":
            return super().run_node(n)
        if n.target is not _LINEAR and n in self._linears:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._linears[n](args[1])
        if n.target is not _LINEAR:
            if n.target not in _PRODUCTS or self._dtype == torch.float32:
                return super().run_node(n)
            args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(n), self._round)
            return n.target(*args, **kwargs)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        bias = args[2] if len(args) > 2 else None
        if n in self._linears:
            y = self._linears[n](args[0])
            return self._finish(y, args[0], bias)
        source = n.args[1]
        constant = isinstance(source, fx.Node) and source.op == "get_attr" and args[1].dim() == 2
        if not constant or kwargs:
            return super().run_node(n)
        assert isinstance(source, fx.Node)
        name = str(source.target)
        if name not in self._rounded:
            self._rounded[name] = args[1].to(self._dtype)
        return self._finish(multiply(args[0], self._rounded[name]), args[0], bias)

    def _finish(self, product: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = product.to(x.dtype) if self._dtype == torch.float32 else product
        return y if bias is None else y + bias.to(y.dtype)

    def _round(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(self._dtype) if floating else value


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T`` in the dtype of ``weight [N, K]``."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight)


def pieces(
    batches: Sequence[Batch], task: str | None, tokens: int = TOKENS_AT_ONCE, *, whole: bool = False
) -> list[Batch]:
    """Samples one at a time; those of a decoder cut to ``tokens`` tokens, each piece a sequence of its own.

    A rest that fills no piece is left out, unless ``whole`` samples are asked for: then short texts go together, too. What
    holds nothing but padding is left out.

    Batches of models without a known task stay as they are: nothing says which axis is which.
    """
    if task is None:
        return list(batches)
    found: list[Batch] = []
    for batch in batches:
        count = min(len(value) for value in batch.values())
        together = 1
        if whole and task != "text-generation" and "input_ids" in batch:
            together = max(1, tokens // max(1, batch["input_ids"].shape[1]))
        for row in range(0, count, together):
            rows = slice(row, row + together)
            sample = {name: value[rows] if len(value) == count else value for name, value in batch.items()}
            if task != "text-generation" or "input_ids" not in sample:
                found.append(sample)
                continue
            length = sample["input_ids"].shape[1]
            for start in range(0, length, tokens):
                stop = min(start + tokens, length)
                if not whole and stop - start < min(tokens, length):
                    break
                found.append(_cut(sample, start, stop))
    return [sample for sample in found if (real := real_tokens(sample)) is None or bool(real.any())]


def _cut(sample: Batch, start: int, stop: int) -> Batch:
    """Some tokens of a decoder's sample as a sequence of its own: positions begin anew."""
    length = sample["input_ids"].shape[1]
    cut = {name: value[:, start:stop] if value.shape[1:] == (length,) else value for name, value in sample.items()}
    positions = sample.get("position_ids")
    if positions is None or positions.shape[1:] != (length,):
        return cut
    real = real_tokens(sample)
    if real is None or real.shape != positions.shape:
        return cut | {"position_ids": positions[:, : stop - start]}
    # Padding before the first token has positions too, which are not those of tokens.
    first = real.int().argmax(1, keepdim=True)
    here = real[:, start:stop].int().argmax(1, keepdim=True) + start
    shifted = positions[:, start:stop] - positions.gather(1, here) + positions.gather(1, first)
    return cut | {"position_ids": shifted.clamp(min=0)}

"""The torch operator ``claq::linear``: its schema, its fake (shape) kernel, and how its kernels are registered.

One node of this operator stands for one quantized layer of ``docs/format.md`` wherever PyTorch keeps a graph
(``torch.export``, ``torch.compile``, FX passes). The reference kernel (:mod:`.reference`) runs on every device and is
the oracle of all others; on CPU the native library takes its place when it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .reference import reference_linear

OPERATOR = "claq::linear"
"""Qualified name of the operator; ``torch.ops.claq.linear.default`` once this module is imported."""

BACKENDS = ("auto", "native", "reference")
"""Values of ``CLAQ_BACKEND`` and of :func:`use_backend`."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of ``x`` the operator takes."""

_SCHEMA = (
    "linear(Tensor x, Tensor codes, Tensor codebook, Tensor scale, Tensor row_scale, Tensor order, "
    "Tensor outlier_ptr, Tensor outlier_index, Tensor outlier_value, Tensor bias, "
    "int in_features, int out_features, int[] columns, int accuracy_level) -> Tensor"
)

_forced_backend: ContextVar[str | None] = ContextVar("claq_backend", default=None)

_library = torch.library.Library("claq", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def backend() -> str:
    """The CPU backend in force: that of :func:`use_backend`, else the environment's ``CLAQ_BACKEND``, else ``"auto"``.

    Raises:
        ValueError: ``CLAQ_BACKEND`` is none of :data:`BACKENDS`.
    """
    chosen = _forced_backend.get() or os.environ.get("CLAQ_BACKEND") or "auto"
    if chosen not in BACKENDS:
        raise ValueError(f"CLAQ_BACKEND must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    return chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the CPU kernel of ``claq::linear`` inside a ``with`` block, in this thread.

    Args:
        name: ``"auto"`` (native where the library is installed), ``"native"`` (an error where it is not) or
            ``"reference"``.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _forced_backend.set(name)
    try:
        yield
    finally:
        _forced_backend.reset(token)


def _check_arguments(
    x: torch.Tensor, bias: torch.Tensor, in_features: int, out_features: int, columns: Sequence[int]
) -> None:
    torch._check(x.dim() >= 1, lambda: "claq::linear: x must have at least one dimension")
    torch._check(
        x.dtype in ACTIVATION_DTYPES, lambda: f"claq::linear: x must be float32, float16 or bfloat16, got {x.dtype}"
    )
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"claq::linear: the last dimension of x must be in_features = {in_features}, got {x.shape[-1]}",
    )
    torch._check(
        bias.numel() in (0, out_features),
        lambda: f"claq::linear: bias must have out_features = {out_features} values or none, got {bias.numel()}",
    )
    torch._check(len(columns) == 3, lambda: f"claq::linear: columns must be three counts, got {len(columns)}")


def _reference(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    codes, codebook, scale, row_scale, order, ptr, index, value, bias, in_features, out_features, columns, _ = rest
    _check_arguments(x, bias, in_features, out_features, columns)
    return reference_linear(
        x, codes, codebook, scale, row_scale, order, ptr, index, value, bias, in_features, out_features, columns
    )


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    bias, in_features, out_features, columns = rest[8], rest[9], rest[10], rest[11]
    _check_arguments(x, bias, in_features, out_features, columns)
    return x.new_empty((*x.shape[:-1], out_features))


def _backward(_ctx: Any, *_gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "claq::linear is for inference and has no gradient: run the quantized model under torch.no_grad() "
        "or torch.inference_mode(), or train the unquantized model and quantize it again"
    )


_library.impl("linear", _reference, "CompositeExplicitAutograd")
torch.library.register_fake(OPERATOR, _fake, lib=_library)
torch.library.register_autograd(OPERATOR, _backward, lib=_library)

linear = torch.ops.claq.linear.default

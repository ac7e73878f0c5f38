"""CPU kernels of claq's operators: the native library where it is installed, else the references.

libclaq checks a layer and builds tables for it once; that work is kept for as long as the layer's ``codes`` live.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .native import NativeLinear, native_available
from .reference import reference_embedding, reference_linear

BACKENDS = ("auto", "native", "reference")
"""Values of the environment variable ``CLAQ_BACKEND`` and of :func:`use_backend`."""

_forced: ContextVar[str | None] = ContextVar("claq_backend", default=None)

# Keyed by the codes tensor itself, weakly: NativeLinear holds aliases of the tensors, so no entry keeps its key.
_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# A table that is an output head as well has a bias there, and none here: two entries, or each would throw out the other.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def backend() -> str:
    """The backend in force: that of :func:`use_backend`, else ``CLAQ_BACKEND``, else ``"auto"``.

    Raises:
        ValueError: ``CLAQ_BACKEND`` is none of :data:`BACKENDS`.
    """
    chosen = _forced.get() or os.environ.get("CLAQ_BACKEND") or "auto"
    if chosen not in BACKENDS:
        raise ValueError(f"CLAQ_BACKEND must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    return chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the CPU kernels of claq's operators inside a ``with`` block.

    Args:
        name: ``"auto"`` (native where libclaq is installed), ``"native"`` (an error elsewhere) or ``"reference"``.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def cpu_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    accuracy_level: int,
) -> torch.Tensor:
    """``claq::linear`` on CPU tensors; ``tensors`` are codes to bias in the operator's order.

    Raises:
        RuntimeError: the native kernel was asked for and is not there; the message says why.
        FormatError: a tensor does not hold to docs/format.md (native kernel only; the reference trusts its input).
    """
    if _native("claq::linear"):
        layer = _native_layer(_layers, tensors, in_features, out_features, tuple(columns))
        return layer(x, accuracy_level)
    return reference_linear(x, tensors, in_features, out_features, columns)


def cpu_embedding(
    indices: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    like: torch.Tensor,
) -> torch.Tensor:
    """``claq::embedding`` on CPU tensors; ``tensors`` are codes to outlier_value in the operator's order.

    Raises:
        IndexError: an index is out of range.
        RuntimeError, FormatError: as :func:`cpu_linear`.
    """
    if _native("claq::embedding"):
        layer = _native_layer(_tables, (*tensors, like), in_features, out_features, tuple(columns))
        return layer.gather(indices, like.dtype)
    return reference_embedding(indices, tensors, in_features, out_features, columns, like.dtype)


def _native(operator: str) -> bool:
    """Whether libclaq serves the call.

    Raises:
        RuntimeError: it was asked for and is not there.
    """
    chosen = backend()
    available, reason = native_available() if chosen != "reference" else (False, "")
    if chosen == "native" and not available:
        raise RuntimeError(f"{operator} cannot use its native kernel: {reason}")
    return available


def _native_layer(
    cache: WeakTensorKeyDictionary,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: tuple[int, ...],
) -> NativeLinear:
    codes = tensors[0]
    # Version counters tell of changes in place; tensors made in inference mode have none and cannot be changed outside.
    state = (
        in_features,
        out_features,
        columns,
        [tensor.data_ptr() for tensor in tensors],
        [0 if tensor.is_inference() else tensor._version for tensor in tensors],
    )
    entry: tuple[object, NativeLinear] | None = cache.get(codes)
    if entry is None or entry[0] != state:
        layer = NativeLinear(*tensors, columns=columns, in_features=in_features, out_features=out_features)
        entry = (state, layer)
        cache[codes] = entry
    return entry[1]

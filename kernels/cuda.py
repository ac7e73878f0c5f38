"""CUDA kernels of ``claq::linear``: Triton's where they are installed and right, else the reference.

Whether generated code is right on a GPU depends on that GPU, its driver and the version of Triton. The first call of each
kind (device, dtype, code widths, kernel) is therefore compared with the reference on the caller's own data; a kind that
fails keeps to the reference, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch

from .cpu import backend
from .reference import reference_linear
from .triton import available

BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference from the reference that rounding explains, as a share of the largest output."""

_lock = Lock()
_verdicts: dict[Hashable, bool] = {}


def cuda_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    accuracy_level: int,
) -> torch.Tensor:
    """``claq::linear`` on CUDA tensors; ``tensors`` are codes to bias in the operator's order.

    Raises:
        RuntimeError: the kernels were asked for (``CLAQ_BACKEND=native``) and Triton is not installed.
    """

    def reference() -> torch.Tensor:
        return reference_linear(x, tensors, in_features, out_features, columns)

    chosen = backend()
    if chosen == "native" and not available():
        raise RuntimeError("claq::linear cannot use its CUDA kernels: Triton is not installed")
    if chosen == "reference" or not available():
        return reference()
    from .triton.launch import kernel_for, linear

    def kernel() -> torch.Tensor:
        with torch.cuda.device(x.device):
            return linear(x, *tensors, in_features, out_features, columns, accuracy_level)

    if chosen == "native":
        return kernel()
    widths = tuple(width for width, count in zip((4, 3, 2), columns, strict=True) if count)
    outliers = tensors[6].numel() > 0
    kind = (x.device, x.dtype, widths, out_features % 4 == 0, outliers, kernel_for(x, in_features))
    capturing = torch.cuda.is_current_stream_capturing()
    return checked(kind, kernel, reference, BOUNDS[x.dtype], may_wait=not capturing)


def checked(
    kind: Hashable,
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
    bound: float,
    may_wait: bool = True,
) -> torch.Tensor:
    """The kernel's result, or the reference's where this kind of call was seen to be wrong.

    Args:
        kind: calls of one kind run the same code.
        kernel, reference: compute the result.
        bound: largest difference, as a share of the reference's largest value.
        may_wait: False while a CUDA graph is captured, when results cannot be looked at: a kind that has not been checked
            is trusted then, and checked at a later call.
    """
    verdict = _verdicts.get(kind)
    if verdict is False:
        return reference()
    if verdict or not may_wait:
        return kernel()
    with _lock:
        expected = reference()
        top = expected.abs().max() if expected.numel() else torch.zeros(())
        if not torch.isfinite(top) or top == 0:
            return expected  # nothing can be told from these values
        try:
            result, reason = kernel(), ""
            error = float((result - expected).abs().max() / top)
            if not error <= bound:
                reason = f"it differs from the reference by {error:.2g} of the largest output"
        except Exception as failure:  # Triton's compiler and launcher raise errors of many types
            result, reason = expected, f"{type(failure).__name__}: {failure}"
        _verdicts[kind] = not reason
        if reason:
            warnings.warn(
                f"the CUDA kernel of claq::linear is not used for {kind}: {reason}", RuntimeWarning, stacklevel=2
            )
        return expected if reason else result

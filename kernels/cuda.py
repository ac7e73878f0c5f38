"""CUDA kernels of ``claq::linear`` and ``claq::embedding``: Triton's where they are installed and right, else the references.

Whether generated code is right on a GPU depends on that GPU, its driver and the version of Triton. The first call of each
kind (device, dtype, code widths, kernel) is therefore compared with the definition of the format on the caller's own data; a
kind that fails keeps to the reference, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from .cpu import backend
from .reference import exact_linear, reference_embedding, reference_linear
from .triton import available

BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference from the reference that rounding explains, as a share of the largest output."""

COARSE_BOUNDS = {torch.float16: 5e-2, torch.float32: 2e-3}
"""The same of products that cuBLAS was allowed to sum in float16, or to make in TF32."""

MOST_VECTORS = 256
MOST_WEIGHTS = 1 << 22
"""Rows of x, and weights (of at least 64 outputs), that are compared at most: a dense weight may not find room on the GPU."""


@dataclass(frozen=True)
class Sample:
    """A part of a result: what is expected there, how it is taken from the result, and whether a kernel that computes
    nothing would differ."""

    expected: torch.Tensor
    part: Callable[[torch.Tensor], torch.Tensor]
    telling: bool = True


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

    if not _use_kernels("claq::linear"):
        return reference()
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    from .triton.launch import kernel_for, linear

    def kernel() -> torch.Tensor:
        with torch.cuda.device(x.device):
            return linear(x, *tensors, in_features, out_features, columns, accuracy_level)

    def sample() -> Sample:
        rows = x.reshape(-1, in_features)
        vectors = _spread(rows.shape[0], MOST_VECTORS, x.device)
        features = _spread(out_features, max(64, MOST_WEIGHTS // in_features), x.device)
        expected = exact_linear(rows[vectors], tensors, in_features, out_features, columns, features)
        # Where x is all zeros the bias would be right by itself.
        telling = bool((rows[vectors] != 0).any())
        return Sample(expected, lambda y: y.reshape(-1, out_features)[vectors[:, None], features], telling)

    widths = tuple(width for width, count in zip((4, 3, 2), columns, strict=True) if count)
    outliers = tensors[6].numel() > 0
    name = kernel_for(x, in_features)
    coarse = name == "dense" and _is_coarse(x.dtype)
    kind = ("claq::linear", x.device, x.dtype, widths, out_features % 4 == 0, outliers, name, coarse)
    return _run(kind, kernel, reference, sample, (COARSE_BOUNDS if coarse else BOUNDS)[x.dtype])


def cuda_embedding(
    indices: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``claq::embedding`` on CUDA tensors; ``tensors`` are codes to outlier_value in the operator's order.

    An index out of range gives a row of NaN: an error would have to wait for the GPU.

    Raises:
        RuntimeError: as :func:`cuda_linear`.
    """

    def reference() -> torch.Tensor:
        return reference_embedding(indices, tensors, in_features, out_features, columns, dtype)

    if not _use_kernels("claq::embedding"):
        return reference()
    if indices.numel() == 0:
        return torch.empty(*indices.shape, in_features, dtype=dtype, device=indices.device)
    from .triton.launch import embedding

    def kernel() -> torch.Tensor:
        with torch.cuda.device(indices.device):
            return embedding(indices, *tensors, in_features, out_features, columns, dtype)

    types = (indices.dtype, tensors[4].dtype, tensors[6].dtype, dtype)
    kind = ("claq::embedding", indices.device, types, tensors[4].numel() > 0, tensors[6].numel() > 0)
    # The same operations in the same order as the reference's: not one bit may differ.
    return _run(kind, kernel, reference, lambda: Sample(reference(), lambda y: y), 0.0)


def _spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    """Up to ``most`` of the numbers below ``count``, from the first to the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64, device=device).round().to(torch.int64)


def _is_coarse(dtype: torch.dtype) -> bool:
    """Whether PyTorch lets cuBLAS make products of this type in less than float32: TF32, or sums in float16."""
    settings = torch.backends.cuda.matmul
    if dtype == torch.float16:
        return bool(getattr(settings, "allow_fp16_accumulation", False))
    return dtype == torch.float32 and settings.fp32_precision == "tf32"


def _use_kernels(operator: str) -> bool:
    """Whether Triton's kernels are wanted and there.

    Raises:
        RuntimeError: they were asked for and Triton is not installed.
    """
    chosen = backend()
    if chosen == "native" and not available():
        raise RuntimeError(f"{operator} cannot use its CUDA kernels: Triton is not installed")
    # Triton's assembly is NVIDIA's; PyTorch for AMD calls its devices CUDA too.
    return chosen != "reference" and available() and torch.version.hip is None


def _run(
    kind: Hashable,
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
    sample: Callable[[], Sample],
    bound: float,
) -> torch.Tensor:
    """The kernel's result, checked at the first call of its kind unless ``CLAQ_BACKEND=native`` takes it unchecked."""
    if backend() == "native":
        return kernel()
    return checked(kind, kernel, reference, sample, bound, may_wait=not torch.cuda.is_current_stream_capturing())


def checked(
    kind: Hashable,
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
    sample: Callable[[], Sample],
    bound: float,
    may_wait: bool = True,
) -> torch.Tensor:
    """The kernel's result, or the reference's where this kind of call was seen to be wrong.

    Args:
        kind: calls of one kind run the same code.
        kernel, reference: compute the result.
        sample: computes what the kernel's result is compared with.
        bound: largest difference, as a share of the sample's largest value.
        may_wait: False while a CUDA graph is captured, when results cannot be looked at: a kind that has not been checked
            is trusted then, and checked at a later call.
    """
    verdict = _verdicts.get(kind)
    if verdict is False:
        return reference()
    if verdict or not may_wait:
        return kernel()
    with _lock:
        wanted = sample()
        top = wanted.expected.abs().max() if wanted.expected.numel() else torch.zeros(())
        try:
            # Also where nothing can be told: a kernel that is first called in a capture cannot be loaded there.
            result = kernel()
            if not wanted.telling or not torch.isfinite(top) or top == 0:
                return reference()
            error = float((wanted.part(result) - wanted.expected).abs().max() / top)
            reason = "" if error <= bound else f"it differs from the reference by {error:.2g} of the largest output"
        except torch.OutOfMemoryError:
            raise  # nothing is wrong with the kernel, and the reference needs more memory
        except Exception as failure:  # Triton's compiler and launcher raise errors of many types
            reason = f"{type(failure).__name__}: {failure}"
        _verdicts[kind] = not reason
        if not reason:
            return result
        warnings.warn(f"a CUDA kernel of claq is not used for {kind}: {reason}", RuntimeWarning, stacklevel=2)
    return reference()

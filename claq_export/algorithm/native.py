"""The column loop on libclaq: the inner loops of this package in native code, called on NumPy arrays.

The Python of :mod:`.columns`, :mod:`.kmeans` and :mod:`.gptq` states what is computed and is the fallback where
claq-runtime is not installed; libclaq gives the same bits (docs/runtime.md). ``CLAQ_QUANTIZER=python`` in the environment
turns it off.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError
from ..libclaq import load_libclaq
from ..threads import threads_for
from .kmeans import METHODS
from .settings import LayerSettings

SWITCH = "CLAQ_QUANTIZER"
"""Environment variable: ``auto`` (default), ``native`` (an error where libclaq is missing) or ``python``."""

MOST_CENTROIDS = 16

_ERROR_SIZE = 256
_POINTERS = ("width", "reserve", "row_weight", "start", "feedback")
_RESULTS = ("target", "value", "error", "codes", "codebook", "scale", "outliers", "outlier_row", "outlier_extra")


class _ColumnsDesc(ctypes.Structure):
    """``claq_columns_desc`` of claq.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("method", ctypes.c_int32),
        ("most_iterations", ctypes.c_int32),
        ("both_sides", ctypes.c_int32),
        ("fit_outliers", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in _RESULTS),
        ("feedback_seconds", ctypes.POINTER(ctypes.c_double)),
    )


class _ProfileDesc(ctypes.Structure):
    """``claq_profile_desc`` of claq.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("width", ctypes.c_void_p),
        ("widths", ctypes.c_int64),
        ("reserve", ctypes.c_void_p),
        ("reserves", ctypes.c_int64),
        ("most_iterations", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
        ("error", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class CodedColumns:
    """C columns of N weights as libclaq quantized them; see ``claq_columns_desc`` for the parts.

    Attributes:
        target: float32 ``[C, N]``: the columns after feedback.
        value: float32 ``[C, N]``: what they decode to.
        error: float32 ``[C, N]``: what later columns owe; empty without feedback.
        codes: uint8 ``[C, N]``.
        codebook: int8 ``[C, 16]``.
        scale: float16 ``[C]``.
        outliers: int64 ``[C]``: kept outliers.
        first_outlier: int64 ``[C]``: where each column's outliers begin in ``outlier_row`` and ``outlier_extra``.
        outlier_row: int32, ascending within a column; outlier_extra: float16.
        feedback_seconds: time spent on feedback; the rest went into fitting.
    """

    target: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]
    error: npt.NDArray[np.float32]
    codes: npt.NDArray[np.uint8]
    codebook: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float16]
    outliers: npt.NDArray[np.int64]
    first_outlier: npt.NDArray[np.int64]
    outlier_row: npt.NDArray[np.int32]
    outlier_extra: npt.NDArray[np.float16]
    feedback_seconds: float = 0.0


@cache
def _library() -> tuple[Any, str]:
    """libclaq with the functions of quantization declared, or None and the reason."""
    library, reason = load_libclaq()
    if library is None:
        return None, reason
    if not hasattr(library, "claq_quantize_columns"):
        return None, "the installed claq-runtime has no quantization; install the one that comes with this version"
    for function, desc in (
        (library.claq_quantize_columns, _ColumnsDesc),
        (library.claq_profile_columns, _ProfileDesc),
    ):
        function.restype = ctypes.c_int
        function.argtypes = [
            ctypes.POINTER(desc),
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]
    return library, ""


def enabled() -> bool:
    """Whether columns on the CPU are quantized by libclaq: it is there and the environment does not say otherwise.

    Raises:
        ConfigError: the environment variable has another value, or insists on a library that is missing.
    """
    wanted = os.environ.get(SWITCH) or "auto"
    if wanted not in ("auto", "native", "python"):
        raise ConfigError(f"{SWITCH} must be auto, native or python, got {wanted!r}")
    if wanted == "python":
        return False
    library, reason = _library()
    if wanted == "native" and library is None:
        raise ConfigError(f"{SWITCH}=native: {reason}")
    return library is not None


def quantize_columns(
    target: npt.NDArray[np.float32],
    widths: npt.ArrayLike,
    reserve: npt.ArrayLike,
    settings: LayerSettings,
    *,
    row_weight: npt.NDArray[np.float64] | None = None,
    feedback: npt.NDArray[np.float32] | None = None,
    start: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> CodedColumns:
    """Quantize columns, one after another with error feedback or each for itself.

    Args:
        target: float32 ``[C, N]``.
        widths: C code widths.
        reserve: outliers of each column, less than N.
        settings: k-means and outlier switches.
        row_weight: float64 ``[N]``: how much each row's squared error counts in the fit; None = 1.
        feedback: float32 ``[C, C]``, lower triangle: ``feedback[i, j]`` times the error of column j is taken off column i.
        start: float64 ``[C, 16]``: ascending centroids to run Lloyd from; None: the method's own start.
        threads: None: torch's. Results do not depend on it.
        kernel: a kernel family of libclaq; None: the best one here.

    Raises:
        ModelError: a value is not finite, or another argument is refused; the message says which.
    """
    count, rows = target.shape
    target = np.array(target, dtype=np.float32, order="C")
    width = np.ascontiguousarray(widths, dtype=np.int32)
    reserved = np.ascontiguousarray(reserve, dtype=np.int64)
    first = np.cumsum(reserved) - reserved
    room = max(0, int(reserved.sum()))
    results: dict[str, Any] = {
        "target": target,
        "value": np.empty_like(target),
        "error": np.empty((count if feedback is not None else 0, rows), dtype=np.float32),
        "codes": np.empty((count, rows), dtype=np.uint8),
        "codebook": np.empty((count, MOST_CENTROIDS), dtype=np.int8),
        "scale": np.empty(count, dtype=np.float16),
        "outliers": np.empty(count, dtype=np.int64),
        "outlier_row": np.empty(room, dtype=np.int32),
        "outlier_extra": np.empty(room, dtype=np.float16),
    }
    given: dict[str, npt.NDArray[Any] | None] = {
        "width": width,
        "reserve": reserved,
        "row_weight": None if row_weight is None else np.ascontiguousarray(row_weight, dtype=np.float64),
        "start": None if start is None else np.ascontiguousarray(start, dtype=np.float64),
        "feedback": None if feedback is None else np.ascontiguousarray(feedback, dtype=np.float32),
    }
    _expect("width", width, (count,))
    _expect("reserve", reserved, (count,))
    _expect("row_weight", given["row_weight"], (rows,))
    _expect("start", given["start"], (count, MOST_CENTROIDS))
    _expect("feedback", given["feedback"], (count, count))
    seconds = ctypes.c_double()
    desc = _ColumnsDesc(
        struct_size=ctypes.sizeof(_ColumnsDesc),
        columns=count,
        rows=rows,
        method=METHODS.index(settings.kmeans),
        most_iterations=settings.kmeans_iterations,
        both_sides=settings.outlier_choice == "sides",
        fit_outliers=settings.fit_outliers,
        kernel=kernel.encode() if kernel else None,
        **{name: None if array is None else array.ctypes.data for name, array in given.items()},
        **{name: results[name].ctypes.data for name in _RESULTS},
        feedback_seconds=ctypes.pointer(seconds),
    )
    _call("claq_quantize_columns", desc, threads)
    return CodedColumns(**results, first_outlier=first, feedback_seconds=seconds.value)


def profile_columns(
    target: npt.NDArray[np.float32],
    widths: npt.ArrayLike,
    reserve: npt.ArrayLike,
    most_iterations: int,
    *,
    threads: int | None = None,
    kernel: str | None = None,
) -> npt.NDArray[np.float64]:
    """Summed squared distance of each column to its centroids, by width and by reserved weights.

    Args:
        target: float32 ``[C, N]``.
        widths: code widths.
        reserve: numbers of largest magnitudes to leave out, each less than N.
        most_iterations: Lloyd steps.
        threads, kernel: as for :func:`quantize_columns`.

    Returns:
        float64 ``[C, widths, reserves]``.

    Raises:
        ModelError: as for :func:`quantize_columns`.
    """
    target = np.ascontiguousarray(target, dtype=np.float32)
    width = np.ascontiguousarray(widths, dtype=np.int32)
    reserved = np.ascontiguousarray(reserve, dtype=np.int64)
    error = np.empty((len(target), len(width), len(reserved)))
    desc = _ProfileDesc(
        struct_size=ctypes.sizeof(_ProfileDesc),
        columns=target.shape[0],
        rows=target.shape[1],
        target=target.ctypes.data,
        width=width.ctypes.data,
        widths=len(width),
        reserve=reserved.ctypes.data,
        reserves=len(reserved),
        most_iterations=most_iterations,
        kernel=kernel.encode() if kernel else None,
        error=error.ctypes.data,
    )
    _call("claq_profile_columns", desc, threads)
    return error


def _expect(name: str, array: npt.NDArray[Any] | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ConfigError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")


def _call(name: str, desc: ctypes.Structure, threads: int | None) -> None:
    library, reason = _library()
    if library is None:
        raise ConfigError(f"the native quantizer cannot be used: {reason}")
    message = ctypes.create_string_buffer(_ERROR_SIZE)
    if getattr(library, name)(ctypes.byref(desc), *threads_for(library, threads), message, _ERROR_SIZE):
        raise ModelError(message.value.decode())

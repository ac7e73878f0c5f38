"""The native runtime of claq models: where its library is and how ONNX Runtime gets to know it.

A service needs two lines: ``claq_runtime.register(session_options)`` before it makes its ``InferenceSession``.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "cuda", "kernels", "library_path", "register"]

_LIBRARY = {"darwin": "libclaq.dylib", "win32": "claq.dll"}.get(sys.platform, "libclaq.so")
_registered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def library_path() -> str:
    """Path of libclaq, the shared library with the C interface ``claq.h`` and the ONNX Runtime operators.

    Raises:
        FileNotFoundError: the package was not built (``pip install ./runtime`` builds it).
    """
    folder = Path(__file__).resolve().parent
    for base in (folder, *(Path(entry) for entry in __path__)):
        path = base / _LIBRARY
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"{folder / _LIBRARY} does not exist; build it with: pip install ./runtime")


def register(session_options: Any) -> None:
    """Make the claq operators known to the sessions that will be created from these options.

    A second call with the same options does nothing. Where ONNX Runtime has its CUDA provider but libclaq cannot use the
    GPU, a warning says why; sessions then run the claq operators on the CPU.

    Args:
        session_options: an ``onnxruntime.SessionOptions`` of ONNX Runtime 1.17 or newer.

    Raises:
        FileNotFoundError: libclaq is missing.
    """
    if _registered.get(id(session_options)) is session_options:
        return
    session_options.register_custom_ops_library(library_path())
    _registered[id(session_options)] = session_options
    onnxruntime = sys.modules.get("onnxruntime")
    if onnxruntime is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        usable, reason = cuda()
        if not usable:
            warnings.warn(f"claq operators run on the CPU: {reason}", RuntimeWarning, stacklevel=2)


def cuda() -> tuple[bool, str]:
    """Whether sessions of ONNX Runtime's CUDA provider run ClaqMatMul on the GPU, and what was found or is missing.

    It takes an NVIDIA GPU, its driver, and kernels for its generation (``CLAQ_CUDA_KERNELS``, else the folder ``cuda``
    beside libclaq).
    """
    library = ctypes.CDLL(library_path())
    text = ctypes.create_string_buffer(1024)
    status: int = library.claq_cuda_usable(text, ctypes.c_size_t(len(text)))
    return status == 0, text.value.decode()


def kernels() -> list[str]:
    """Names of the kernel families that this CPU can run, best first; ``CLAQ_KERNEL`` forces one of them."""
    library = ctypes.CDLL(library_path())
    library.claq_kernels.restype = ctypes.c_char_p
    names: bytes = library.claq_kernels()
    return names.decode().split()

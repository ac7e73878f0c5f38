"""claq: turn a trained PyTorch model into a 2-to-4-bit artifact that a service can deploy."""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from .api import ExportResult, export, quantize
    from .backend import requantize_compiled, save_compiled
    from .config import Config
    from .errors import ClaqError
    from .modules import load

__version__ = "0.1.0"

__all__ = ["ClaqError", "Config", "ExportResult", "export", "load", "quantize", "requantize_compiled", "save_compiled"]

# passes/ and kernels/ stand beside this folder in the source tree and inside it once installed. When Python finds the
# source folder first (run from the checkout's root after a plain install), look for them beside it too.
_here = _Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

_LAZY = {
    "ClaqError": "errors",
    "Config": "config",
    "ExportResult": "api",
    "export": "api",
    "load": "modules",
    "quantize": "api",
    "requantize_compiled": "backend",
    "save_compiled": "backend",
}


def __getattr__(name: str) -> _Any:
    # torch and transformers take seconds to import; `claq-export --help` and --version must not wait for them.
    if name in _LAZY:
        return getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

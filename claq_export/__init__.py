"""claq: turn a trained PyTorch model into a 2-to-4-bit artifact that a service can deploy."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# passes/ and kernels/ stand beside this folder in the source tree and inside it once installed. When Python finds the
# source folder first (run from the checkout's root after a plain install), look for them beside it too.
_here = _Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

"""Torch operators of claq and their kernels; importing this package registers ``torch.ops.claq``."""

from __future__ import annotations

# transformers asks for a package called `kernels`; run from the checkout's root it finds this folder and imports it
# under that name. It must look like a package without a version then, and register nothing a second time.
if __name__ != "kernels":
    from .cpu import BACKENDS, backend, use_backend
    from .ops import embedding, linear

    __all__ = ["BACKENDS", "backend", "embedding", "linear", "use_backend"]

"""Which kernel takes how many vectors, and its tile sizes, by GPU generation: the table in ``dispatch.json``.

A generation is looked up by compute capability (``"9.0"``), then by its major number (``"9"``), then ``"default"``.
``source`` in the file says where the numbers come from; an entry that ``benchmarks/gpu/run_all.py --tune
--write-dispatch`` has written names its own file of measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class GemvConfig:
    """Tile of :func:`.gemv.claq_gemv`; ``programs`` a multiprocessor are aimed at when columns are split.

    ``max_vectors`` counts float16 and bfloat16 vectors; a float32 vector is as much work as two.
    """

    max_vectors: int
    lanes: int
    warps: int
    unroll: int
    programs: int


@dataclass(frozen=True)
class GemmConfig:
    """Tile of :func:`.gemm.claq_gemm`, for up to ``max_vectors`` vectors."""

    max_vectors: int
    vectors: int
    lanes: int
    blocks: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class DenseConfig:
    """Tile of :func:`.dequantize.claq_dequantize`; ``bytes`` of dense weight are decoded at a time."""

    lanes: int
    warps: int
    bytes: int


@dataclass(frozen=True)
class GatherConfig:
    """Tile of :func:`.gather.claq_gather`: stored columns of one row, a power of two."""

    columns: int
    warps: int


@dataclass(frozen=True)
class Dispatch:
    """The kernels of a GPU generation: few vectors, some tens (by ascending ``max_vectors``), more; rows by number."""

    gemv: GemvConfig
    gemm: tuple[GemmConfig, ...]
    dense: DenseConfig
    gather: GatherConfig

    def gemm_for(self, vectors: int) -> GemmConfig | None:
        """The tensor-core tile for that many vectors; None: decode to a dense weight."""
        return next((config for config in self.gemm if vectors <= config.max_vectors), None)


@cache
def dispatch_for(major: int, minor: int) -> Dispatch:
    """The table's entry for a compute capability."""
    generations = json.loads((files(__package__) / "dispatch.json").read_text())["generations"]
    keys = (f"{major}.{minor}", str(major), "default")
    entry = next(generations[key] for key in keys if key in generations)
    return Dispatch(
        gemv=GemvConfig(**entry["gemv"]),
        gemm=tuple(GemmConfig(**config) for config in entry["gemm"]),
        dense=DenseConfig(**entry["dense"]),
        gather=GatherConfig(**entry["gather"]),
    )

"""The kernels that are compiled ahead of time: every combination of widths, dtypes and tile sizes the runtime may launch.

The Just-in-time path specializes further (no ``order``, no bias). Ahead of time a layer always has both: the loader makes
an identity order or a zero bias when the file has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..triton.activations import claq_quantize_activations, claq_scale_activations
from ..triton.dequantize import claq_add_outliers, claq_dequantize
from ..triton.dispatch import Dispatch, GemmConfig, dispatch_for
from ..triton.epilogue import claq_finish
from ..triton.fused import claq_add, claq_add_norm, claq_swiglu, claq_take, claq_turn
from ..triton.gather import claq_gather
from ..triton.gemm import claq_gemm
from ..triton.gemv import claq_gemv

DTYPES = ("fp16", "bf16", "fp32")
"""Dtypes of x and y."""

INDICES = ("u16", "i32")
"""Dtypes of ``order`` and ``outlier_index``."""

_WIDTHS = ((2, 1), (3, 1), (4, 1), (432, 1), (432, 0))
"""(WIDTHS, VECTOR): one width alone or any mix with N a multiple of four, and any mix with any N."""


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        name: unique among the variants of a target; what the loader asks for.
        kernel: the Triton function.
        signature: type of every parameter that is not a constant, by name.
        constants: value of every ``tl.constexpr`` parameter, by name.
        num_warps: warps a program.
        tile: output features, vectors and blocks of 32 columns a program takes (0: the grid does not depend on it).
        weights: weights a thread decodes in one turn of the main loop; 0 for kernels without codes.
        multiples: integer parameters that are multiples of 16 in every launch.
        unaligned: pointers that may be anywhere; all others are aligned to 16 bytes.
        most_vectors: for up to how many rows of x the loader takes this kernel (matrix kernels only; a float32 row of
            ``claq_gemv`` counts as two).
        programs: programs a multiprocessor that splitting the columns aims at (matrix kernels only).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, int | bool]
    num_warps: int
    tile: tuple[int, int, int]
    weights: float = 0.0
    multiples: tuple[str, ...] = field(default=("P",))
    unaligned: tuple[str, ...] = ()
    most_vectors: int = 0
    programs: int = 0


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _codes(vector: int) -> str:
    return "*i64" if vector else "*i32"


def _gemv(dispatch: Dispatch) -> Iterator[Variant]:
    config = dispatch.gemv
    for widths, vector in _WIDTHS:
        for rows in range(1, 5):
            yield Variant(
                name=f"gemv_w{widths}_v{vector}_r{rows}",
                kernel=claq_gemv,
                signature={
                    "codes_ptr": _codes(vector),
                    "codebook_ptr": "*i32",
                    "xq_ptr": "*i32",
                    "xs_ptr": "*fp32",
                    "part_ptr": "*fp32",
                    **_integers("N", "P", "blocks4", "blocks3", "blocks2", "splits"),
                },
                constants={
                    "ROWS": rows,
                    "WIDTHS": widths,
                    "VECTOR": vector,
                    "LANES": config.lanes,
                    "WARPS": config.warps,
                    "UNROLL": config.unroll,
                },
                num_warps=config.warps,
                tile=(4 * config.lanes, rows, config.warps * config.unroll),
                weights=4 * config.lanes * config.unroll,
                most_vectors=config.max_vectors,
                programs=config.programs,
            )


def _gemm(config: GemmConfig) -> Iterator[Variant]:
    for widths, vector in _WIDTHS:
        yield Variant(
            name=f"gemm_w{widths}_v{vector}_m{config.vectors}",
            kernel=claq_gemm,
            signature={
                "codes_ptr": _codes(vector),
                "codebook_ptr": "*i32",
                "xh_ptr": "*fp16",
                "part_ptr": "*fp32",
                **_integers("M", "N", "P", "blocks4", "blocks3", "blocks2", "splits"),
            },
            constants={
                "WIDTHS": widths,
                "VECTOR": vector,
                "LANES": config.lanes,
                "VECTORS": config.vectors,
                "BLOCKS": config.blocks,
                "STAGES": config.stages,
            },
            num_warps=config.warps,
            tile=(4 * config.lanes, config.vectors, config.blocks),
            weights=4 * config.lanes * config.blocks / config.warps,
            most_vectors=config.max_vectors,
            programs=config.programs,
        )


def _activations() -> Iterator[Variant]:
    for dtype in DTYPES:
        for index in INDICES:
            for outliers in (0, 1):
                signature = {
                    "x_ptr": f"*{dtype}",
                    "order_ptr": f"*{index}",
                    "scale_ptr": "*fp16",
                    "xf_ptr": "*fp32",
                    "xs_ptr": "*fp32",
                    **_integers("M", "K", "P", "blocks4", "blocks3"),
                }
                constants = {"HAS_ORDER": 1, "HAS_OUTLIERS": outliers}
                yield Variant(
                    name=f"quantize_{dtype}_{index}_o{outliers}",
                    kernel=claq_quantize_activations,
                    signature={**signature, "xq_ptr": "*i16"},
                    constants={**constants, "RESIDUAL": int(dtype == "fp32"), "BLOCKS": 8},
                    num_warps=2,
                    tile=(0, 1, 8),
                )
                if dtype != "fp32":
                    for columns, whole in ((4096, 1), (16384, 1), (2048, 0)):
                        yield Variant(
                            name=f"scale_{dtype}_{index}_o{outliers}_c{columns if whole else 0}",
                            kernel=claq_scale_activations,
                            signature={**signature, "xh_ptr": "*fp16"},
                            constants={**constants, "COLUMNS": columns, "WHOLE": whole},
                            num_warps=8 if columns <= 4096 else 16,
                            tile=(0, 1, 0),
                        )


def _finish() -> Iterator[Variant]:
    for dtype in DTYPES:
        for index in (None, *INDICES):
            for vectors in (1, 4, 16):
                scaled = vectors == 16
                if scaled and dtype == "fp32":
                    continue
                features = 32 if vectors > 4 else 64
                yield Variant(
                    name=f"finish_{dtype}_{index or 'none'}_m{vectors}",
                    kernel=claq_finish,
                    signature={
                        "part_ptr": "*fp32",
                        "xs_ptr": "*fp32",
                        "xf_ptr": "*fp32",
                        "row_scale_ptr": "*fp16",
                        "outlier_ptr_ptr": "*i32",
                        "outlier_index_ptr": f"*{index or 'u16'}",
                        "outlier_value_ptr": "*fp16",
                        "bias_ptr": f"*{dtype}",
                        "y_ptr": f"*{dtype}",
                        **_integers("M", "N", "splits"),
                    },
                    constants={
                        "SCALED": int(scaled),
                        "RESIDUAL": int(dtype == "fp32"),
                        "HAS_OUTLIERS": int(index is not None),
                        "HAS_BIAS": 1,
                        "FEATURES": features,
                        "VECTORS": vectors,
                        "ENTRIES": max(1, 16 // vectors),
                        "SPLITS": max(1, 16 // vectors),
                    },
                    num_warps=4,
                    tile=(features, vectors, 0),
                    multiples=(),
                )


def _dense(dispatch: Dispatch) -> Iterator[Variant]:
    config = dispatch.dense
    for dtype in DTYPES:
        for index in INDICES:
            common = {
                "codebook_ptr": "*i32",
                "scale_ptr": "*fp16",
                "row_scale_ptr": "*fp16",
                "order_ptr": f"*{index}",
                "weight_ptr": f"*{dtype}",
                **_integers("N", "first", "features"),
            }
            for bits in (2, 3, 4):
                yield Variant(
                    name=f"dequantize_w{bits}_{dtype}_{index}",
                    kernel=claq_dequantize,
                    signature={**common, "codes_ptr": "*i64", **_integers("K", "blocks", "first_row", "first_block")},
                    constants={
                        "HAS_ORDER": 1,
                        "BITS": bits,
                        "VECTOR": 1,
                        "LANES": config.lanes,
                        "WARPS": config.warps,
                    },
                    num_warps=config.warps,
                    tile=(4 * config.lanes, 0, config.warps),
                    multiples=("first",),
                )
            yield Variant(
                name=f"outliers_{dtype}_{index}",
                kernel=claq_add_outliers,
                signature={
                    **common,
                    "codes_ptr": "*i32",
                    "codebook_ptr": "*i8",
                    "outlier_ptr_ptr": "*i32",
                    "outlier_index_ptr": f"*{index}",
                    "outlier_value_ptr": "*fp16",
                    **_integers("blocks4", "blocks3"),
                },
                constants={"HAS_ORDER": 1, "FEATURES": 16, "ENTRIES": 16},
                num_warps=4,
                tile=(16, 0, 0),
                multiples=("first",),
            )


def _gather(dispatch: Dispatch) -> Iterator[Variant]:
    config = dispatch.gather
    for dtype in DTYPES:
        for index in INDICES:
            for ids in ("i32", "i64"):
                yield Variant(
                    name=f"gather_{dtype}_{index}_{ids}",
                    kernel=claq_gather,
                    signature={
                        "ids_ptr": f"*{ids}",
                        "codes_ptr": "*i32",
                        "codebook_ptr": "*i8",
                        "scale_ptr": "*fp16",
                        "row_scale_ptr": "*fp16",
                        "order_ptr": f"*{index}",
                        "outlier_ptr_ptr": "*i32",
                        "outlier_index_ptr": f"*{index}",
                        "outlier_value_ptr": "*fp16",
                        "y_ptr": f"*{dtype}",
                        **_integers("N", "K", "P", "blocks4", "blocks3", "outliers"),
                    },
                    constants={"HAS_ORDER": 1, "COLUMNS": config.columns},
                    num_warps=config.warps,
                    tile=(1, 0, config.columns // 32),
                    unaligned=("ids_ptr", "y_ptr"),
                )


def _fused() -> Iterator[Variant]:
    elements = 1024
    for dtype in DTYPES:
        pointer = f"*{dtype}"
        for name, kernel, pointers, integers in (
            ("add", claq_add, ("y_ptr", "residual_ptr"), ("count",)),
            (
                "addnorm",
                claq_add_norm,
                ("y_ptr", "residual_ptr", "weight_ptr", "normalized_ptr"),
                ("columns", "epsilon_bits"),
            ),
            ("swiglu", claq_swiglu, ("product_ptr", "y_ptr"), ("half",)),
            (
                "turn",
                claq_turn,
                ("product_ptr", "cos_ptr", "sin_ptr", "y_ptr"),
                ("N", "first", "columns", "head", "half"),
            ),
            ("take", claq_take, ("product_ptr", "y_ptr"), ("N", "first", "columns")),
        ):
            yield Variant(
                name=f"{name}_{dtype}",
                kernel=kernel,
                signature={**dict.fromkeys(pointers, pointer), **_integers(*integers)},
                constants={"ELEMENTS": elements},
                num_warps=4,
                tile=(elements, 0, 0),
                multiples=(),
                unaligned=pointers,
            )


def variants(target: int) -> list[Variant]:
    """All kernels for a compute capability (80, 90, ...), with the tile sizes of ``kernels/triton/dispatch.json``."""
    dispatch = dispatch_for(target // 10, target % 10)
    tiles = {config.vectors: config for config in dispatch.gemm}
    found = [*_gemv(dispatch), *(v for config in tiles.values() for v in _gemm(config))]
    return [*found, *_activations(), *_finish(), *_dense(dispatch), *_gather(dispatch), *_fused()]

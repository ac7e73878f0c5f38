"""Run a quantized layer or table with the Triton kernels: choose the kernel, allocate workspace, launch.

Every launch goes to the current stream, nothing waits for the GPU and all memory comes from PyTorch's allocator, so
that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from .activations import claq_quantize_activations, claq_scale_activations
from .dequantize import claq_add_outliers, claq_dequantize
from .dispatch import DenseConfig, Dispatch, GemmConfig, GemvConfig, dispatch_for
from .epilogue import claq_finish
from .gather import claq_gather
from .gemm import claq_gemm
from .gemv import claq_gemv

MOST_COLUMNS_AT_ONCE = 16384
"""Columns that one program of :func:`.activations.claq_scale_activations` holds in registers."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class _Layer:
    """A layer's tensors as the kernels read them."""

    codes: torch.Tensor
    wide_codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor
    order: torch.Tensor
    outlier_ptr: torch.Tensor
    outlier_index: torch.Tensor
    outlier_value: torch.Tensor
    bias: torch.Tensor
    in_features: int
    out_features: int
    blocks: tuple[int, int, int]

    @property
    def columns(self) -> int:
        return 32 * sum(self.blocks)

    @property
    def vector(self) -> bool:
        return self.wide_codes.dtype == torch.int64

    @property
    def widths(self) -> int:
        """The WIDTHS of the kernel to use: one width alone, or all."""
        present = [width for width, blocks in zip((4, 3, 2), self.blocks, strict=True) if blocks]
        return present[0] if len(present) == 1 and self.vector else 432

    @property
    def has_order(self) -> bool:
        return self.order.numel() > 0

    @property
    def has_outliers(self) -> bool:
        return self.outlier_index.numel() > 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@cache
def _device(index: int) -> tuple[Dispatch, int]:
    properties = torch.cuda.get_device_properties(index)
    return dispatch_for(properties.major, properties.minor), properties.multi_processor_count


def splits_of(layer_blocks: Sequence[int], tiles: int, step: int, programs: int) -> int:
    """Into how many parts the columns are split, so that about ``programs`` programs run and none is idle.

    Args:
        layer_blocks: blocks of 32 columns of each width.
        tiles: programs there are without splitting.
        step: blocks a program takes at once.
        programs: programs wanted.
    """
    steps = sum(-(-blocks // step) for blocks in layer_blocks)
    wanted = max(1, min(steps, programs // tiles))
    # As many as give every split the same number of steps but the last: more would be no faster.
    return -(-steps // -(-steps // wanted))


def _finish(
    layer: _Layer,
    part: torch.Tensor,
    xs: torch.Tensor | None,
    xf: torch.Tensor,
    y: torch.Tensor,
    residual: bool,
) -> None:
    M, N = y.shape
    vectors = min(16, triton.next_power_of_2(M))
    features = 32 if vectors > 4 else 64
    claq_finish[(triton.cdiv(N, features), triton.cdiv(M, vectors))](
        part,
        part if xs is None else xs,
        xf,
        layer.row_scale,
        layer.outlier_ptr,
        layer.outlier_index,
        layer.outlier_value,
        layer.bias,
        y,
        M,
        N,
        part.shape[0],
        SCALED=xs is not None,
        RESIDUAL=residual,
        HAS_OUTLIERS=layer.has_outliers,
        HAS_BIAS=layer.bias.numel() > 0,
        FEATURES=features,
        VECTORS=vectors,
        ENTRIES=max(1, 16 // vectors),
        SPLITS=max(1, 16 // vectors),
        num_warps=4,
    )


def _few(layer: _Layer, x: torch.Tensor, y: torch.Tensor, config: GemvConfig, multiprocessors: int) -> None:
    M, K = x.shape
    N, P = layer.out_features, layer.columns
    residual = x.dtype == torch.float32
    rows = 2 * M if residual else M
    xq = torch.empty(rows, P, dtype=torch.int16, device=x.device)
    xs = torch.empty(rows, P // 32, dtype=torch.float32, device=x.device)
    xf = torch.empty((P, M) if layer.has_outliers else 0, dtype=torch.float32, device=x.device)
    claq_quantize_activations[(triton.cdiv(P, 32 * 8), M)](
        x,
        layer.order,
        layer.scale,
        xq,
        xs,
        xf,
        M,
        K,
        P,
        layer.blocks[0],
        layer.blocks[1],
        HAS_ORDER=layer.has_order,
        HAS_OUTLIERS=layer.has_outliers,
        RESIDUAL=residual,
        BLOCKS=8,
        num_warps=2,
    )
    tiles = triton.cdiv(N, 4 * config.lanes)
    splits = splits_of(layer.blocks, tiles, config.warps * config.unroll, config.programs * multiprocessors)
    part = torch.empty(splits, rows, N, dtype=torch.float32, device=x.device)
    claq_gemv[(tiles, splits)](
        layer.wide_codes,
        layer.codebook.view(torch.int32),
        xq.view(torch.int32),
        xs,
        part,
        N,
        P,
        *layer.blocks,
        splits,
        ROWS=rows,
        WIDTHS=layer.widths,
        VECTOR=layer.vector,
        LANES=config.lanes,
        WARPS=config.warps,
        UNROLL=config.unroll,
        num_warps=config.warps,
    )
    _finish(layer, part, None, xf, y, residual)


def _tens(layer: _Layer, x: torch.Tensor, y: torch.Tensor, config: GemmConfig, multiprocessors: int) -> None:
    M, K = x.shape
    N, P = layer.out_features, layer.columns
    xh = torch.empty(M, P, dtype=torch.float16, device=x.device)
    xs = torch.empty(M, dtype=torch.float32, device=x.device)
    xf = torch.empty((P, M) if layer.has_outliers else 0, dtype=torch.float32, device=x.device)
    whole = P <= MOST_COLUMNS_AT_ONCE
    columns = max(1024, triton.next_power_of_2(P)) if whole else 2048
    claq_scale_activations[(M,)](
        x,
        layer.order,
        layer.scale,
        xh,
        xs,
        xf,
        M,
        K,
        P,
        layer.blocks[0],
        layer.blocks[1],
        HAS_ORDER=layer.has_order,
        HAS_OUTLIERS=layer.has_outliers,
        COLUMNS=columns,
        WHOLE=whole,
        num_warps=8 if columns <= 4096 else 16,
    )
    tiles = triton.cdiv(N, 4 * config.lanes)
    vectors = triton.cdiv(M, config.vectors)
    splits = splits_of(layer.blocks, tiles * vectors, config.blocks, config.programs * multiprocessors)
    part = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    claq_gemm[(tiles, vectors, splits)](
        layer.wide_codes,
        layer.codebook.view(torch.int32),
        xh,
        part,
        M,
        N,
        P,
        *layer.blocks,
        splits,
        WIDTHS=layer.widths,
        VECTOR=layer.vector,
        LANES=config.lanes,
        VECTORS=config.vectors,
        BLOCKS=config.blocks,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    _finish(layer, part, xs, xf, y, residual=False)


def _decode(layer: _Layer, weight: torch.Tensor, first: int, config: DenseConfig) -> None:
    """Fill ``weight [K, features]`` with the dense weight of output features ``first`` and on."""
    features = weight.shape[1]
    codebook, row, block = layer.codebook, 0, 0
    for width, blocks in zip((4, 3, 2), layer.blocks, strict=True):
        if blocks:
            claq_dequantize[(triton.cdiv(features, 4 * config.lanes), triton.cdiv(blocks, config.warps))](
                layer.wide_codes,
                codebook.view(torch.int32),
                layer.scale,
                layer.row_scale,
                layer.order,
                weight,
                layer.out_features,
                layer.in_features,
                first,
                features,
                blocks,
                row,
                block,
                HAS_ORDER=layer.has_order,
                BITS=width,
                VECTOR=layer.vector,
                LANES=config.lanes,
                WARPS=config.warps,
                num_warps=config.warps,
            )
        codebook, row, block = codebook[(32 << width) * blocks :], row + width * blocks, block + blocks
    if layer.has_outliers:
        claq_add_outliers[(triton.cdiv(features, 16),)](
            layer.codes,
            layer.codebook,
            layer.scale,
            layer.row_scale,
            layer.order,
            layer.outlier_ptr,
            layer.outlier_index,
            layer.outlier_value,
            weight,
            layer.out_features,
            first,
            features,
            layer.blocks[0],
            layer.blocks[1],
            HAS_ORDER=layer.has_order,
            FEATURES=16,
            ENTRIES=16,
            num_warps=4,
        )


def _many(layer: _Layer, x: torch.Tensor, y: torch.Tensor, config: DenseConfig) -> None:
    K, N, tile = layer.in_features, layer.out_features, 4 * config.lanes
    features = max(tile, config.bytes // (K * x.element_size()) // tile * tile)
    bias = layer.bias.to(x.dtype) if layer.bias.numel() else None
    for first in range(0, N, features):
        weight = torch.empty(K, min(features, N - first), dtype=x.dtype, device=x.device)
        _decode(layer, weight, first, config)
        part = slice(first, first + weight.shape[1])
        y[:, part] = x @ weight if bias is None else torch.addmm(bias[part], x, weight)


def kernel_for(x: torch.Tensor, in_features: int) -> str:
    """Name of the matrix kernel that :func:`linear` takes for a CUDA tensor ``x [..., in_features]``."""
    vectors = x.numel() // in_features
    dispatch, _ = _device(x.device.index)
    gemm = None if x.dtype == torch.float32 else dispatch.gemm_for(vectors)
    few = vectors * 2 if x.dtype == torch.float32 else vectors
    if few <= dispatch.gemv.max_vectors:
        return f"gemv{few}"
    return f"gemm{gemm.vectors}" if gemm else "dense"


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    order: torch.Tensor,
    outlier_ptr: torch.Tensor,
    outlier_index: torch.Tensor,
    outlier_value: torch.Tensor,
    bias: torch.Tensor,
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    accuracy_level: int = 0,
    *,
    dispatch: Dispatch | None = None,
) -> torch.Tensor:
    """``y = x Wᵀ + b`` of a layer of ``docs/format.md``; arguments as :func:`..reference.reference_linear`.

    Args:
        accuracy_level: not read. Activations are int16 (few vectors), float16 with a scale a vector (some tens) or as
            they are; all are closer to float32 than the int8 of level 4.
        dispatch: kernels and tile sizes; those of the device when absent.

    Returns:
        ``[..., out_features]``, contiguous, in the dtype of ``x`` (float32, float16 or bfloat16).
    """
    rows = x.reshape(-1, in_features).contiguous()
    y = torch.empty(rows.shape[0], out_features, dtype=x.dtype, device=x.device)
    # On CPU tensors Triton's interpreter runs the programs one after the other.
    table, multiprocessors = _device(x.device.index) if x.is_cuda else (None, 1)
    dispatch = dispatch or table
    if dispatch is None:
        raise ValueError("a dispatch table is needed for tensors that are not on a GPU")
    words = _aligned(codes).view(torch.int32)
    layer = _Layer(
        codes=words,
        wide_codes=words.view(torch.int64) if out_features % 4 == 0 else words,
        codebook=_aligned(codebook),
        scale=scale.contiguous(),
        row_scale=row_scale.contiguous(),
        order=order.contiguous(),
        outlier_ptr=outlier_ptr.contiguous(),
        outlier_index=outlier_index.contiguous(),
        outlier_value=outlier_value.contiguous(),
        bias=bias.contiguous(),
        in_features=in_features,
        out_features=out_features,
        blocks=(columns[0] // 32, columns[1] // 32, columns[2] // 32),
    )
    M = rows.shape[0]
    few = M * 2 if x.dtype == torch.float32 else M
    gemm = None if x.dtype == torch.float32 else dispatch.gemm_for(M)
    if M == 0:
        pass
    elif few <= dispatch.gemv.max_vectors:
        _few(layer, rows, y, dispatch.gemv, multiprocessors)
    elif gemm is not None:
        _tens(layer, rows, y, gemm, multiprocessors)
    else:
        _many(layer, rows, y, dispatch.dense)
    return y.reshape(*x.shape[:-1], out_features)


def embedding(
    indices: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    order: torch.Tensor,
    outlier_ptr: torch.Tensor,
    outlier_index: torch.Tensor,
    outlier_value: torch.Tensor,
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    dtype: torch.dtype,
    *,
    dispatch: Dispatch | None = None,
) -> torch.Tensor:
    """Rows of a layer's weight; arguments as :func:`..reference.reference_embedding`.

    Args:
        dispatch: tile sizes; those of the device when absent.

    Returns:
        ``[*indices.shape, in_features]`` of ``dtype``, contiguous; NaN where an index is out of range.
    """
    ids = indices.reshape(-1).contiguous()
    y = torch.empty(ids.numel(), in_features, dtype=dtype, device=ids.device)
    table = _device(ids.device.index)[0] if ids.is_cuda else None
    dispatch = dispatch or table
    if dispatch is None:
        raise ValueError("a dispatch table is needed for tensors that are not on a GPU")
    stored = sum(columns)
    if ids.numel():
        claq_gather[(ids.numel(), triton.cdiv(stored, dispatch.gather.columns))](
            ids,
            codes.contiguous().view(torch.int32),
            codebook.contiguous(),
            scale.contiguous(),
            row_scale.contiguous(),
            order.contiguous(),
            outlier_ptr.contiguous(),
            outlier_index.contiguous(),
            outlier_value.contiguous(),
            y,
            out_features,
            in_features,
            stored,
            columns[0] // 32,
            columns[1] // 32,
            outlier_index.numel(),
            HAS_ORDER=order.numel() > 0,
            COLUMNS=dispatch.gather.columns,
            num_warps=dispatch.gather.warps,
        )
    return y.reshape(*indices.shape, in_features)

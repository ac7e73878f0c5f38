"""Random quantized layers and the dense weights they stand for, computed one weight at a time from docs/format.md."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from claq_export.format.layer import QuantizedLinear, assemble


def random_layer(
    in_features: int,
    out_features: int,
    widths: tuple[int, ...] = (4,),
    *,
    outliers: float = 0.0,
    full_row: bool = False,
    seed: int = 0,
) -> QuantizedLinear:
    """A layer whose columns draw their width from ``widths``; ``full_row`` reserves every weight of the last output."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor(widths)[torch.randint(len(widths), (in_features,), generator=generator)]
    codes = torch.stack([torch.randint(0, 2 ** int(b), (out_features,), generator=generator) for b in bits])
    reserved = torch.rand(out_features, in_features, generator=generator) < outliers
    if full_row:
        reserved[-1] = True
    extra = torch.randn(out_features, in_features, generator=generator) * 100 * reserved
    return assemble(
        codes,
        torch.randint(-128, 128, (in_features, 16), dtype=torch.int8, generator=generator),
        torch.rand(in_features, generator=generator) * 0.01 + 1e-3,
        torch.rand(out_features, generator=generator) - 0.5,
        bits,
        extra if reserved.any() else None,
    )


@st.composite
def layers(draw: st.DrawFn, max_features: int = 80) -> QuantizedLinear:
    """Any mix of widths, padding, order and outliers."""
    return random_layer(
        draw(st.integers(1, max_features)),
        draw(st.integers(1, 40)),
        tuple(draw(st.sets(st.sampled_from([2, 3, 4]), min_size=1))),
        outliers=draw(st.sampled_from([0.0, 0.02, 0.5])),
        full_row=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


def arguments(
    layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None, accuracy_level: int = 0
) -> tuple[object, ...]:
    """Arguments of ``claq::linear``."""
    return (
        x,
        *layer.tensors().values(),
        torch.zeros(0) if bias is None else bias,
        layer.in_features,
        layer.out_features,
        list(layer.columns),
        accuracy_level,
    )


def dense_weight(layer: QuantizedLinear) -> torch.Tensor:
    """float64 ``W[N, K]``, read weight by weight as docs/format.md says; shares no code with the package."""
    N, K = layer.out_features, layer.in_features
    words = layer.codes.view(torch.int32).tolist()
    codebook, scale, row_scale = layer.codebook.tolist(), layer.scale.tolist(), layer.row_scale.tolist()
    order = layer.order.tolist() or list(range(layer.stored_columns))
    ptr, index, value = layer.outlier_ptr.tolist(), layer.outlier_index.tolist(), layer.outlier_value.tolist()
    extra = {(n, index[i]): value[i] for n in range(N if ptr else 0) for i in range(ptr[n], ptr[n + 1])}
    weight = torch.zeros(N, K, dtype=torch.float64)
    column = row = entry = 0
    for width, count in zip((4, 3, 2), layer.columns, strict=True):
        for _ in range(count // 32):
            for i in range(32):
                feature = order[column]
                for n in range(N if feature < K else 0):
                    if width == 3:
                        low = words[row + i // 16][n] >> 2 * (i % 16) & 3
                        code = low + 4 * (words[row + 2][n] >> i & 1)
                    else:
                        per_word = 32 // width
                        code = words[row + i // per_word][n] >> width * (i % per_word) & (1 << width) - 1
                    decoded = codebook[entry + code] + extra.get((n, column), 0.0)
                    weight[n, feature] = row_scale[n] * scale[column] * decoded
                entry += 1 << width
                column += 1
            row += width
    return weight

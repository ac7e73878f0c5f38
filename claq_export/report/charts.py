"""The report's pictures as inline SVG, coloured by CSS classes so that they follow the page's light and dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from .data import PARTS, LayerRecord

HEAT_WIDTH = 960
HEAT_BINS = 384
_FEW_ROWS = 60
_LABEL_WIDTH = 250


def share_bar(sizes: Mapping[str, int], width: int = 1000, height: int = 26) -> str:
    """One stacked bar over :data:`PARTS`."""
    total = sum(sizes.values()) or 1
    x, pieces = 0.0, []
    for part in PARTS:
        piece = sizes.get(part, 0) / total * width
        if piece:
            tip = f"{part}: {sizes[part]:,} bytes, {sizes[part] / total:.2%}"
            pieces.append(
                f'<rect class="part-{part}" x="{x:.2f}" y="0" width="{piece:.2f}" height="{height}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        x += piece
    return (
        f'<svg class="share" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="bytes by part">{"".join(pieces)}</svg>'
    )


def accounting_bars(layers: Sequence[LayerRecord]) -> str:
    """True bits of every layer, stacked by part, on one scale."""
    top = max((layer.true_bits for layer in layers), default=1.0)
    row, plot = _row_height(len(layers)), HEAT_WIDTH - _LABEL_WIDTH - 60
    lines = []
    for number, layer in enumerate(layers):
        y, x = number * row, float(_LABEL_WIDTH)
        lines.append(_row_label(layer.name, y, row))
        for part in PARTS:
            bits = 8 * layer.bytes.get(part, 0) / (layer.in_features * layer.out_features)
            wide = bits / top * plot
            if wide > 0:
                tip = f"{layer.name}\n{part}: {bits:.4f} bits a weight"
                lines.append(
                    f'<rect class="part-{part}" x="{x:.2f}" y="{y + 1}" width="{wide:.2f}" height="{row - 2}">'
                    f"<title>{escape(tip)}</title></rect>"
                )
            x += wide
        lines.append(f'<text class="value" x="{x + 5:.1f}" y="{y + row / 2:.1f}">{layer.true_bits:.3f}</text>')
    return _svg(lines, len(layers), "true bits of each layer by part")


def outlier_bars(layers: Sequence[LayerRecord]) -> str:
    """Share of reserved weights of every layer."""
    top = max((layer.outlier_share for layer in layers), default=0.0) or 1.0
    row, plot = _row_height(len(layers)), HEAT_WIDTH - _LABEL_WIDTH - 60
    lines = []
    for number, layer in enumerate(layers):
        y, wide = number * row, layer.outlier_share / top * plot
        lines.append(_row_label(layer.name, y, row))
        lines.append(
            f'<rect class="part-outliers" x="{_LABEL_WIDTH}" y="{y + 1}" width="{wide:.2f}" height="{row - 2}"/>'
            f'<text class="value" x="{_LABEL_WIDTH + wide + 5:.1f}" y="{y + row / 2:.1f}">'
            f"{layer.outlier_share:.3%}</text>"
        )
    return _svg(lines, len(layers), "share of reserved weights of each layer")


def width_heat_map(layers: Sequence[LayerRecord]) -> str:
    """Column widths: a row a layer, input features from left to right; a cell is the mean width of its columns."""
    row, plot = _row_height(len(layers)), HEAT_WIDTH - _LABEL_WIDTH
    bins = HEAT_BINS if len(layers) <= _FEW_ROWS else HEAT_BINS // 2
    lines = []
    for number, layer in enumerate(layers):
        y = number * row
        lines.append(_row_label(layer.name, y, row))
        cells = bin_means(layer.column_bits, bins)
        # Neighbouring cells of one colour become one rectangle: pages of large models stay small.
        start = 0
        for i in range(1, len(cells) + 1):
            if i < len(cells) and _shade(cells[i]) == _shade(cells[start]):
                continue
            x0 = _LABEL_WIDTH + start / len(cells) * plot
            x1 = _LABEL_WIDTH + i / len(cells) * plot
            first = start * layer.in_features // len(cells)
            last = i * layer.in_features // len(cells) - 1
            mean = sum(cells[start:i]) / (i - start)
            tip = f"{layer.name}\ninput features {first} to {last}: {mean:.2f} bits"
            lines.append(
                f'<rect class="w{_shade(cells[start])}" x="{x0:.2f}" y="{y + 0.5}" width="{x1 - x0:.2f}" '
                f'height="{row - 1}"><title>{escape(tip)}</title></rect>'
            )
            start = i
    return _svg(lines, len(layers), "heat map of column widths")


def bin_means(values: Sequence[int], bins: int) -> list[float]:
    """Means of ``values`` over at most ``bins`` equal runs."""
    bins = min(bins, len(values))
    edges = [i * len(values) // bins for i in range(bins + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _shade(bits: float) -> int:
    """A width of 2.0 to 4.0 as one of the style sheet's shades 20, 22, ... 40."""
    return 20 + 2 * round((min(max(bits, 2.0), 4.0) - 2.0) * 5)


def _row_height(rows: int) -> int:
    return 18 if rows <= _FEW_ROWS else 13


def _row_label(name: str, y: int, row: int) -> str:
    shown = name if len(name) <= 40 else "…" + name[-39:]
    return (
        f'<text class="label" x="{_LABEL_WIDTH - 8}" y="{y + row / 2:.1f}" text-anchor="end">{escape(shown)}'
        f"<title>{escape(name)}</title></text>"
    )


def _svg(lines: Sequence[str], rows: int, label: str) -> str:
    row = _row_height(rows)
    return (
        f'<svg class="rows" viewBox="0 0 {HEAT_WIDTH} {rows * row}" role="img" aria-label="{escape(label)}" '
        f'font-size="{11 if row > 15 else 9.5}">{"".join(lines)}</svg>'
    )

"""Writes the report: one HTML file with its style, script, data and pictures inside; nothing is loaded from
anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .charts import accounting_bars, outlier_bars, share_bar, width_heat_map
from .data import PARTS, LayerRecord, ReportData

_PART_NAMES = {
    "codes": "codes",
    "codebooks": "codebooks",
    "scales": "scales",
    "order": "column order",
    "outliers": "outliers",
    "padding": "padding",
}


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page; an earlier file of that name is replaced only once the new one is complete.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(render_report(data), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write the report {str(path)!r}: {error.strerror or error}") from error
    return path


def render_report(data: ReportData) -> str:
    """The page as a string."""
    own = resources.files(__package__)
    style = (own / "report.css").read_text(encoding="utf-8")
    script = (own / "report.js").read_text(encoding="utf-8")
    sections = [
        _header(data),
        _tiles(data),
        _quality(data),
        _budget(data),
        _accounting(data),
        _layers(data),
        _widths(data),
        _outliers(data),
        _columns(data),
        _settings(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.model)} · claq report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<script type="application/json" id="columns">{_embedded(_column_data(data))}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def human_size(count: float) -> str:
    """Bytes as people write them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{2 if abs(count) < 100 else 1}f} {unit}"
        count /= 1000
    raise AssertionError


def _header(data: ReportData) -> str:
    versions = " · ".join(f"{escape(name)} {escape(version)}" for name, version in data.versions.items())
    line = f"claq report · {versions}" if versions else "claq report"
    return f'<header><h1>{escape(data.model)}</h1><p class="dim">{line}</p></header>'


def _tile(value: str, label: str, note: str = "") -> str:
    kind = "tile wide" if "arrow" in value else "tile"
    return (
        f'<div class="{kind}"><div class="number">{value}</div><div class="name">{escape(label)}</div>'
        f'<div class="dim">{escape(note)}</div></div>'
    )


def _tiles(data: ReportData) -> str:
    errors = [layer.error for layer in data.layers if layer.error is not None]
    tiles = [
        _tile(
            f"{human_size(data.size_before)} <span class='arrow'>→</span> {human_size(data.size_after)}",
            "model size",
            f"{data.size_before / max(1, data.size_after):.2f} times smaller",
        ),
        _tile(f"{data.mean('true_bits'):.3f}", "true bits a weight", "everything counted, over the quantized layers"),
        _tile(f"{data.mean('nominal_bits'):.3f}", "nominal bits", "as the paper counts"),
    ]
    if errors:
        tiles.append(_tile(f"{sum(errors) / len(errors):.2%}", "mean layer error", f"largest {max(errors):.2%}"))
    for row in data.quality[:2]:
        tiles.append(
            _tile(escape(row.quantized), row.measure, f"original {row.original}" if row.original else row.remark)
        )
    if data.seconds is not None:
        tiles.append(
            _tile(_duration(data.seconds), "time", f"{len(data.layers)} layers, {data.weights / 1e6:.1f} M weights")
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _quality(data: ReportData) -> str:
    if not data.quality:
        return ""
    rows = [
        (escape(r.measure), escape(r.original), f"<b>{escape(r.quantized)}</b>", escape(r.remark)) for r in data.quality
    ]
    return f"<section><h2>Quality</h2>{_table(('measure', 'original', 'quantized', ''), rows, 'quality')}</section>"


def _budget(data: ReportData) -> str:
    budget = data.budget
    if budget is None:
        return ""
    difference = f"{round(100 * (budget.found / budget.asked - 1), 2) + 0.0:+.2f}%"  # + 0.0: no minus before a zero
    what = "whole artifact" if budget.weights is None else "quantized layers"
    rows = [(what, human_size(budget.asked), human_size(budget.found), difference)]
    if budget.weights is not None:
        asked, found = (f"{8 * size / budget.weights:.4f}" for size in (budget.asked, budget.found))
        rows.append(("true bits a weight", asked, found, difference))
    floors = ", ".join(f"{pattern}: {width} bits" for pattern, width in budget.floors.items())
    return (
        "<section><h2>Bit budget</h2><p class='dim'>Columns of all layers and reserved weights competed for these bits; "
        f"least widths set: {escape(floors) if floors else 'none'}.</p>"
        f"{_table(('', 'asked', 'found', 'difference'), rows, 'budget')}</section>"
    )


def _accounting(data: ReportData) -> str:
    sizes = data.bytes_by_part()
    total = sum(sizes.values()) or 1
    legend = "".join(
        f'<tr><td><span class="swatch part-{part}"></span>{_PART_NAMES[part]}</td><td>{human_size(sizes[part])}</td>'
        f"<td>{8 * sizes[part] / max(1, data.weights):.4f}</td><td>{sizes[part] / total:.2%}</td></tr>"
        for part in PARTS
    )
    rest = data.size_after - total
    note = (
        f"<p class='dim'>The quantized layers take {human_size(total)}; the other {human_size(rest)} of the file "
        f"are norms, biases, tables and layers left alone, and the graph.</p>"
        if rest > 0
        else ""
    )
    return (
        "<section><h2>Where the bits go</h2>"
        "<p class='dim'>True bits a weight count every byte the artifact spends on a layer's weight; see "
        "docs/format.md.</p>"
        f"{share_bar(sizes)}"
        "<div class='scroll'><table class='legend'><thead><tr><th>part</th><th>size</th><th>bits a "
        "weight</th><th>share</th></tr>"
        f"</thead><tbody>{legend}<tr class='sum'><td>all</td><td>{human_size(total)}</td>"
        f"<td>{8 * total / max(1, data.weights):.4f}</td><td>100%</td></tr></tbody></table></div>{note}"
        f"<details><summary>every layer</summary>{accounting_bars(data.layers)}</details></section>"
    )


def _layers(data: ReportData) -> str:
    most = max((layer.error or 0 for layer in data.layers), default=0) or 1

    def cell(value: float | str, shown: str, bar: float = 0.0) -> str:
        strip = f'<span class="bar" style="width:{100 * bar:.1f}%"></span>' if bar else ""
        return f'<td data-value="{escape(str(value))}">{strip}<span class="over">{shown}</span></td>'

    def row(number: int, layer: LayerRecord) -> str:
        name = escape(layer.name)
        if layer.kind:
            name += f'<div class="dim">{escape(layer.kind)}</div>'
        if layer.parts:
            name += f'<div class="dim">stacked: {escape(_short_names(layer.parts))}</div>'
        return (
            f"<tr>{cell(number, str(number + 1))}{cell(layer.name, name)}"
            f"{cell(layer.in_features * layer.out_features, f'{layer.out_features} × {layer.in_features}')}"
            f"{cell(layer.true_bits, f'{layer.true_bits:.3f}')}{cell(layer.nominal_bits, f'{layer.nominal_bits:.3f}')}"
            + (cell(-1, "–") if layer.error is None else cell(layer.error, f"{layer.error:.3%}", layer.error / most))
            + f"{cell(layer.outlier_share, f'{layer.outlier_share:.2%}')}"
            f"{cell(sum(layer.bytes.values()), human_size(sum(layer.bytes.values())))}"
            f"{cell(layer.seconds, f'{layer.seconds:.2f}')}</tr>"
        )

    heads = ("#", "layer", "weight", "true bits", "nominal", "error", "outliers", "size", "seconds")
    buttons = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in heads)
    body = "".join(row(number, layer) for number, layer in enumerate(data.layers))
    skipped = ""
    if data.skipped:
        rows = [(escape(name), escape(reason)) for name, reason in data.skipped.items()]
        skipped = (
            f"<details><summary>{len(rows)} layers left alone</summary>{_table(('layer', 'reason'), rows)}</details>"
        )
    return (
        "<section><h2>Layers</h2><p class='dim'>Error: relative output error on the calibration data, of an embedding "
        "relative error of its rows. Click a heading to sort.</p>"
        f'<div class="scroll tall"><table class="layers '
        f'sortable"><thead><tr>{buttons}</tr></thead><tbody>{body}</tbody>'
        f"</table></div>{skipped}</section>"
    )


def _short_names(names: Sequence[str]) -> str:
    """Names without the modules that all of them share."""
    modules = [name.split(".") for name in names]
    shared = 0
    while len({tuple(path[: shared + 1]) for path in modules}) == 1 and all(len(path) > shared + 1 for path in modules):
        shared += 1
    return ", ".join(".".join(path[shared:]) for path in modules)


def _widths(data: ReportData) -> str:
    counts = {width: sum(list(layer.column_bits).count(width) for layer in data.layers) for width in (4, 3, 2)}
    total = sum(counts.values()) or 1
    legend = " ".join(
        f'<span class="key"><span class="swatch w{width}0"></span>{width} bits: {counts[width] / total:.1%} of the '
        f"columns</span>"
        for width in (4, 3, 2)
        if counts[width]
    )
    return (
        "<section><h2>Column widths</h2><p class='dim'>Input features from left to right; each cell is the mean "
        "width of its "
        f"columns.</p><p>{legend}</p>{width_heat_map(data.layers)}</section>"
    )


def _outliers(data: ReportData) -> str:
    if not any(layer.outlier_share for layer in data.layers):
        return (
            "<section><h2>Outliers</h2><p class='dim'>No weight is reserved: every weight is a code of its column's "
            "codebook.</p></section>"
        )
    return (
        "<section><h2>Outliers</h2><p class='dim'>Share of weights kept apart in float16; "
        f"{data.mean('outlier_share'):.3%} over all layers.</p>{outlier_bars(data.layers)}</section>"
    )


def _column_data(data: ReportData) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer.name,
            "samples": [
                {
                    "feature": s.feature,
                    "bits": s.bits,
                    "low": s.low,
                    "high": s.high,
                    "counts": list(s.counts),
                    "centroids": list(s.centroids),
                    "outliers": list(s.outliers),
                }
                for s in layer.samples
            ],
        }
        for layer in data.layers
        if layer.samples
    ]


def _columns(data: ReportData) -> str:
    if not any(layer.samples for layer in data.layers):
        return ""
    return (
        "<section class='explorer'><h2>A column and its codebook</h2>"
        "<p class='dim'>Weights of one input feature, divided by their row scales; lines are the centroids, dots "
        "the reserved "
        "weights.</p><p><label>layer <select id='layer'></select></label> <label>column <select "
        "id='column'></select></label></p>"
        "<div id='histogram'></div></section>"
    )


def _settings(data: ReportData) -> str:
    if not data.config:
        return ""
    rows = [(escape(name), f"<code>{escape(_plain(value))}</code>") for name, value in data.config.items()]
    return f"<section><h2>Settings</h2>{_table(('setting', 'value'), rows, 'settings')}</section>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_plain(inner)}" for key, inner in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "–"
    return "–" if value is None else str(value)

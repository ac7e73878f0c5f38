"""What a report shows, as plain dataclasses, and how a layer's record is read off its stored form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..format.layer import QuantizedLinear
from ..format.packing import WIDTHS

PARTS = ("codes", "codebooks", "scales", "order", "outliers", "padding")
"""What the bytes of a layer are spent on; see :func:`bytes_by_part`."""

HISTOGRAM_BINS = 60


@dataclass(frozen=True)
class ColumnSample:
    """One column of a layer, to be looked at.

    Attributes:
        feature: input feature.
        bits: its code width.
        low, high: range of the histogram.
        counts: weights in each of equally wide bins from ``low`` to ``high``, each weight divided by its row scale.
        centroids: codebook in the same unit, ascending.
        outliers: reserved weights in the same unit.
    """

    feature: int
    bits: int
    low: float
    high: float
    counts: Sequence[int]
    centroids: Sequence[float]
    outliers: Sequence[float] = ()


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer.

    Attributes:
        name: of the layer, or of the first of several stacked ones.
        in_features, out_features: K and N.
        true_bits, nominal_bits: a weight; docs/format.md.
        error: relative output error on the calibration data, tr(dW H dW^T) / tr(W H W^T); None where it was not
            measured.
        seconds: time to quantize it.
        column_bits: width of each input feature's column.
        bytes: by part, keys of :data:`PARTS`.
        outlier_share: reserved weights over all weights.
        parts: names of the layers stacked in it; empty for a single layer.
        samples: columns for the column view.
        kind: what the layer is if not an ordinary linear: "embedding", "output head", ...
    """

    name: str
    in_features: int
    out_features: int
    true_bits: float
    nominal_bits: float
    error: float | None
    seconds: float
    column_bits: Sequence[int]
    bytes: Mapping[str, int]
    outlier_share: float = 0.0
    parts: Sequence[str] = ()
    samples: Sequence[ColumnSample] = ()
    kind: str = ""


@dataclass(frozen=True)
class QualityRow:
    """One measure: its name, the original's value, the quantized model's, and a remark. Values are printed as they
    are."""

    measure: str
    original: str
    quantized: str
    remark: str = ""


@dataclass(frozen=True)
class BudgetRecord:
    """What a bit budget asked for, and where the plan of all columns landed.

    Attributes:
        asked, found: bytes.
        weights: to count ``asked`` and ``found`` in true bits a weight; None where the budget was the size of the whole
            artifact.
        floors: least width in bits by pattern, as the user set them.
    """

    asked: int
    found: int
    weights: int | None = None
    floors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        model: name of the model.
        layers: in order of execution.
        size_before, size_after: bytes of the whole model file(s).
        config: settings of the run.
        quality: rows of the quality table; may be empty.
        seconds: time of the whole run; None leaves it out.
        versions: of claq and what it ran with.
        skipped: linears left alone, with the reason.
        budget: None where every layer was planned for itself.
    """

    model: str
    layers: Sequence[LayerRecord]
    size_before: int
    size_after: int
    config: Mapping[str, Any] = field(default_factory=dict)
    quality: Sequence[QualityRow] = ()
    seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    budget: BudgetRecord | None = None

    @property
    def weights(self) -> int:
        """Quantized weights."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    def mean(self, attribute: str) -> float:
        """Mean of a layer's attribute over all weights (each layer counts by its size)."""
        total = sum(getattr(la, attribute) * la.in_features * la.out_features for la in self.layers)
        return total / self.weights if self.weights else 0.0

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of all layers by part."""
        return {part: sum(layer.bytes.get(part, 0) for layer in self.layers) for part in PARTS}


def bytes_by_part(layer: QuantizedLinear) -> dict[str, int]:
    """All bytes that count as true bits, by what they are spent on; their sum is the layer's size.

    ``padding`` is what the stored columns that stand for no input feature take (codes, codebooks, scales, order).
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in layer.tensors().items()}
    real = torch.bincount(layer.column_bits().to(torch.int64), minlength=5)
    padding = {"codes": 0, "codebook": 0}
    for width, stored in zip(WIDTHS, layer.columns, strict=True):
        extra = stored - int(real[width])
        padding["codes"] += extra * width * layer.out_features // 8
        padding["codebook"] += extra << width
    columns = layer.stored_columns - layer.in_features
    padding["scale"] = columns * layer.scale.element_size()
    padding["order"] = columns * layer.order.element_size() if layer.order.numel() else 0
    return {
        "codes": sizes["codes"] - padding["codes"],
        "codebooks": sizes["codebook"] - padding["codebook"],
        "scales": sizes["scale"] - padding["scale"] + sizes["row_scale"],
        "order": sizes["order"] - padding["order"],
        "outliers": sizes["outlier_ptr"] + sizes["outlier_index"] + sizes["outlier_value"],
        "padding": sum(padding.values()),
    }


def layer_record(
    name: str,
    layer: QuantizedLinear,
    weight: torch.Tensor | None,
    *,
    nominal_bits: float,
    error: float | None,
    seconds: float,
    parts: Sequence[str] = (),
    samples: int = 4,
    kind: str = "",
) -> LayerRecord:
    """The record of a stored layer.

    Args:
        name: as shown.
        layer: its stored form.
        weight: the original ``[N, K]``, for the histograms; None leaves the column view out.
        nominal_bits, error, seconds, parts, kind: as in :class:`LayerRecord`.
        samples: columns to keep: the widest spread first, then evenly over the input features, each width present at
            least once.
    """
    sizes = bytes_by_part(layer)
    size = layer.in_features * layer.out_features
    bits = layer.column_bits()
    chosen = [] if weight is None else _choose_columns(weight, bits, samples)
    return LayerRecord(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        true_bits=8 * sum(sizes.values()) / size,
        nominal_bits=nominal_bits,
        error=error,
        seconds=seconds,
        column_bits=bits.tolist(),
        bytes=sizes,
        outlier_share=layer.outliers / size,
        parts=tuple(parts),
        samples=[] if weight is None else _sample_columns(layer, weight, bits, chosen),
        kind=kind,
    )


def _choose_columns(weight: torch.Tensor, bits: torch.Tensor, count: int) -> list[int]:
    features = weight.shape[1]
    widest = int(weight.abs().amax(0).argmax())
    by_width = [int(torch.nonzero(bits == width)[0]) for width in WIDTHS if (bits == width).any()]
    even = [round((i + 0.5) * features / max(1, count)) % features for i in range(count)]
    return list(dict.fromkeys([widest, *by_width, *even]))[:count] if count else []


def _sample_columns(
    layer: QuantizedLinear, weight: torch.Tensor, bits: torch.Tensor, features: Sequence[int]
) -> list[ColumnSample]:
    stored_of = {int(f): p for p, f in enumerate(layer.feature_of_column().tolist()) if f < layer.in_features}
    starts, entry = [], 0
    for width, count in zip(WIDTHS, layer.columns, strict=True):
        starts += [entry + (i << width) for i in range(count)]
        entry += count << width
    row_scale = layer.row_scale.float().cpu()
    rows = torch.where(row_scale != 0, row_scale, torch.ones_like(row_scale))
    decoded = layer.dequantize().cpu()
    samples = []
    for feature in features:
        position, width = stored_of[feature], int(bits[feature])
        table = layer.codebook[starts[position] : starts[position] + (1 << width)].float().cpu()
        centroids = (table * float(layer.scale[position])).sort().values
        values = weight[:, feature].float().cpu() / rows
        outliers = torch.empty(0)
        if layer.outliers:
            member = layer.outlier_index.to(torch.int64).cpu() == position
            per_row = layer.outlier_ptr.to(torch.int64).cpu().diff()
            owner = torch.repeat_interleave(torch.arange(layer.out_features), per_row)[member]
            outliers = decoded[owner, feature] / rows[owner]
        everything = torch.cat([values, centroids, outliers])
        low, high = float(everything.min()), float(everything.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(values, HISTOGRAM_BINS, low, high)
        samples.append(
            ColumnSample(
                feature=feature,
                bits=width,
                low=low,
                high=high,
                counts=[int(c) for c in counts],
                centroids=[round(float(c), 6) for c in centroids],
                outliers=[round(float(o), 6) for o in outliers],
            )
        )
    return samples

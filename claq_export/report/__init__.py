"""A page a person wants to look at: what quantization did to each layer, where the bits went, and how good the model
still is."""

from .data import BudgetRecord, ColumnSample, LayerRecord, QualityRow, ReportData, layer_record
from .page import render_report, write_report

__all__ = [
    "BudgetRecord",
    "ColumnSample",
    "LayerRecord",
    "QualityRow",
    "ReportData",
    "layer_record",
    "render_report",
    "write_report",
]

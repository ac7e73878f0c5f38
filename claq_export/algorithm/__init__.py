"""CLAQ itself, as functions over tensors: k-means codebooks, error feedback, adaptive precision, outliers, bit budget.

Nothing here knows of graphs, files or models; the calibration walk calls :func:`quantize_layer` with a weight and a
:class:`Hessian`.
"""

from __future__ import annotations

from .accounting import Bits, measure, predict
from .budget import Budget, LayerProfile, profile_layer, solve
from .hessian import Factor, Hessian
from .layer import ColumnPlan, LayerResult, plan_columns, quantize_layer
from .presets import PRESETS, preset_settings
from .settings import LayerSettings

REVISION = "5"
"""Raised with every change that gives other layers for the same model, data and settings: a work folder in which a run of another
revision stopped is not gone on with."""

__all__ = [
    "PRESETS",
    "REVISION",
    "Bits",
    "Budget",
    "ColumnPlan",
    "Factor",
    "Hessian",
    "LayerProfile",
    "LayerResult",
    "LayerSettings",
    "measure",
    "plan_columns",
    "predict",
    "preset_settings",
    "profile_layer",
    "quantize_layer",
    "solve",
]

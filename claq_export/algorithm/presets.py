"""The paper's configurations by name, so that "CLAQ" can be run as published (claq.md, 1.5-1.7 and 3.1).

A name is the paper's bit count. The nominal bits of a preset (docs/format.md) equal it: the mean index width, and
for each reserved weight the 16 bits of its value less the index bits it frees. Presets leave out everything that
goes beyond the paper: no row scale, plain Lloyd, columns ranked by the outlier order. Known defects of the authors' code
are not imitated: the reserved share is what is really kept, ratios follow the true column, reserved weights take no part in
the fit. The paper leaves calibration tokens as they are: use :data:`PAPER_TOKEN_CLIP` for its Hessians.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError
from .settings import LayerSettings

PAPER_TOKEN_CLIP: float | None = None
"""``token_clip`` of the Hessians when a preset is run as the paper runs it."""

_PAPER = LayerSettings(
    bits=4,
    ranking="outlier_order",
    outlier_threshold=13.0,
    reservation="dynamic",
    outlier_choice="sides",
    row_scale="none",
    row_weights="uniform",
    frequency_power=0.0,
    kmeans="lloyd",
    kmeans_iterations=300,
    damping=0.01,
    act_order=True,
    block=128,
    descent=0,
    refit_codebook=False,
    refit_row_scale=False,
)

PRESETS: dict[str, LayerSettings] = {
    "claq-4": _PAPER,
    "claq-3": replace(_PAPER, bits=3),
    "claq-2": replace(_PAPER, bits=2),
    # Adaptive Precision alone.
    "claq-3.1": replace(_PAPER, bits=3.1),
    "claq-2.5": replace(_PAPER, bits=2.5),
    "claq-2.2": replace(_PAPER, bits=2.2),
    "claq-2.1": replace(_PAPER, bits=2.1),
    # Outlier Reservation alone: 0.5 % and 1 % of the weights at 14 bits each.
    "claq-2.14": replace(_PAPER, bits=2, outliers=0.01),
    "claq-2.07": replace(_PAPER, bits=2, outliers=0.005),
    # Both (CLAQ*).
    "claq-3.23": replace(_PAPER, bits=3.1, outliers=0.01),
    "claq-3.12": replace(_PAPER, bits=3.05, outliers=0.005),
    "claq-2.24": replace(_PAPER, bits=2.1, outliers=0.01),
    "claq-2.12": replace(_PAPER, bits=2.05, outliers=0.005),
}
"""Settings by preset name."""


def preset_settings(name: str) -> LayerSettings:
    """The settings of a preset.

    Raises:
        ConfigError: no such preset; lists the names.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]

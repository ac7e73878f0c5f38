"""Every switch of quantizing one layer, validated once, so that the functions that use them need not check."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..format.packing import WIDTHS
from .kmeans import METHODS

RANKINGS = ("outlier_order", "saliency", "loss")
ROW_SCALES = ("none", "rms", "mean", "max", "balanced")
RESERVATIONS = ("fixed", "dynamic", "saliency")
CHOICES = ("sides", "magnitude")
ROW_WEIGHTS = ("uniform", "energy", "importance")


@dataclass(frozen=True)
class LayerSettings:
    """How to quantize a layer.

    Attributes:
        bits: nominal width, 2 to 4: the mean over columns. A whole number is one width; anything between mixes two
            (Adaptive Precision).
        widths: the widths to mix, descending. None: 4 and 2 below 3 bits, 4 and 3 above (the paper's mixes).
        shares: share of the columns for each of ``widths``; needed for three widths, and then ``bits`` is their mean
            (None: from ``bits``).
        ranking: who gets the wide codes and, with "dynamic", the outliers: ``"outlier_order"`` (paper: how many
            weights of the column exceed ``outlier_threshold`` times the mean magnitude), ``"saliency"`` (``||w_j||^2
            H_jj``) or ``"loss"`` (``||w_j||^2 / [H^-1]_jj``).
        outlier_threshold: S of the outlier order; the paper's code has 13.
        outliers: share of the weights kept in float16 (Outlier Reservation), 0 to 0.25.
        reservation: ``"fixed"`` (same share in each column), ``"dynamic"`` (``dynamic_top`` of the columns get
            ``dynamic_ratio`` times the share of the others) or ``"saliency"`` (columns get what of their weights is
            among the largest ``w^2 H_jj`` of the layer).
        dynamic_top, dynamic_ratio: the paper's 10 % and 0.014/0.004.
        exact_rows: share of the rows that are stored exactly, the most frequent tokens of a vocabulary, 0 to 0.1
            (exact_rows.py).
        outlier_choice: within a column the largest ``"magnitude"``, or ``"sides"`` (half from each end; paper).
        fit_outliers: let reserved weights take part in the k-means fit, as the paper's code does (a defect; for
            comparisons).
        row_scale: what rows are divided by before clustering: ``"rms"``, ``"mean"`` (of magnitudes), ``"max"``,
            ``"balanced"`` (RMS after columns were brought to unit RMS, iterated) or ``"none"`` (one number for all
            rows).
        row_weights: ``"uniform"``: every normalised weight counts alike in a column's k-means; ``"energy"``: by its
            row's squared scale, which is the layer's output error; ``"importance"``: by the square root of that times the
            squared gradient at the row's output, where gradients are known, else alike.
        frequency_power: rows of a vocabulary count in a column's k-means by their chance in text to this power, 0 to 1
            (vocabulary.py); 0: all alike. An export leaves those of tables that are only looked up alike, unless it is set.
        kmeans: ``"lloyd"``, ``"coarse"`` or ``"optimal"``; see kmeans.py.
        kmeans_iterations: most Lloyd steps a column.
        damping: share of the mean diagonal added to the Hessian's diagonal.
        act_order: quantize columns by falling H_jj.
        block: columns between two updates of all later columns.
        descent: sweeps of coordinate descent over codes and codebooks after the loop (descent.py); 0 = none.
        refit_codebook: refit all centroids of the layer against its Hessian in closed form after each sweep (or once
            after the loop without sweeps).
        refit_row_scale: refit the row scales in closed form after each sweep (or once after the loop without sweeps).
    """

    bits: float = 4.0
    widths: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    ranking: str = "saliency"
    outlier_threshold: float = 13.0
    outliers: float = 0.0
    reservation: str = "dynamic"
    dynamic_top: float = 0.1
    dynamic_ratio: float = 3.5
    exact_rows: float = 0.0
    outlier_choice: str = "magnitude"
    fit_outliers: bool = False
    row_scale: str = "rms"
    row_weights: str = "importance"
    frequency_power: float = 0.5
    kmeans: str = "coarse"
    kmeans_iterations: int = 100
    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    descent: int = 0
    refit_codebook: bool = False
    refit_row_scale: bool = False

    def __post_init__(self) -> None:
        _number("bits", self.bits, 2, 4)
        _number("outlier_threshold", self.outlier_threshold, 0, math.inf)
        _number("outliers", self.outliers, 0, 0.25)
        _number("exact_rows", self.exact_rows, 0, 0.1)
        _number("frequency_power", self.frequency_power, 0, 1)
        _number("dynamic_top", self.dynamic_top, 0, 1)
        _number("dynamic_ratio", self.dynamic_ratio, 1, math.inf)
        _number("damping", self.damping, 0, 1)
        if self.damping == 0:
            raise ConfigError("damping must be above 0: the Hessian of few tokens has no inverse")
        _whole("kmeans_iterations", self.kmeans_iterations, 1)
        _whole("block", self.block, 1)
        _whole("descent", self.descent, 0)
        _choice("ranking", self.ranking, RANKINGS)
        _choice("reservation", self.reservation, RESERVATIONS)
        _choice("outlier_choice", self.outlier_choice, CHOICES)
        _choice("row_scale", self.row_scale, ROW_SCALES)
        _choice("row_weights", self.row_weights, ROW_WEIGHTS)
        _choice("kmeans", self.kmeans, METHODS)
        self._check_widths()

    def _check_widths(self) -> None:
        if self.widths is not None:
            if (
                not self.widths
                or any(w not in WIDTHS for w in self.widths)
                or list(self.widths) != sorted(set(self.widths), reverse=True)
            ):
                raise ConfigError(f"widths must be different values of 4, 3, 2 in falling order, got {self.widths}")
            if not self.widths[-1] <= self.bits <= self.widths[0]:
                raise ConfigError(f"bits = {self.bits} lies outside the widths {self.widths}")
        if self.shares is None:
            if self.widths is not None and len(self.widths) == 3:
                raise ConfigError("three widths need shares, one for each width")
            return
        if self.widths is None or len(self.shares) != len(self.widths):
            raise ConfigError(f"shares must have one value for each of widths, got {self.shares} for {self.widths}")
        if any(not 0 <= s <= 1 for s in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"shares must be between 0 and 1 and add up to 1, got {self.shares}")
        mean = sum(w * s for w, s in zip(self.widths, self.shares, strict=True))
        if abs(mean - self.bits) > 1e-6:
            raise ConfigError(
                f"bits = {self.bits} is not the mean {mean:g} of widths {self.widths} with shares {self.shares}"
            )

    def mix(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The widths in use, descending, and the share of the columns for each."""
        if self.shares is not None and self.widths is not None:
            return self.widths, self.shares
        widths = self.widths
        if widths is None:
            if self.bits == int(self.bits):
                return (int(self.bits),), (1.0,)
            widths = (4, 2) if self.bits < 3 else (4, 3)
        if len(widths) == 1:
            return widths, (1.0,)
        high, low = widths
        wide = (self.bits - low) / (high - low)
        return widths, (wide, 1.0 - wide)


def _number(name: str, value: float, low: float, high: float) -> None:
    wanted = f"a finite number of at least {low:g}" if high == math.inf else f"a number between {low:g} and {high:g}"
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

"""The user's settings: one dataclass for the Python API, the command line and ``torch.compile`` options alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .algorithm.settings import LayerSettings
from .errors import ConfigError

DEFAULT_CALIBRATION = "default"
"""Stands for the calibration text that the package carries."""

NO_CALIBRATION = "none"
"""Stands for no calibration: plain column k-means, without error feedback."""

ACCURACY_LEVELS = {"fp32": 0, "int8": 4}
"""Arithmetic of the operators by name, numbered as ONNX Runtime's MatMulNBits numbers them."""


@dataclass(frozen=True)
class Config:
    """Everything a run of claq can be told.

    Attributes:
        bits: code width of the weights, 2 to 4. A whole number is one width for all columns; a fraction mixes two widths by
            CLAQ's adaptive precision so that the mean index width (the paper's "bits") is this number.
        calibration: a text, JSONL or Parquet file; an iterable of texts or of model inputs; ``"default"`` for the text that the
            package carries; ``"none"`` for no calibration.
        samples: calibration samples at most.
        sequence_length: tokens a sample; by default what the model takes, at most 128 for encoders and 1024 for decoders.
        batch_size: calibration samples that run through an operator at once.
        seed: of every random draw.
        outliers: share of weights reserved at 16 bits, 0 to 0.1 (the paper's outlier reservation).
        reservation: how reserved weights are shared out over the columns: ``"fixed"``, ``"dynamic"`` or ``"saliency"``, see
            :class:`~claq_export.algorithm.settings.LayerSettings`.
        token_clip: in a Hessian a token's norm is clipped to this multiple of the median (attention sinks would own it
            otherwise); None = leave tokens as they are.
        include, exclude: glob patterns over qualified names; a linear layer is quantized if it matches one of ``include`` (all
            if empty) and none of ``exclude``.
        fuse_siblings: quantize linears that read the same value (q/k/v, gate/up) stacked as one.
        accuracy: arithmetic of the operators in the runtime: ``"fp32"`` (exact to rounding) or ``"int8"`` (activations rounded
            to int8 with a scale a block of columns).
        device: where layers are quantized, for example ``"cpu"`` or ``"cuda"``.
        algorithm: overrides for single fields of :class:`claq_export.algorithm.settings.LayerSettings`.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    bits: float = 4
    calibration: str | Path | Iterable[Any] = DEFAULT_CALIBRATION
    samples: int = 128
    sequence_length: int | None = None
    batch_size: int = 8
    seed: int = 0
    outliers: float = 0.0
    reservation: str = "dynamic"
    token_clip: float | None = 2.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fuse_siblings: bool = True
    accuracy: str = "fp32"
    device: str = "cpu"
    algorithm: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)) or not 2 <= self.bits <= 4:
            raise ConfigError(f"bits must be a number from 2 to 4, got {self.bits!r}")
        if not 0 <= self.outliers <= 0.1:
            raise ConfigError(f"outliers must be a share of weights from 0 to 0.1, got {self.outliers!r}")
        for name in ("samples", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(f"sequence_length must be at least 2, got {self.sequence_length!r}")
        if self.accuracy not in ACCURACY_LEVELS:
            raise ConfigError(f"accuracy must be one of {', '.join(ACCURACY_LEVELS)}, got {self.accuracy!r}")
        known = {field.name for field in dataclasses.fields(LayerSettings)}
        unknown = sorted(set(self.algorithm) - known)
        if unknown:
            raise ConfigError(f"unknown algorithm setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        self.layer_settings()

    @property
    def accuracy_level(self) -> int:
        """The operators' ``accuracy_level`` attribute."""
        return ACCURACY_LEVELS[self.accuracy]

    def layer_settings(self) -> LayerSettings:
        """What the algorithm is told for each layer."""
        chosen = {"bits": float(self.bits), "outliers": self.outliers, "reservation": self.reservation}
        return LayerSettings(**{**chosen, **self.algorithm})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, for the artifact's metadata; calibration data is named, not stored."""
        values = dataclasses.asdict(dataclasses.replace(self, calibration=NO_CALIBRATION))
        if isinstance(self.calibration, (str, Path)):
            values["calibration"] = Path(self.calibration).name
        else:
            values["calibration"] = "python iterable"
        values["include"], values["exclude"] = list(self.include), list(self.exclude)
        return values

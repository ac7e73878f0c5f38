"""The user's settings: one dataclass for the Python API, the command line and ``torch.compile`` options alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .algorithm.presets import PAPER_TOKEN_CLIP, PRESETS, preset_settings
from .algorithm.settings import RESERVATIONS, LayerSettings
from .errors import ConfigError
from .format.packing import WIDTHS
from .setting_types import in_types_of

DEFAULT_CALIBRATION = "default"
"""Stands for the calibration text that the package carries."""

NO_CALIBRATION = "none"
"""Stands for no calibration: plain column k-means, without error feedback."""

DEFAULT_SAMPLES = 128
"""Calibration samples where no number is given."""

GUIDED_SAMPLES = 64
"""The same for decoders whose calibration is guided, which takes as long for each sample as two of others."""

DEFAULT_SENTENCES = 512
"""The same for encoders on the packaged text, where a sample is one sentence; see ``docs/algorithm.md``."""

DECODER_OPSET = 23
"""ONNX operator set in which attention to a cache is one operator."""

EXACT_TOKENS = 0.01
"""Share of a vocabulary's rows that is stored exactly by default, see ``benchmarks/results/tables.md``."""

ACCURACY_LEVELS = {"fp32": 0, "int8": 4}
"""Arithmetic of the operators by name, numbered as ONNX Runtime's MatMulNBits numbers them."""

FILE_ACCURACY = "int8"
"""Arithmetic that an exported file asks for where the user asks for none."""

TORCH_ACCURACY = "fp32"
"""The same of layers in PyTorch, where results are compared with other PyTorch code, and with the file."""

CACHE_DTYPES = ("float32", "float16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types that the emitted graph may compute in."""

_EXPECTED = {
    "bits": "2, 3, 4 or a fraction from 2 to 5 (a budget)",
    "floors": "a dictionary of name patterns and their least code widths",
    "embedding_bits": f"one of {WIDTHS}, or 0 to leave them alone",
    "head_bits": f"one of {WIDTHS}, or 0 to leave them alone",
    "size": "a whole number of bytes (60_000_000) or None",
    "tune": "a number of minutes or None",
    "preset": f"one of {', '.join(PRESETS)} or None",
    "calibration": 'the name of a file, "default", "none", or an iterable (a list) of texts or of model inputs',
    "sequence_length": "a whole number of tokens or None",
    "reservation": f"one of {', '.join(RESERVATIONS)}",
    "include": "a name pattern or a list of them",
    "exclude": "a name pattern or a list of them",
    "accuracy": f"one of {', '.join(ACCURACY_LEVELS)} or None",
    "cache_dtype": f"one of {', '.join(CACHE_DTYPES)} or None",
    "dtype": f"one of {', '.join(DTYPES)}",
    "algorithm": "a dictionary of settings by name",
    "devices": "a sequence of at least one name (cpu, cuda, cuda:1, ...)",
}
"""What a value of the wrong type is told, where that is more than the type of the field."""


@dataclass(frozen=True)
class Config:
    """Everything a run of claq can be told.

    Attributes:
        bits: 2 to 4 as a whole number: the code width of all columns. A fraction from 2 to 5 is a budget: *true* bits a
            weight over the whole model, everything counted (``docs/format.md``), for which the columns of all layers
            and outliers compete.
        size: a budget in bytes for the whole artifact instead; ``bits`` is not used then.
        floors: least code width of the layers whose name matches a glob pattern, for budgets.
        embedding_bits: code width of embedding tables, 0 = leave them at full precision; with a budget, for which their
            columns compete like all others, the least width of theirs. None: 4, with a budget no least width; 0 with a preset.
        head_bits: the same of the output heads of (masked) language models. A head tied to an embedding shares its codes:
            ``head_bits`` decides where it is given, else ``embedding_bits``.
        exact_tokens: share of the rows of a quantized vocabulary that is stored at 16 bits, the most frequent tokens of the
            calibration data first (:mod:`claq_export.algorithm.exact_rows`); counted like everything else.
        importance: with a budget, weigh each layer's error by the gradient of the model's output with respect to it (a
            few backward passes over calibration samples); False: by its size relative to the layer's own output.
        guided: weigh every calibration token in the Hessians by the squared gradient of the model's output at the layer
            (GuidedQuant) in the place of ``token_clip``, for a forward and a backward pass over all calibration data
            (``docs/algorithm.md``). None: for Hugging Face models, where the whole model may be in memory and one process
            calibrates.
        preset: a configuration of the paper by name (:mod:`claq_export.algorithm.presets`); sets ``bits``,
            ``outliers``, ``reservation`` and ``token_clip``, and leaves out all that goes beyond the paper.
        calibration: a text, JSONL or Parquet file; an iterable of texts or of model inputs; ``"default"`` for the
            text that the package carries; ``"none"`` for no calibration.
        samples: calibration samples at most. None: 128, but 64 for a decoder whose calibration is ``guided`` (each takes twice
            the time), and 512 for an encoder on the packaged text, which it is given sentence
            by sentence.
        sequence_length: tokens a sample; by default what the model takes, at most 128 for encoders and 1024 for
            decoders.
        batch_size: calibration samples that run through an operator at once. None: 8, but of texts no more than have 4,096 tokens
            together, because the widest values of a batch are in memory at the same time.
        seed: of every random draw.
        outliers: share of weights reserved at 16 bits, 0 to 0.1 (the paper's outlier reservation); not with a budget, which
            decides that itself.
        reservation: how reserved weights are shared out over the columns: ``"fixed"``, ``"dynamic"`` or
            ``"saliency"``, see :class:`~claq_export.algorithm.settings.LayerSettings`.
        tune: minutes of tuning by gradient after quantization (:mod:`claq_export.calibration.tune`): codebooks, scales
            and reserved weights move to bring the model's output closer to the original's, codes and size stay. 0: as
            many as its 200 steps take. None: no tuning.
        token_clip: in a Hessian a token's norm is clipped to this multiple of the median (attention sinks would own it
            otherwise); None = leave tokens as they are.
        include, exclude: glob patterns over qualified names; a linear layer is quantized if it matches one of
            ``include`` (all if empty) and none of ``exclude``. A string is one pattern.
        fuse_siblings: quantize linears that read the same value (q/k/v, gate/up) stacked as one.
        accuracy: arithmetic of the native kernels: ``"fp32"`` (exact to rounding) or ``"int8"`` (activations rounded to
            int8 with a scale a block of columns, as MatMulNBits does at accuracy level 4; faster). None: int8 in the exported
            file, fp32 in PyTorch. Without claq-runtime, and on GPUs in PyTorch, it makes no difference.
        opset: ONNX operator set of a causal language model with cache: 23 has attention, rotary positions and RMS
            normalization as one operator each (ONNX Runtime 1.23 and later), 18 spells them out (slower).
        last_logits: a causal language model with cache returns the logits of the last new token alone, all that generation
            needs: a prompt is read faster. False: of all new tokens, as optimum's graphs do and perplexity needs.
        cache_dtype: of a causal language model's key/value cache: ``"float16"`` takes half the memory, and at contexts of
            thousands of tokens much less time a token; the arithmetic stays float32. None: that of the graph.
        dtype: of the emitted graph's inputs, outputs, activations and unquantized weights: ``"float32"``, ``"float16"`` or
            ``"bfloat16"``, whatever the model's own files hold. Calibration and quantization are in float32 always.
        devices: where the model runs for calibration (the first) and layers are quantized (all of them), for example
            ``("cuda:0", "cuda:1")``: layers that do not depend on one another and the Hessians' sums are spread over them.
            All of one type. The result does not depend on how many there are.
        algorithm: overrides for single fields of :class:`claq_export.algorithm.settings.LayerSettings`.

    Raises:
        ConfigError: a value is of the wrong type (:mod:`claq_export.setting_types`) or out of range; the message names the
            field.
    """

    bits: float = 4
    size: int | None = None
    floors: dict[str, int] = dataclasses.field(default_factory=dict)
    embedding_bits: int | None = None
    head_bits: int | None = None
    exact_tokens: float = EXACT_TOKENS
    importance: bool = True
    guided: bool | None = None
    preset: str | None = None
    calibration: str | Path | Iterable[Any] = DEFAULT_CALIBRATION
    samples: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    outliers: float = 0.0
    reservation: str = "dynamic"
    tune: float | None = None
    token_clip: float | None = 2.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fuse_siblings: bool = True
    accuracy: str | None = None
    opset: int = DECODER_OPSET
    last_logits: bool = False
    cache_dtype: str | None = None
    dtype: str = "float32"
    devices: tuple[str, ...] = ("cpu",)
    algorithm: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._convert()
        if not 2 <= self.bits < 5:
            raise ConfigError(f"bits must be {_EXPECTED['bits']}, got {self.bits!r}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        if self.size is not None and (self.size < 1 or self.preset is not None):
            raise ConfigError(f"size must be a positive number of bytes, and not go with a preset; got {self.size!r}")
        if self.preset is not None and (self.outliers or self.reservation != "dynamic"):
            raise ConfigError(f"preset {self.preset!r} sets outliers and reservation; leave them out")
        if self.tune is not None and isinstance(self.calibration, str) and self.calibration == NO_CALIBRATION:
            raise ConfigError("tune needs calibration data, which calibration='none' switches off")
        if self.floors and not self.budgeted:
            raise ConfigError(
                "floors are for a budget: a fraction of bits such as 3.5, or a size; otherwise all columns have one width"
            )
        if self.guided and (self.preset is not None or self.calibration == NO_CALIBRATION):
            raise ConfigError("guided needs calibration data, and does not go with a preset of the paper")
        for pattern, width in self.floors.items():
            if width not in WIDTHS:
                raise ConfigError(f"the floor of {pattern!r} must be one of {WIDTHS} bits, got {width!r}")
        for name in ("embedding_bits", "head_bits"):
            value = getattr(self, name)
            if value not in (None, 0, *WIDTHS):
                raise ConfigError(f"{name} must be {_EXPECTED[name]}, got {value!r}")
        if not 0 <= self.exact_tokens <= 0.1:
            raise ConfigError(f"exact_tokens must be a share of tokens from 0 to 0.1, got {self.exact_tokens!r}")
        if not 0 <= self.outliers <= 0.1:
            raise ConfigError(f"outliers must be a share of weights from 0 to 0.1, got {self.outliers!r}")
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(f"sequence_length must be at least 2, got {self.sequence_length!r}")
        if self.tune is not None and not self.tune >= 0:
            raise ConfigError(f"tune must be a number of minutes, got {self.tune!r}")
        if self.token_clip is not None and not self.token_clip > 0:
            raise ConfigError(f"token_clip must be positive or None, got {self.token_clip!r}")
        if self.accuracy is not None and self.accuracy not in ACCURACY_LEVELS:
            raise ConfigError(f"accuracy must be one of {', '.join(ACCURACY_LEVELS)}, got {self.accuracy!r}")
        if self.opset not in (18, DECODER_OPSET):
            raise ConfigError(f"opset must be 18 or {DECODER_OPSET}, got {self.opset!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.dtype != "float32" and self.opset != DECODER_OPSET:
            raise ConfigError(f"opset {self.opset} is for graphs in float32; leave it out, or dtype {self.dtype!r}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ConfigError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}")
        if self.cache_dtype not in (None, self.dtype) and self.dtype != "float32":
            raise ConfigError(
                f"in a graph of dtype {self.dtype!r} so is the cache; leave cache_dtype {self.cache_dtype!r} out"
            )
        _check_devices(self.devices)
        if self.layer_settings().outliers and self.budgeted:
            raise ConfigError(
                "outliers does not go with a budget (a fraction of bits, or a size), which decides itself how many weights are "
                "reserved: leave it out, or give 2, 3 or 4 bits"
            )

    def _convert(self) -> None:
        """Bring all values into the types of their fields.

        Raises:
            ConfigError: one is of another type, or not a setting of the algorithm.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("include", "exclude"):
            if isinstance(values[name], str):
                values[name] = (values[name],)
        if isinstance(self.devices, (tuple, list)):
            values["devices"] = tuple(str(one) if isinstance(one, torch.device) else one for one in self.devices)
        values = in_types_of(Config, values, _EXPECTED)
        known = {field.name for field in dataclasses.fields(LayerSettings)}
        unknown = sorted(set(values["algorithm"]) - known)
        if unknown:
            raise ConfigError(f"unknown algorithm setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        values["algorithm"] = in_types_of(LayerSettings, values["algorithm"], prefix="algorithm setting ")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def accuracy_level(self) -> int:
        """``accuracy_level`` of the operators in an exported file."""
        return ACCURACY_LEVELS[self.accuracy or FILE_ACCURACY]

    @property
    def torch_accuracy_level(self) -> int:
        """``accuracy_level`` of the layers in PyTorch."""
        return ACCURACY_LEVELS[self.accuracy or TORCH_ACCURACY]

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch has it."""
        return DTYPES[self.dtype]

    @property
    def narrow_cache(self) -> bool:
        """Whether the cache is to be in float16 where the graph is not."""
        return self.dtype == "float32" and self.cache_dtype == "float16"

    @property
    def budgeted(self) -> bool:
        """Whether the columns of all layers compete for a budget, not each layer for itself."""
        return (
            self.preset is None
            and "bits" not in self.algorithm
            and (self.size is not None or self.bits != int(self.bits))
        )

    @property
    def embeddings(self) -> bool:
        """Whether embedding tables are quantized."""
        return self.embedding_bits != 0 and (self.preset is None or self.embedding_bits is not None)

    @property
    def heads(self) -> bool:
        """Whether the output heads of language models are quantized."""
        return self.head_bits != 0 and (self.preset is None or self.head_bits is not None)

    def table_bits(self, *, head: bool, embedding: bool) -> int | None:
        """The width that was asked for of a head, a table, or a tied table; None if that is left to claq."""
        if head and (self.head_bits is not None or not embedding):
            return self.head_bits
        return self.embedding_bits

    @property
    def hessian_clip(self) -> float | None:
        """``token_clip`` of the Hessians; the paper's presets leave tokens as they are."""
        return PAPER_TOKEN_CLIP if self.preset is not None else self.token_clip

    def layer_settings(self) -> LayerSettings:
        """What the algorithm is told for each layer."""
        if self.preset is not None:
            return dataclasses.replace(preset_settings(self.preset), **self.algorithm)
        chosen = {"bits": min(float(self.bits), 4.0), "outliers": self.outliers, "reservation": self.reservation}
        return LayerSettings(**{**chosen, **self.algorithm})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, for the artifact's metadata; calibration data is named, not stored, and where it
        ran is left out."""
        # Not `asdict`, which would copy the calibration data.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.calibration, (str, Path)):
            values["calibration"] = Path(self.calibration).name
        else:
            values["calibration"] = "python iterable"
        values["include"], values["exclude"] = list(self.include), list(self.exclude)
        values["floors"], values["algorithm"] = dict(self.floors), dict(self.algorithm)
        del values["devices"]
        return values


def check_for_cache(config: Config, cached: bool) -> None:
    """Refuse settings of a key/value cache for a graph that is no causal language model with one.

    Raises:
        ConfigError: there is one; the message names it.
    """
    for name in ("last_logits", "cache_dtype"):
        if getattr(config, name) and not cached:
            raise ConfigError(f"{name} is for language models with a key/value cache; this graph has none")


def _check_devices(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"devices must be {_EXPECTED['devices']}, got {names!r}")
    kinds = {_checked_device(name).type for name in names}
    if len(kinds) > 1:
        raise ConfigError(
            f"devices must be of one type, got {', '.join(names)}: a layer would depend on which of them took it"
        )


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {name!r} is not one that PyTorch knows (cpu, cuda, cuda:1, ...)") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = "no GPU is visible" if torch.version.cuda else "this PyTorch is built without it"
            raise ConfigError(f"device {name!r} is not there: CUDA is not available ({build})")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise ConfigError(f"device {name!r}: claq quantizes on cpu and cuda devices")
    return device

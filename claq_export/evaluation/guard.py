"""The accuracy guard: an artifact against its original model on a text, within limits or not.

What is measured follows from the task: next-token distributions for decoders, sentence embeddings for encoders, the
distribution over classes or tokens for classifiers and masked language models, and that over the next token for
encoder-decoders, where the original wrote the tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..capture import load_pretrained
from ..capture.captured import PARTS
from ..capture.tasks import TASKS, TaskModel
from ..emit.artifact import has_parts, written_models
from ..errors import ConfigError, FormatError, ModelError
from ..format import metadata
from ..format.checkpoint import load_checkpoint
from ..inputs import OnnxFile
from .language import LogitsComparison, language_quality, read_text, token_windows
from .layers import LayerError, layer_errors
from .models import OnnxModel, TorchModel, open_model, runtime_library, window_length
from .output import json_value
from .sentences import SENTENCES_AT_ONCE, padded_batches, sentence_quality
from .seq2seq import OnnxSeq2Seq, TorchSeq2Seq, encoder_inputs, seq2seq_quality

LIMITS: Mapping[str, tuple[str, bool]] = {
    "max_kl": ("kl_mean", True),
    "max_kl_p99": ("kl_p99", True),
    "max_perplexity_ratio": ("perplexity_ratio", True),
    "min_top1": ("top1_agreement", False),
    "min_cosine": ("cosine_mean", False),
    "min_cosine_worst": ("cosine_min", False),
}
"""Limit -> (what is measured, whether the limit is an upper one)."""

_CONTEXT = 512
"""Tokens a window where nothing else is asked for."""


@dataclass(frozen=True)
class Check:
    """One limit and whether it holds; a value that is no number holds no limit."""

    limit: str
    measure: str
    allowed: float
    value: float

    @property
    def passed(self) -> bool:
        upper = LIMITS[self.limit][1]
        return math.isfinite(self.value) and (self.value <= self.allowed if upper else self.value >= self.allowed)


@dataclass(frozen=True)
class GuardReport:
    """What the guard found.

    Attributes:
        artifact, original: what was compared.
        task: the model's.
        measures: numbers by name.
        checks: the limits asked for.
        layers: worst first.
    """

    artifact: str
    original: str
    task: str
    measures: Mapping[str, float]
    checks: tuple[Check, ...]
    layers: tuple[LayerError, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Values by name, ready for JSON (:func:`~claq_export.evaluation.output.json_value`)."""
        values: dict[str, Any] = json_value(
            {
                "artifact": self.artifact,
                "against": self.original,
                "task": self.task,
                "passed": self.passed,
                "measures": dict(self.measures),
                "checks": [
                    {
                        "limit": check.limit,
                        "measure": check.measure,
                        "allowed": check.allowed,
                        "value": check.value,
                        "passed": check.passed,
                    }
                    for check in self.checks
                ],
                "layers": [layer.to_json() for layer in self.layers],
            }
        )
        return values


def guard(
    artifact: str | Path,
    original: str | Path,
    text: str | Path | None,
    limits: Mapping[str, float],
    *,
    audio: str | Path | None = None,
    task: str | None = None,
    context: int | None = None,
    windows: int | None = 32,
    library: str | Path | None = "auto",
    threads: int = 0,
    layers: bool = True,
    trust_remote_code: bool = False,
) -> GuardReport:
    """Compare an artifact with its original on a text or on recordings.

    Args:
        artifact: ``.onnx`` file (of an encoder-decoder as ``--out`` named it), or a folder with ``model.onnx``, the files of an
            encoder-decoder or ``claq.safetensors``.
        original: Hugging Face folder or hub id of the unquantized model.
        text: running text for decoders, a sentence a line for the rest; UTF-8. None: ``audio`` instead.
        limits: by the names of :data:`LIMITS`, at least one.
        audio: of models that hear speech: an audio file, or a folder of them.
        task: of the model; None: as the artifact records it, else by the architecture.
        context: tokens a window of a decoder; None: 512, or what the model takes if that is less.
        windows: first windows (decoders) or this many sentences or recordings times four (others); None = all.
        library: see :func:`~claq_export.evaluation.models.runtime_library`.
        threads: of ONNX Runtime; 0 = its choice.
        layers: compare layer by layer too.
        trust_remote_code: run Python code that comes with the original.

    Raises:
        ConfigError: no limit, an unknown one, one that is not finite, or one that this task has no measure for; more tokens a
            window than the model takes; another setting is out of range; the text cannot be used.
        ModelError, FormatError: the original or the artifact cannot be read.
    """
    path = _artifact_path(Path(artifact))
    if not limits:
        names = ", ".join("--" + name.replace("_", "-") for name in LIMITS)
        raise ConfigError(f"verify needs a limit to check, at least one of {names}")
    unknown = sorted(set(limits) - set(LIMITS))
    if unknown:
        raise ConfigError(f"unknown limit {unknown[0]!r}; known: {', '.join(LIMITS)}")
    for name, allowed in limits.items():
        if not math.isfinite(allowed):
            raise ConfigError(f"the limit {name} must be a finite number, got {allowed}")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows must be a positive number or None, got {windows}")
    if (text is None) == (audio is None):
        raise ConfigError("verify needs a text (--text), or recordings for a model that hears speech (--audio)")
    content = "" if text is None else read_text(text)
    model, tokenizer, task = load_pretrained(
        original,
        task or (_recorded_task(path) or "").removesuffix("-with-past") or None,
        trust_remote_code=trust_remote_code,
    )
    if audio is not None and not TASKS[task].seq2seq:
        raise ConfigError(f"{task} is measured on text (--text), not on recordings")
    if tokenizer is None and not TASKS[task].seq2seq:
        raise ConfigError(f"{original} has no tokenizer, so a text cannot be measured")
    length = window_length(context, _CONTEXT, model.max_sequence) if task == "text-generation" else 0
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    lines = lines[: None if windows is None else 4 * windows]
    if path.suffix == ".onnx":
        # Refused here, with the tensor's name, before ONNX Runtime maps anything.
        for file in written_models(path):
            OnnxFile(file, FormatError)
        opened = OnnxSeq2Seq if TASKS[task].seq2seq else OnnxModel
        candidate: Any = opened(path, runtime_library(library), threads)
    else:
        candidate = open_model(path, causal=task == "text-generation", task=task, reference=original)
        if TASKS[task].seq2seq:
            candidate = TorchSeq2Seq(TaskModel(candidate.module, task))

    if task == "text-generation":
        tokens = token_windows(content, tokenizer, length, windows)
        quality = language_quality(candidate, tokens, TorchModel(model.model))
        measures = {key: float(value) for key, value in quality.to_json().items()}
        measures["perplexity_ratio"] = quality.perplexity / (quality.reference_perplexity or math.nan)

        def run() -> None:
            for window in tokens[:4]:
                TorchModel(model.model).logits(window[None])

    elif task == "feature-extraction":
        reference = TorchModel(model.model)
        measures = {
            key: float(value)
            for key, value in sentence_quality(candidate, tokenizer, sentences=lines, reference=reference)
            .to_json()
            .items()
        }

        def run() -> None:
            sentence_quality(reference, tokenizer, sentences=lines[: 2 * SENTENCES_AT_ONCE], reference=reference)

    elif TASKS[task].seq2seq:
        samples = None if windows is None else 4 * windows
        writer = TorchSeq2Seq(model)
        written = [
            (encoded, *writer.written(encoded))
            for encoded in encoder_inputs(model, tokenizer, lines=lines, audio=audio, samples=samples)
        ]
        measures = seq2seq_quality(candidate, writer, written)

        def run() -> None:
            encoded, tokens, _ = written[0]
            writer.decoder_logits(encoded, tokens)

    else:
        measures = _logits_quality(candidate, model, tokenizer, lines)

        def run() -> None:
            _logits_quality(TorchModel(model.model), model, tokenizer, lines[: 2 * SENTENCES_AT_ONCE])

    checks = []
    for name, allowed in limits.items():
        key = LIMITS[name][0]
        if key not in measures:
            usable = ", ".join("--" + n.replace("_", "-") for n, (m, _) in LIMITS.items() if m in measures)
            raise ConfigError(f"--{name.replace('_', '-')} is not measured for {task}; this task has {usable}")
        checks.append(Check(name, key, float(allowed), measures[key]))
    errors = layer_errors(path, model.model, run) if layers else []
    return GuardReport(str(path), str(original), task, measures, tuple(checks), tuple(errors))


def _artifact_path(path: Path) -> Path:
    """The file to measure: an ONNX file, several under the name of ``--out``, or a folder with ``claq.safetensors`` and no
    ``model.onnx``."""
    if path.is_dir():
        if (path / "model.onnx").is_file() or has_parts(path / "model.onnx"):
            return path / "model.onnx"
        if (path / "claq.safetensors").is_file():
            return path
        raise ModelError(f"{path} holds neither model.onnx nor claq.safetensors")
    if path.suffix == ".onnx" and has_parts(path):
        return path
    for part in PARTS:
        if path.name.startswith(f"{part}_") and has_parts(whole := path.with_name(path.name.removeprefix(f"{part}_"))):
            raise ModelError(f"{path} is one of several files of a model; name them as {whole}, or by their folder")
    if not path.is_file():
        raise ModelError(f"artifact {str(path)!r} does not exist")
    if path.suffix != ".onnx":
        raise ModelError(f"artifact {str(path)!r} must be an .onnx file or a folder")
    return path


def _recorded_task(path: Path) -> str | None:
    if path.suffix == ".onnx":
        return OnnxFile(written_models(path)[0], FormatError).metadata.get(metadata.TASK) or None
    recorded = load_checkpoint(path).config.get("task")
    return recorded if isinstance(recorded, str) else None


def _logits_quality(candidate: Any, model: TaskModel, tokenizer: Any, lines: Sequence[str]) -> dict[str, float]:
    """KL divergence and first-rank agreement of class or token distributions, over sentences (padding left out)."""
    comparison = LogitsComparison()
    for encoded in padded_batches(tokenizer, lines, model.max_sequence):
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        with torch.no_grad():
            original = model.model(input_ids=tokens, attention_mask=mask, return_dict=True).logits
        comparison.add(original, _logits(candidate, tokens, mask), mask.bool() if original.dim() == 3 else None)
    return {"sentences": float(len(lines)), **comparison.measures()}


def _logits(candidate: OnnxModel | TorchModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if isinstance(candidate, OnnxModel):
        return candidate.padded_logits(tokens, mask)
    with torch.no_grad():
        output = candidate.module(input_ids=tokens, attention_mask=mask, return_dict=True)
    logits: torch.Tensor = output.logits
    return logits

"""Encoder-decoders under evaluation: what they give for the next token, where the original wrote the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..calibration.pairs import TOKENS_WRITTEN
from ..calibration.speech import read_speech
from ..capture.captured import ENCODER, FIRST_STEP
from ..capture.seq2seq import Seq2SeqPart, decode
from ..capture.tasks import DECODER_TOKENS, SPECTRUM, TaskModel
from ..emit.artifact import has_parts, part_path
from ..errors import ConfigError, ModelError
from ..onnx_session import check_threads, load_session
from .language import agreement, divergence

_SENTENCES_AT_ONCE = 16
_RECORDINGS_AT_ONCE = 4
_SENTENCE_TOKENS = 256

Inputs = Mapping[str, torch.Tensor]
"""What an encoder reads: ``input_ids`` and ``attention_mask [B, S]``, or ``input_features [B, mel bins, frames]``."""


class Seq2SeqModel(Protocol):
    """What an encoder-decoder is to the evaluation."""

    def decoder_logits(self, encoded: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits, float ``[B, T, V]``, for what the decoder has written so far, int64 ``[B, T]``."""
        ...


class TorchSeq2Seq:
    """A transformers model, unquantized or not. Implements :class:`Seq2SeqModel`."""

    def __init__(self, model: TaskModel) -> None:
        self._model = model
        self._encoder = Seq2SeqPart(model, ENCODER, ())

    def decoder_logits(self, encoded: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self._encode(encoded)
            result = decode(self._model.model, hidden, encoded.get("attention_mask"), tokens, use_cache=False)
        logits: torch.Tensor = result.logits
        return logits

    def written(self, encoded: Inputs, limit: int = TOKENS_WRITTEN) -> tuple[torch.Tensor, torch.Tensor]:
        """The start token and what the model writes after it, the likeliest token at each step.

        Returns:
            int64 ``[B, T]``, and bool ``[B, T]``: which of them come before the end.
        """
        limit = min(limit, self._model.max_sequence or limit)
        rows = next(iter(encoded.values())).shape[0]
        tokens = torch.full((rows, 1), self._model.start_token_id)
        real = torch.ones(rows, 1, dtype=torch.bool)
        ends = torch.tensor(self._model.end_token_ids, dtype=torch.int64)
        with torch.no_grad():
            hidden, cache, new = self._encode(encoded), None, tokens
            while tokens.shape[1] < limit:
                result = decode(self._model.model, hidden, encoded.get("attention_mask"), new, cache)
                best = result.logits[:, -1:].argmax(-1)
                goes_on = real[:, -1:] & ~torch.isin(best, ends)
                if not bool(goes_on.any()):
                    break
                tokens, real = torch.cat([tokens, best], 1), torch.cat([real, goes_on], 1)
                cache = getattr(result, "past_key_values", None)
                new = tokens if cache is None else best
        return tokens, real

    def _encode(self, encoded: Inputs) -> torch.Tensor:
        hidden: torch.Tensor = self._encoder(*(encoded[name] for name in self._encoder.input_names))
        return hidden


class OnnxSeq2Seq:
    """The files of an encoder-decoder, or the single file of one without cache, in ONNX Runtime. Implements
    :class:`Seq2SeqModel`.

    Args:
        path: as ``--out`` named it.
        library: of custom operators to register, or None.
        threads: of each session; 0 = ONNX Runtime's choice.

    Raises:
        ConfigError: a negative number of threads.
        ModelError: a file cannot be loaded.
    """

    def __init__(self, path: Path, library: Path | None = None, threads: int = 0) -> None:
        check_threads(threads)
        self._path = path
        parts = (ENCODER, FIRST_STEP) if has_parts(path) else ("",)
        self._sessions = [load_session(part_path(path, part), library, threads) for part in parts]

    def decoder_logits(self, encoded: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        known = {name: value.numpy() for name, value in encoded.items()}
        if len(self._sessions) == 1:
            return self._run(self._sessions[0], {**known, DECODER_TOKENS: tokens.numpy()})
        hidden = self._run(self._sessions[0], known)
        named = {"encoder_hidden_states": hidden.numpy(), "input_ids": tokens.numpy()}
        if "attention_mask" in known:
            named["encoder_attention_mask"] = known["attention_mask"]
        return self._run(self._sessions[1], named)

    def _run(self, session: Any, named: Mapping[str, np.ndarray]) -> torch.Tensor:
        first = session.get_outputs()[0].name
        try:
            feed = {
                value.name: _as(named[value.name], value.type) for value in session.get_inputs() if value.name in named
            }
            return torch.from_numpy(session.run([first], feed)[0])
        except Exception as error:  # onnxruntime's exception classes have no public common base
            raise ModelError(f"ONNX Runtime cannot run {str(self._path)!r}: {error}") from error


def _as(value: np.ndarray, onnx_type: str) -> np.ndarray:
    return value.astype(np.float16) if onnx_type == "tensor(float16)" and value.dtype == np.float32 else value


def encoder_inputs(
    model: TaskModel, tokenizer: Any, *, lines: Sequence[str] | None, audio: str | Path | None, samples: int | None
) -> list[dict[str, torch.Tensor]]:
    """Batches of what the model's encoder reads.

    Args:
        model: the original.
        tokenizer: its tokenizer, for ``lines``.
        lines: sentences, for a model that reads text.
        audio: a recording or a folder of them, for one that hears speech.
        samples: how many sentences or pieces of recordings at most; None = all.

    Raises:
        ConfigError: the model reads the other of the two, or there is nothing to read.
        CalibrationError: a recording cannot be read.
    """
    hears = SPECTRUM in model.input_names
    if hears != (audio is not None):
        raise ConfigError(
            f"{model.task} is measured on {'recordings (--audio)' if hears else 'text (--text)'}, "
            f"not on {'text' if hears else 'recordings'}"
        )
    if audio is not None:
        folder = model.source.folder if model.source is not None else None
        bins = model.example_inputs(1)[SPECTRUM].shape[1]
        spectra = torch.cat([piece[SPECTRUM] for piece in read_speech(audio, folder, bins, samples)])
        return [{SPECTRUM: part} for part in spectra.split(_RECORDINGS_AT_ONCE)]
    if tokenizer is None:
        raise ConfigError("the original has no tokenizer, so a text cannot be measured")
    chosen = list(lines or [])[:samples]
    if not chosen:
        raise ConfigError("no sentences to measure")
    length = min(_SENTENCE_TOKENS, model.max_sequence or _SENTENCE_TOKENS)
    batches = []
    for start in range(0, len(chosen), _SENTENCES_AT_ONCE):
        texts = chosen[start : start + _SENTENCES_AT_ONCE]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        batches.append({name: encoded[name] for name in model.input_names if name in encoded})
    return batches


def seq2seq_quality(candidate: Seq2SeqModel, original: TaskModel, batches: Sequence[Inputs]) -> dict[str, float]:
    """KL divergence and first-rank agreement at each token that the original writes, its end included.

    Raises:
        ConfigError: the logits are of another vocabulary.
    """
    reference = TorchSeq2Seq(original)
    divergences: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    samples = 0
    for encoded in batches:
        tokens, real = reference.written(encoded)
        expected, found = (model.decoder_logits(encoded, tokens).float() for model in (reference, candidate))
        if expected.shape != found.shape:
            raise ConfigError(
                f"artifact and original give logits of shape {list(found.shape)} and {list(expected.shape)}"
            )
        divergences.append(divergence(expected[real].log_softmax(-1), found[real].log_softmax(-1)))
        agreements.append(agreement(expected[real], found[real]))
        samples += len(tokens)
    kl = torch.cat(divergences)
    return {
        "samples": float(samples),
        "tokens": float(len(kl)),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float(torch.cat(agreements).mean()),
    }

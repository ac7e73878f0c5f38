"""Encoder-decoders under evaluation: what they give for the next token, where the original wrote the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..cached_seq2seq import greedy
from ..calibration.pairs import TOKENS_WRITTEN
from ..calibration.speech import read_speech
from ..capture.captured import ENCODER, FIRST_STEP
from ..capture.seq2seq import Seq2SeqPart, decode
from ..capture.tasks import DECODER_TOKENS, SPECTRUM, TaskModel
from ..emit.artifact import has_parts, part_path
from ..errors import ConfigError, ModelError
from ..onnx_session import check_threads, load_session
from .language import LogitsComparison
from .sentences import padded_batches

_RECORDINGS_AT_ONCE = 4

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
        with torch.no_grad():
            hidden = self._encode(encoded)
            read, cache = torch.zeros(rows, 0, dtype=torch.int64), None

            def step(new: torch.Tensor) -> torch.Tensor:
                nonlocal read, cache
                read = torch.cat([read, new], 1)
                unread = read if cache is None else new
                result = decode(self._model.model, hidden, encoded.get("attention_mask"), unread, cache)
                cache = getattr(result, "past_key_values", None)
                logits: torch.Tensor = result.logits
                return logits

            return greedy(step, rows, self._model.start_token_id, self._model.end_token_ids, limit)

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
    model: TaskModel, tokenizer: Any, *, lines: Sequence[str], audio: str | Path | None, samples: int | None
) -> list[dict[str, torch.Tensor]]:
    """Batches of what the model's encoder reads.

    Args:
        model: the original.
        tokenizer: its tokenizer, for ``lines``.
        lines: sentences, for a model that reads text.
        audio: a recording or a folder of them, for one that hears speech.
        samples: how many pieces of recordings at most; None = all.

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
    batches = padded_batches(tokenizer, lines, model.max_sequence)
    return [{name: encoded[name] for name in model.input_names if name in encoded} for encoded in batches]


def seq2seq_quality(
    candidate: Seq2SeqModel, original: Seq2SeqModel, written: Sequence[tuple[Inputs, torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """KL divergence and first-rank agreement at each token that the original writes, its end included.

    Args:
        candidate, original: what is compared.
        written: what encoders read, and what the original wrote for it (:meth:`TorchSeq2Seq.written`).

    Raises:
        ConfigError: the logits are of another vocabulary.
    """
    comparison = LogitsComparison()
    for encoded, tokens, real in written:
        expected, found = (model.decoder_logits(encoded, tokens) for model in (original, candidate))
        comparison.add(expected, found, real)
    return {
        "samples": float(sum(len(tokens) for _, tokens, _ in written)),
        "tokens": float(sum(int(real.sum()) for _, _, real in written)),
        **comparison.measures(),
    }

"""The calibration batches that a configuration asks for: from text, files, or what Python hands over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch

from ..capture import CapturedModel
from ..capture.tasks import DECODER_TOKENS, SPECTRUM
from ..config import DEFAULT_CALIBRATION, DEFAULT_SAMPLES, DEFAULT_SENTENCES, GUIDED_SAMPLES, Config
from ..errors import CalibrationError
from ..inputs import names_in_npz
from ..passes.attributes import get_attribute
from .data import (
    Batch,
    batches_from_iterable,
    group_equal_shapes,
    iterate_texts,
    read_arrays,
    read_texts,
    split_sentences,
    tokenize_texts,
)
from .pairs import is_pair_of_sequences, with_decoder_tokens
from .progress import ProgressReporter
from .speech import is_speech, read_speech

DEFAULT_TEXT = Path(__file__).parent / "texts" / "state_of_the_union.txt"

_SAMPLES_A_BATCH = 8
_TOKENS_A_BATCH = 4096
"""Most samples, and of texts most tokens, in a batch where nothing else is said."""

_TEXTS_A_SAMPLE = 100
"""Texts of a Python iterable that are read for each calibration sample at most; short ones are joined for decoders."""


def load_calibration(
    captured: CapturedModel,
    config: Config,
    reporter: ProgressReporter | None = None,
    *,
    whole: bool = True,
    guided: bool = False,
) -> list[Batch]:
    """The calibration batches ``config`` asks for.

    Args:
        captured: the model; an encoder-decoder writes what its decoder reads where the data do not give it.
        config: the settings.
        reporter: told of that; silent by default.
        whole: whether the model's weights may all be in memory.
        guided: whether gradients of all samples will be taken.

    Raises:
        CalibrationError: the data cannot be read, is not enough, or does not fit the model.
    """
    usual = GUIDED_SAMPLES if guided and captured.task == "text-generation" else DEFAULT_SAMPLES
    batches = _load(captured, config, config.samples or usual)
    _check_lookups(captured, batches)
    if is_pair_of_sequences(captured):
        size = config.batch_size or _SAMPLES_A_BATCH
        batches = with_decoder_tokens(captured, batches, size, reporter or ProgressReporter(quiet=True), whole=whole)
    return batches


def _check_lookups(captured: CapturedModel, batches: Sequence[Batch]) -> None:
    """Raise where an index lies outside of the table that it is looked up in, as tokens of another tokenizer may.

    Raises:
        CalibrationError: see above, or there is no index; the message names the input, the table and its size.
    """
    placeholders = [node for node in captured.graph_module.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, captured.input_names, strict=True))
    for node in captured.graph_module.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default or node.args[1] not in names:
            continue
        if node.args[0].op != "get_attr" or names[node.args[1]] not in batches[0]:
            continue
        table, name = str(node.args[0].target), names[node.args[1]]
        rows = get_attribute(captured.graph_module, table).shape[0]
        for batch in batches:
            if not batch[name].numel():
                raise CalibrationError(
                    f"calibration data: {name!r} of shape {list(batch[name].shape)} holds nothing to look up in {table!r}"
                )
            least, most = (int(value) for value in batch[name].aminmax())
            if least < 0 or most >= rows:
                raise CalibrationError(
                    f"calibration data: {name!r} holds {most if most >= rows else least}, and the model's {table!r} has "
                    f"{rows} rows; is the tokenizer that of the model?"
                )


def _load(captured: CapturedModel, config: Config, samples: int) -> list[Batch]:
    source = config.calibration
    if not isinstance(source, (str, Path)):
        # A stream may never end: no more is taken than the samples can be drawn from.
        items = iter(source)
        first = list(islice(items, 1))
        if first and isinstance(first[0], str):
            texts = iterate_texts(chain(first, islice(items, _TEXTS_A_SAMPLE * samples)))
            return _batches_of_texts(texts, captured, config, samples)
        given = first[0] if first and isinstance(first[0], Mapping) else captured.input_names
        return batches_from_iterable(chain(first, items), _names(captured, given), captured.example_inputs, samples)
    if Path(source).suffix.lower() == ".npz":
        names = _names(captured, names_in_npz(Path(source), CalibrationError))
        rows = read_arrays(source, names, samples, config.seed)
        batches = batches_from_iterable(rows, names, captured.example_inputs, samples)
        return group_equal_shapes(batches, config.batch_size or _SAMPLES_A_BATCH)
    if SPECTRUM in captured.input_names and source != DEFAULT_CALIBRATION and is_speech(source):
        bins = captured.example_inputs[SPECTRUM].shape[1]
        spectra = read_speech(source, captured.source.folder, bins, samples, config.seed)
        return group_equal_shapes(spectra, config.batch_size or _SAMPLES_A_BATCH)
    if "input_ids" not in captured.input_names:
        recordings = "recordings (an audio file, or a folder of them), " if SPECTRUM in captured.input_names else ""
        raise CalibrationError(
            f"the model reads {', '.join(captured.input_names)}, which no text can give; calibrate it with {recordings}a .npz "
            "file (an array for each input, a sample a row), with batches from Python, or with --calibration none"
        )
    if source != DEFAULT_CALIBRATION:
        return _batches_of_texts(read_texts(source), captured, config, samples)
    documents = read_texts(DEFAULT_TEXT)
    if captured.task != "text-generation":
        # What encoders are given at inference is mostly short; see docs/algorithm.md for what that brings.
        documents = [sentence for text in documents for sentence in split_sentences(text)]
        if config.samples is None and not is_pair_of_sequences(captured):
            samples = DEFAULT_SENTENCES
    return _batches_of_texts(documents, captured, config, samples)


def _names(captured: CapturedModel, given: Iterable[str]) -> tuple[str, ...]:
    """The inputs that calibration data must hold: all, but of an encoder-decoder not the decoder's tokens unless they are
    given."""
    written = is_pair_of_sequences(captured) and DECODER_TOKENS not in given
    return tuple(name for name in captured.input_names if not (written and name == DECODER_TOKENS))


def default_sequence_length(captured: CapturedModel) -> int:
    """Tokens a calibration sample: 1024 for decoders, 128 for the rest, if the model takes as many."""
    wanted = 1024 if captured.task == "text-generation" else 128
    return min(wanted, captured.max_sequence or wanted)


def _batches_of_texts(texts: Iterable[str], captured: CapturedModel, config: Config, count: int) -> list[Batch]:
    if captured.tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, so text cannot calibrate it; give arrays in a .npz file, pass "
            "calibration batches from Python, or take --calibration none"
        )
    length = config.sequence_length or default_sequence_length(captured)
    if captured.max_sequence is not None and length > captured.max_sequence:
        raise CalibrationError(f"sequence length {length} is more than the model takes, {captured.max_sequence}")
    samples = tokenize_texts(
        texts,
        captured.tokenizer,
        input_names=_names(captured, ()),
        samples=count,
        sequence_length=length,
        seed=config.seed,
        whole_documents=captured.task != "text-generation",
    )
    return group_equal_shapes(samples, config.batch_size or max(1, min(_SAMPLES_A_BATCH, _TOKENS_A_BATCH // length)))

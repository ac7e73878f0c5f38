"""Calibration data: text files, JSONL, Parquet, NumPy archives or Python iterables, turned into batches of model inputs.

Batches made of text hold samples of equal length only, without padding; that of others is left out as their attention mask says
(padding.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationError
from ..inputs import is_text, read_npz

TEXT_FIELDS = ("text", "content", "sentence", "document")
"""Fields looked for in JSONL and Parquet rows, first match wins."""

_PARQUET_STRINGS = ("string", "large_string", "string_view")
"""Types of Parquet columns that hold text."""

TEXT_LIMIT = 2 << 30
"""Bytes of a calibration file that is read whole."""

# A line longer than this is running text, not one document a line.
_DOCUMENT_LIMIT = 20_000
# English text has about four characters a token; six make sure that a passage fills its window.
_CHARACTERS_PER_TOKEN = 6

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"\u201c(]?[A-Z])")

_BLANK_LINES = re.compile(r"\r?\n\s*\r?\n")

_HINTS = {"attention_mask": "; it is 1 for tokens and 0 for padding, in the shape of input_ids"}
"""What an input is, for who left it out of an archive."""

Batch = dict[str, torch.Tensor]


def read_texts(path: str | Path) -> list[str]:
    """Documents of a calibration file.

    ``.jsonl``/``.json`` lines are objects with one of :data:`TEXT_FIELDS` (or plain strings); ``.parquet`` has such a
    column; anything else is UTF-8 text: one document a line, or running text if its lines are wrapped or very long.

    Raises:
        CalibrationError: the file is missing, empty, not UTF-8, or has no text field.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"calibration file {str(path)!r} does not exist or is not a file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            texts = _read_parquet(path)
        elif suffix in (".jsonl", ".json", ".ndjson"):
            texts = _read_jsonl(path)
        else:
            texts = _split_documents(_read_limited(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {str(path)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise CalibrationError(f"calibration file {str(path)!r} cannot be read: {error.strerror or error}") from error
    texts = [text for text in (text.strip() for text in texts) if text]
    if not texts:
        raise CalibrationError(f"calibration file {str(path)!r} holds no text")
    return texts


def split_sentences(text: str) -> list[str]:
    """The sentences of running English text: cut after ``.``, ``!`` or ``?`` before a capital. Abbreviations cut too early,
    which calibration does not mind."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise CalibrationError(
            f"calibration file {str(path)!r} has more than {TEXT_LIMIT >> 20} MiB; calibration reads a small part of a text: "
            "give it one"
        )
    return content


def _split_documents(text: str) -> list[str]:
    """Running text has wrapped lines (paragraphs end at blank lines) or lines of book length; else a line is a
    document."""
    lines = text.splitlines()
    filled = [line for line in lines if line.strip()]
    if not filled:
        return []
    blank_separated = len(filled) < len(lines) and sum(len(line) for line in filled) / len(filled) < 100
    if blank_separated:
        return [" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text)]
    documents: list[str] = []
    for line in filled:
        documents += [line[i : i + _DOCUMENT_LIMIT] for i in range(0, len(line), _DOCUMENT_LIMIT)]
    return documents


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{path}:{number}: not a JSON object a line: {error}") from error
            found = row if isinstance(row, dict) else {TEXT_FIELDS[0]: row}
            text = next((found[f] for f in TEXT_FIELDS if isinstance(found.get(f), str)), None)
            if text is None:
                raise CalibrationError(f"{path}:{number}: no text field (looked for {', '.join(TEXT_FIELDS)})")
            if not is_text(text):
                raise CalibrationError(f"{path}:{number}: the text holds half of a surrogate pair")
            texts.append(text)
    return texts


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise CalibrationError("reading Parquet needs pyarrow: pip install 'claq-export[parquet]'") from error
    try:
        schema = parquet.read_schema(path)
        kinds = {name: kind for name, kind in zip(schema.names, schema.types, strict=True) if name in TEXT_FIELDS}
        if not kinds:
            raise CalibrationError(
                f"{path}: no text column (looked for {', '.join(TEXT_FIELDS)}; found {', '.join(schema.names)})"
            )
        # Texts that occur often may be stored as numbers of a dictionary.
        values = {name: str(kind.value_type if types.is_dictionary(kind) else kind) for name, kind in kinds.items()}
        field = next((f for f in TEXT_FIELDS if values.get(f) in _PARQUET_STRINGS), None)
        if field is None:
            held = ", ".join(f"{name!r} holds {kind}" for name, kind in kinds.items())
            raise CalibrationError(f"{path}: no column of text ({held})")
        return [text for text in parquet.read_table(path, columns=[field])[field].to_pylist() if text]
    except ArrowException as error:
        raise CalibrationError(f"{path}: not a readable Parquet file: {error}") from error


def read_arrays(path: str | Path, input_names: Sequence[str], samples: int, seed: int = 0) -> list[Batch]:
    """Samples of a ``.npz`` file, one dictionary a sample (leading dimension 1), drawn at random where there are more.

    Args:
        path: an archive with one array for each of ``input_names``, equally long; a row is a sample.

    Raises:
        CalibrationError: the file is missing, damaged, too large, holds objects, or its arrays are not the model's inputs.
    """
    path = Path(path)
    rows = read_npz(path, input_names, CalibrationError, hints=_HINTS)
    lengths = {len(array) if array.ndim else 0 for array in rows.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CalibrationError(f"calibration file {str(path)!r}: its arrays hold {sorted(lengths)} samples")
    (count,) = lengths
    chosen = sorted(random.Random(seed).sample(range(count), min(samples, count)))
    return [{name: torch.from_numpy(array[i : i + 1].copy()) for name, array in rows.items()} for i in chosen]


def tokenize_texts(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    input_names: Sequence[str],
    samples: int,
    sequence_length: int,
    seed: int = 0,
    whole_documents: bool = True,
) -> list[Batch]:
    """Samples of token ids, one dictionary a sample (leading dimension 1).

    Args:
        texts: documents.
        tokenizer: a transformers tokenizer.
        input_names: inputs of the model; those the tokenizer makes are filled, ``attention_mask`` with ones.
        samples: how many samples at most; drawn at random (``seed``) where there are more.
        sequence_length: tokens a sample at most (documents), or exactly (windows).
        seed: of the draw.
        whole_documents: True: a sample is a document (or a passage of a long one) with the tokenizer's special tokens,
            as an encoder sees it. False: all documents are joined and cut into windows of ``sequence_length``, as the
            perplexity of a language model is computed.

    Raises:
        CalibrationError: the text is too short for a single sample.
    """
    rng = random.Random(seed)
    if whole_documents:
        encoded = _document_samples(texts, tokenizer, samples, sequence_length, rng)
        if not encoded:
            raise CalibrationError("the calibration text holds no sample of at least two tokens")
    else:
        encoded = _window_samples(texts, tokenizer, samples, sequence_length, rng)
    return [_model_inputs(sample, input_names) for sample in encoded]


def _document_samples(
    texts: Iterable[str], tokenizer: Any, samples: int, sequence_length: int, rng: random.Random
) -> list[dict[str, list[int]]]:
    passages: list[str] = []
    span = sequence_length * _CHARACTERS_PER_TOKEN
    for text in texts:
        passages += [text[i : i + span] for i in range(0, len(text), span)]
    rng.shuffle(passages)
    special = tokenizer.num_special_tokens_to_add()
    encoded: list[dict[str, list[int]]] = []
    for passage in passages:
        if len(encoded) == samples:
            break
        sample = dict(tokenizer(passage, truncation=True, max_length=sequence_length))
        if len(sample["input_ids"]) - special >= 2:
            encoded.append(sample)
    return encoded


def _window_samples(
    texts: Iterable[str], tokenizer: Any, samples: int, sequence_length: int, rng: random.Random
) -> list[dict[str, list[int]]]:
    documents = list(texts)
    # Enough random documents to cut from; a whole corpus need not be tokenized for 128 windows.
    wanted = 4 * samples * sequence_length
    order = list(range(len(documents)))
    rng.shuffle(order)
    ids: list[int] = []
    for start in range(0, len(order), 64):
        chunk = [documents[i] for i in order[start : start + 64]]
        for sample in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            ids += sample
        if len(ids) >= wanted:
            break
    windows = len(ids) // sequence_length
    if windows == 0:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, too few for one sample of {sequence_length}; "
            "give more text or a smaller --sequence-length"
        )
    chosen = sorted(rng.sample(range(windows), min(samples, windows)))
    return [{"input_ids": ids[i * sequence_length : (i + 1) * sequence_length]} for i in chosen]


def _model_inputs(sample: Mapping[str, Sequence[int]], input_names: Sequence[str]) -> Batch:
    """One sample as int64 tensors ``[1, tokens]``, in the model's input order."""
    tokens = len(sample["input_ids"])
    batch: Batch = {}
    for name in input_names:
        if name in sample:
            values = list(sample[name])
        elif name == "attention_mask":
            values = [1] * tokens
        elif name == "token_type_ids":
            values = [0] * tokens
        elif name == "position_ids":
            values = list(range(tokens))
        else:
            raise CalibrationError(
                f"the model's input {name!r} cannot be made from text; pass calibration batches from Python instead"
            )
        batch[name] = torch.tensor([values], dtype=torch.int64)
    return batch


def batches_from_iterable(
    items: Iterable[Any], input_names: Sequence[str], example_inputs: Mapping[str, torch.Tensor], samples: int
) -> list[Batch]:
    """Batches given from Python: each item is a mapping by input name, a tuple in input order, or a single tensor.

    Raises:
        CalibrationError: an item does not match the model's inputs, or there is none.
    """
    batches: list[Batch] = []
    for number, item in enumerate(itertools.islice(items, samples)):
        if isinstance(item, torch.Tensor | np.ndarray):
            item = (item,)
        if isinstance(item, Mapping):
            missing = [name for name in input_names if name not in item]
            if missing:
                raise CalibrationError(f"calibration batch {number} has no input {missing[0]!r}")
            batch = {name: torch.as_tensor(item[name]) for name in input_names}
        elif isinstance(item, (tuple, list)):
            if len(item) != len(input_names):
                raise CalibrationError(
                    f"calibration batch {number} has {len(item)} inputs, the model takes {len(input_names)}: "
                    f"{', '.join(input_names)}"
                )
            batch = {name: torch.as_tensor(value) for name, value in zip(input_names, item, strict=True)}
        else:
            raise CalibrationError(
                f"calibration batch {number} must be a mapping, tuple or tensor, got {type(item).__name__}"
            )
        for name, value in batch.items():
            example = example_inputs[name]
            if value.is_floating_point() and example.is_floating_point():
                batch[name] = value = value.to(
                    example.dtype
                )  # as the example itself is, whatever the model's own dtype
            if value.dtype != example.dtype or value.dim() != example.dim():
                raise CalibrationError(
                    f"calibration batch {number}: input {name!r} must be {example.dtype} with {example.dim()} dimensions, "
                    f"got {value.dtype} with {value.dim()}"
                )
        # A cache of no tokens has no elements either.
        if not any(value.numel() for value in batch.values()) or any(
            value.shape[:1] == (0,) for value in batch.values()
        ):
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
            raise CalibrationError(f"calibration batch {number} is empty: {shapes}")
        batches.append(batch)
    if not batches:
        raise CalibrationError("the calibration iterable is empty")
    return batches


def group_equal_shapes(samples: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Stack samples of equal shape into batches of at most ``batch_size``, shapes in ascending order."""

    def shape(sample: Batch) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(value.shape) for value in sample.values())

    batches: list[Batch] = []
    for _, group in itertools.groupby(sorted(samples, key=shape), key=shape):
        members = list(group)
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            batches.append({name: torch.cat([sample[name] for sample in part]) for name in part[0]})
    return share_equal_inputs(batches)


def share_equal_inputs(batches: Sequence[Batch]) -> list[Batch]:
    """Let equal inputs (an all-ones attention mask) be one tensor, so that what depends on them alone runs once."""
    seen: dict[tuple[str, tuple[int, ...], bytes], torch.Tensor] = {}
    shared = []
    for batch in batches:
        row = {}
        for name, value in batch.items():
            key = (name, tuple(value.shape), hashlib.sha256(_raw_bytes(value)).digest())
            row[name] = seen.setdefault(key, value)
        shared.append(row)
    return shared


def fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 over names, shapes, dtypes and contents, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype};".encode())
            digest.update(_raw_bytes(value))
    return digest.hexdigest()


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def iterate_texts(source: Iterable[Any]) -> Iterator[str]:
    """The strings of an iterable of strings (used to tell texts from batches)."""
    for item in source:
        if not isinstance(item, str):
            raise CalibrationError(f"calibration texts must be strings, got {type(item).__name__}")
        yield item

"""Calibration data: what is read from each kind of file, and how batches are cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import sentences
from transformers import AutoTokenizer

from claq_export.api import capture
from claq_export.calibration.data import (
    batches_from_iterable,
    fingerprint,
    group_equal_shapes,
    read_texts,
    split_sentences,
    tokenize_texts,
)
from claq_export.calibration.loading import load_calibration
from claq_export.config import Config
from claq_export.errors import CalibrationError


def test_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first document\n\nsecond document\n", encoding="utf-8")
    assert read_texts(path) == ["first document", "second document"]


def test_wrapped_paragraphs_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a line\nof a paragraph\n\nanother\nparagraph\n", encoding="utf-8")
    assert read_texts(path) == ["a line of a paragraph", "another paragraph"]


@pytest.mark.parametrize("blank", ["\r\n\r\n", "\n \t\n", "\r\n\r\n\r\n"], ids=["crlf", "spaces", "two"])
def test_blank_lines_of_any_kind_end_a_paragraph(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(f"a line{blank[-1:]}of a paragraph{blank}another\r\nparagraph\r\n".encode())
    assert read_texts(path) == ["a line of a paragraph", "another paragraph"]


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"content": "one"}, {"content": "two"}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_texts(lines) == ["one", "two"]

    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b"{not json}\n", "bad.jsonl:1"),
        ("field.jsonl", b'{"id": 1}\n', "no text field"),
        ("bad.parquet", b"not parquet", "Parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_texts(path)
    assert name in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_texts("no/such/file.txt")


def test_documents_carry_special_tokens_and_windows_do_not(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    names = ("input_ids", "attention_mask", "token_type_ids")
    texts = sentences(40)
    documents = tokenize_texts(texts, tokenizer, input_names=names, samples=10, sequence_length=16)
    assert len(documents) == 10
    for sample in documents:
        assert tuple(sample) == names
        ids = sample["input_ids"][0].tolist()
        assert ids[0] == 2
        assert ids[-1] == 3
        assert len(ids) <= 16
        assert sample["attention_mask"].all()
    windows = tokenize_texts(
        texts, tokenizer, input_names=("input_ids",), samples=5, sequence_length=16, whole_documents=False
    )
    assert [w["input_ids"].shape for w in windows] == [(1, 16)] * 5
    assert not any(2 in w["input_ids"] for w in windows)


def test_draw_depends_on_the_seed_alone(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def draw(seed: int) -> str:
        return fingerprint(
            tokenize_texts(
                sentences(60), tokenizer, input_names=("input_ids",), samples=8, sequence_length=12, seed=seed
            )
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_text_too_short_for_a_window(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with pytest.raises(CalibrationError, match="too few for one sample of 512"):
        tokenize_texts(
            ["short text"], tokenizer, input_names=("input_ids",), samples=1, sequence_length=512, whole_documents=False
        )


def test_batches_never_mix_lengths_and_share_equal_masks() -> None:
    samples = [
        {"input_ids": torch.full((1, n), i), "attention_mask": torch.ones(1, n, dtype=torch.int64)}
        for i, n in enumerate((4, 7, 4, 4, 7))
    ]
    batches = group_equal_shapes(samples, 2)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 4), (1, 4), (2, 7)]
    assert sorted(int(row[0]) for b in batches for row in b["input_ids"]) == [0, 1, 2, 3, 4]
    equal = group_equal_shapes(samples, 1)
    assert equal[0]["attention_mask"] is equal[1]["attention_mask"]


def test_python_batches_are_checked() -> None:
    example = {"x": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.int64)}
    good = (torch.ones(1, 3), torch.ones(1, dtype=torch.int64))
    assert len(batches_from_iterable(iter([good, dict(zip("xy", good, strict=True))]), ("x", "y"), example, 10)) == 2
    # As the model was given: floating numbers of another width are cast, and arrays are tensors.
    half, array = (torch.ones(1, 3, dtype=torch.float16), good[1]), (np.ones((1, 3), np.float32), np.ones(1, np.int64))
    assert all(b["x"].dtype == torch.float32 for b in batches_from_iterable([half, array], ("x", "y"), example, 10))
    assert len(batches_from_iterable([np.ones((1, 3))], ("x",), {"x": example["x"]}, 10)) == 1
    for wrong, message in [
        ((torch.ones(1, 3),), "has 1 inputs"),
        ({"x": good[0]}, "no input 'y'"),
        ((torch.ones(3), good[1]), "must be torch.float32 with 2 dimensions"),
        ("text", "must be a mapping"),
        ((torch.ones(0, 3), torch.ones(0, dtype=torch.int64)), r"batch 0 is empty: x \[0, 3\], y \[0\]"),
        ((torch.ones(0, 3), good[1]), "batch 0 is empty"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            batches_from_iterable([wrong], ("x", "y"), example, 10)
    with pytest.raises(CalibrationError, match="empty"):
        batches_from_iterable([], ("x", "y"), example, 10)


def test_tokens_that_are_none_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    captured, _ = capture(tiny_bert)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    for batch in (dict.fromkeys(captured.input_names, empty), captured.example_inputs | {"input_ids": empty}):
        with pytest.raises(
            CalibrationError, match=r"is empty: input_ids \[2, 0\]|'input_ids' of shape \[2, 0\] holds nothing"
        ):
            load_calibration(captured, Config(calibration=[batch]))
    np.savez(tmp_path / "tokens.npz", input_ids=np.ones((2, 4), np.int64), token_type_ids=np.zeros((2, 4), np.int64))
    wanted = r"no array 'attention_mask'.*each of 'input_ids', 'attention_mask', 'token_type_ids'; it is 1 for tokens"
    with pytest.raises(CalibrationError, match=wanted):
        load_calibration(captured, Config(calibration=tmp_path / "tokens.npz"))


def test_sentences_are_cut_where_a_capital_follows() -> None:
    text = ' It paid 3.5 percent. "So be it," he said! Was it enough? (Nobody knew.) The U.S. economy grew. '
    assert split_sentences(text) == [
        "It paid 3.5 percent.",
        '"So be it," he said!',
        "Was it enough?",
        "(Nobody knew.) The U.S. economy grew.",
    ]
    assert split_sentences("  ") == []


def test_packaged_text_is_given_to_encoders_by_sentences_and_to_decoders_in_windows(
    tiny_bert: Path, tiny_llama: Path
) -> None:
    def samples(model: Path, **settings: int) -> list[torch.Tensor]:
        captured, _ = capture(model)
        batches = load_calibration(captured, Config(sequence_length=32, **settings))
        return [row for batch in batches for row in batch["input_ids"]]

    assert len(samples(tiny_bert)) == 512
    assert len(samples(tiny_bert, samples=7)) == 7
    assert [len(row) for row in samples(tiny_llama)] == [32] * 128


def test_tokens_of_another_tokenizer_are_refused(tiny_llama: Path) -> None:
    captured, _ = capture(tiny_llama)
    rows = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    ones = torch.ones(1, 8, dtype=torch.int64)
    for token in (rows, -1):
        batch = {name: torch.full_like(ones, token) if name == "input_ids" else ones for name in captured.input_names}
        with pytest.raises(CalibrationError, match=f"'input_ids' holds {token}, and the model's .* has {rows} rows"):
            load_calibration(captured, Config(calibration=[batch]))


@pytest.mark.parametrize(
    ("values", "held"),
    [([1, 2], "int64"), ([["one"], ["two"]], "list<"), ([b"one", b"two"], "binary"), ([None, None], "null")],
    ids=["numbers", "lists", "bytes", "nothing"],
)
def test_a_parquet_column_that_is_no_text_is_named(tmp_path: Path, values: list[object], held: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=f"a\\.parquet: no column of text \\('text' holds {held}"):
        read_texts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": values, "content": ["one", "two"]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == ["one", "two"]


def test_parquet_texts_of_a_dictionary_or_of_64_bits(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for kind in (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.large_string()):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", "two"], kind)}), tmp_path / "a.parquet")
        assert read_texts(tmp_path / "a.parquet") == ["one", "two"]

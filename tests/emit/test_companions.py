"""Files copied beside an artifact: the tokenizer's class under a name that transformers 4 and 5 know, all else as it was."""

import json
from pathlib import Path

import pytest
import torch
from full_disk import files_limited_to

from claq_export.emit.companions import copy_companions, declare_quantized
from claq_export.errors import ModelError, OutputError


def test_a_tokenizer_of_transformers_5_opens_in_version_4_too(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = (
        "TokenizersBackend"  # as transformers 5 writes it where a model has no class of its own
    )
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    target = tmp_path / "target"
    target.mkdir()
    copied = {path.name for path in copy_companions(source, target)}
    assert {"tokenizer.json", "tokenizer_config.json"} <= copied
    found = json.loads((target / "tokenizer_config.json").read_text())
    assert found == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    text = "The people of the country."
    assert (
        AutoTokenizer.from_pretrained(target)(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    )


def test_how_sentence_transformers_pools_goes_along(minilm: Path, tmp_path: Path) -> None:
    copied = {path.relative_to(tmp_path).as_posix() for path in copy_companions(minilm, tmp_path)}
    assert {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"} <= copied
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]


def test_other_classes_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class":   "BertTokenizer"}')
    copy_companions(source, target)
    assert (target / "tokenizer_config.json").read_text() == '{"tokenizer_class":   "BertTokenizer"}'
    (source / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json must hold a JSON object"):
        copy_companions(source, target)


def test_a_full_disk_leaves_the_files_of_an_earlier_export(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, word in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"word": word}))
        (folder / "tokenizer.json").write_text(json.dumps({word: "x" * 4000}))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with files_limited_to(1000), pytest.raises(OutputError):
        copy_companions(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (target / "config.json").write_text(json.dumps({"word": "x" * 4000}))
    with files_limited_to(1000), pytest.raises(OutputError, match=r"config\.json cannot be written"):
        declare_quantized(target, 4.0, torch.float32)
    assert json.loads((target / "config.json").read_text()) == {"word": "x" * 4000}
    assert len(list(target.iterdir())) == 2

"""What lies beside an artifact: tokenizer and configuration of its model, which tells transformers that it is quantized."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, OutputError
from ..format.checkpoint import CONFIG_FILE, METHOD, TENSORS_FILE, VERSION
from ..format.files import StagedFiles, write_atomically
from ..inputs import contained, read_json_object
from .artifact import is_data_file, model_files
from .genai import FILE as GENAI_CONFIG

CONFIG = "config.json"

_TOKENIZER = "tokenizer_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names that transformers 5 gives to tokenizer classes -> those that version 4, which optimum needs, and 5 both know."""

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "normalizer.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    # Vocabularies of SentencePiece.
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    # What sentence-transformers does with the tokens' vectors.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Small files of a Hugging Face folder that those who load the ONNX file look for beside it."""


def copy_companions(source: Path, folder: Path) -> list[Path]:
    """Copy configuration and tokenizer files from a Hugging Face folder; none if the source is not a folder.

    A tokenizer's class gets the name that older readers know, else files are as they were. They appear together, once all
    are complete.

    Raises:
        ModelError: a file is a link out of the source, or no JSON object where it should be one.
        OutputError: a file cannot be written.
    """
    copied: list[Path] = []
    if not source.is_dir() or source.resolve() == folder.resolve():
        return copied
    with StagedFiles(folder) as staged:
        for name in _COMPANIONS:
            if (source / name).is_file():
                # A link would copy a file of this machine into what is going to be published.
                origin = contained(source, name, ModelError)
                (folder / name).parent.mkdir(exist_ok=True)
                temporary = staged.stage(name)
                shutil.copyfile(origin, temporary)
                if name == _TOKENIZER:
                    _rename_class(origin, temporary)
                copied.append(folder / name)
    return copied


def is_written_beside(name: str, out: Path) -> bool:
    """Whether an export to ``out`` may write a file of this name (relative to its folder) beside it."""
    models = [model.name for model in model_files(out)]
    if name in (*_COMPANIONS, GENAI_CONFIG, TENSORS_FILE, CONFIG_FILE, *models[1:]):
        return True
    return any(is_data_file(name, model) for model in models)


def earlier_companions(folder: Path, models: Iterable[str]) -> list[Path]:
    """The files that an earlier export of claq wrote beside its artifact, as ``claq.json`` lists them, and nobody changed since.

    None of a folder with other ``.onnx`` files than ``models``, whose companions they may be.
    """
    known = set(models)
    if not (folder / CONFIG_FILE).is_file() or any(path.name not in known for path in folder.glob("*.onnx")):
        return []
    try:
        written = read_json_object(folder / CONFIG_FILE, OutputError).get("files")
    except OutputError:
        return []  # a claq.json that cannot be read lists nothing
    listed = written if isinstance(written, dict) else {}
    beside = [folder / name for name in (*_COMPANIONS, GENAI_CONFIG) if (folder / name).is_file() and name in listed]
    return [folder / name for name, digest in companion_digests(folder, beside).items() if listed[name] == digest]


def companion_digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name below ``folder`` -> hex digest of the SHA-256 of each file's content."""
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _rename_class(origin: Path, copy: Path) -> None:
    settings = read_json_object(origin, ModelError)
    known = _CLASSES.get(str(settings.get("tokenizer_class")))
    if known is not None:
        settings["tokenizer_class"] = known
        copy.write_bytes(_json(settings))


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def declare_quantized(folder: Path, true_bits: float, dtype: torch.dtype) -> Path | None:
    """Write into a folder's ``config.json`` how transformers finds and reads the quantized weights.

    Other readers of the file (ONNX tools, tokenizers) look at other keys and see the model they saw before.

    Args:
        folder: of ``claq.safetensors``, with a copy of the model's ``config.json``; nothing is done without the copy.
        true_bits: a weight, over all quantized layers; for information.
        dtype: of the unquantized tensors.

    Returns:
        the file, or None.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["transformers_weights"] = TENSORS_FILE
    settings["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "true_bits": round(true_bits, 4)}
    try:
        write_atomically(path, _json(settings))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path

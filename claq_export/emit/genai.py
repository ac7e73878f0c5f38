"""``genai_config.json``: what ONNX Runtime GenAI asks of a folder beside the model and its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..format.files import write_atomically
from ..inputs import read_json_object

FILE = "genai_config.json"

_CACHE = re.compile(r"past_key_values\.(\d+)\.key")
_TYPES = (
    *("llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "phimoe", "qwen2", "qwen3", "gpt2"),
    *("granite", "olmo", "smollm", "smollm3", "nemotron", "chatglm", "ernie4_5", "internlm2", "lfm2"),
)
"""Model types GenAI knows by name; all are run alike, and others are declared as ``decoder``."""


def genai_settings(model_file: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    The cache is not shared between past and present, because the attention operator returns a longer one.

    Args:
        model_file: name of the ``.onnx`` file.
        shapes: the graph's inputs by their name in the file, with the sizes of an example.
        config: ``config.json`` of the model, updated with ``generation_config.json`` where there is one.
    """
    nested = config.get("text_config")
    text = {**config, **(nested if isinstance(nested, dict) else {})}
    keys = {name: shape for name, shape in shapes.items() if _CACHE.fullmatch(name)}
    _, kv_heads, _, head_size = next(iter(keys.values()))

    def setting(*names: str, default: Any = None) -> Any:
        return next((text[name] for name in names if text.get(name) is not None), default)

    eos = setting("eos_token_id", default=0)
    first_eos = next(iter(eos), 0) if isinstance(eos, list) else eos
    context = setting("max_position_embeddings", "n_positions", "seq_length", default=2048)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
    kind = text.get("model_type", "llama")
    return {
        "model": {
            "bos_token_id": setting("bos_token_id", default=first_eos),
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": model_file,
                "head_size": head_size,
                "hidden_size": setting("hidden_size", "n_embd", "d_model"),
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": setting("num_attention_heads", "n_head", default=kv_heads),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": kv_heads,
            },
            "eos_token_id": eos,
            "pad_token_id": setting("pad_token_id", default=first_eos),
            "type": kind if kind in _TYPES else "decoder",
            "vocab_size": setting("vocab_size"),
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def write_genai_config(
    folder: Path, model_file: str, shapes: Mapping[str, tuple[int, ...]], described_in: Path | None = None
) -> Path | None:
    """Write ``genai_config.json`` into a folder; None where no ``config.json`` describes the model.

    Args:
        folder: of the model file.
        model_file, shapes: see :func:`genai_settings`.
        described_in: folder of the model's ``config.json``; None: ``folder``.

    Raises:
        OutputError: it cannot be written, or what it is made of not be read.
    """
    described = folder if described_in is None else described_in
    if not (described / "config.json").is_file():
        return None
    config = read_json_object(described / "config.json", OutputError)
    if (described / "generation_config.json").is_file():
        generation = read_json_object(described / "generation_config.json", OutputError)
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        config |= {name: generation[name] for name in tokens if generation.get(name) is not None}
    path = folder / FILE
    try:
        write_atomically(path, (json.dumps(genai_settings(model_file, shapes, config), indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path

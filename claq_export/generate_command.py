"""``claq-export generate``: streams text from an artifact, so that one can see at once whether the model makes sense."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelError
from .inputs import is_text
from .option_types import not_negative
from .standard_output import to_standard_output

_DESCRIPTION = """Generate text from an exported language model, token by token, with ONNX Runtime and (where it is installed)
claq-runtime. A causal model goes on with the prompt, an encoder-decoder (T5, BART, Marian) answers it.

examples:
  claq-export generate ./smol --prompt "The capital of France is" --max-new-tokens 32
  claq-export generate ./t5 --prompt "translate English to German: The house is small."
"""


def add_generate_command(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``generate`` to a parser's subparsers; parsed arguments carry ``run=run_generate``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="stream text from an artifact",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER", help="folder of an artifact, or a causal model's model.onnx")
    parser.add_argument(
        "--prompt", required=True, help="text to go on with, or to answer; - reads it from standard input"
    )
    parser.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the model's chat template, as a user's turn"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 = always the likeliest token (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of probability to draw from")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument(
        "--threads", type=not_negative, default=0, metavar="N", help="threads (default: ONNX Runtime's)"
    )
    parser.add_argument(
        "--library",
        default="auto",
        metavar="PATH",
        help="runtime library: a path, `auto` (installed claq-runtime) or `none` (standard operators)",
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: beside the model)")
    parser.set_defaults(run=run_generate, verbose=False)
    return parser


def run_generate(options: argparse.Namespace) -> None:
    """Stream the text to standard output, the speed to standard error.

    Raises:
        ConfigError: a setting is out of range, or the prompt is empty or not UTF-8.
        ModelError: the artifact or its tokenizer cannot be loaded, the artifact has no cache, or its logits are NaN.
        OutputError: standard output cannot be written.
    """
    from .evaluation.models import open_tokenizer, runtime_library
    from .generation import Generator
    from .generation_seq2seq import Seq2SeqGenerator, is_seq2seq_folder

    path = Path(options.model)
    library = runtime_library(options.library)
    answers = is_seq2seq_folder(path)
    generator = (
        Seq2SeqGenerator(path, library, options.threads) if answers else Generator(path, library, options.threads)
    )
    folder = path if isinstance(generator, Seq2SeqGenerator) else generator.path.parent
    tokenizer = open_tokenizer(folder, chosen=options.tokenizer)
    prompt = _prompt(options.prompt)
    stop = _stop_tokens(tokenizer, folder)
    chosen = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed, "stop": stop}
    ids = _encode(tokenizer, prompt, options.chat)
    if isinstance(generator, Seq2SeqGenerator):
        encoded = _encoded(ids, generator.inputs)
        drawn = generator.tokens(encoded, _first_tokens(folder), options.max_new_tokens, **chosen)
    else:
        drawn = generator.tokens(ids, options.max_new_tokens, **chosen)
        if not options.chat:
            _show(prompt)
    shown, tokens = "", []
    for token in drawn:
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may take several tokens; until it is whole, it decodes to a replacement mark.
        if not text.endswith("\ufffd"):
            _show(text[len(shown) :])
            shown = text
    _show("\n")
    timing = generator.timing
    if answers:
        read = f"{len(ids)} prompt tokens in {timing.prefill_seconds:.2f} s"
    else:
        read = f"{timing.prompt_tokens} prompt tokens at {timing.prefill_rate:.1f} tokens/s"
    print(
        f"{read}, {timing.new_tokens} new ones at {timing.decode_rate:.1f} tokens/s "
        f"({'claq-runtime' if library else 'ONNX Runtime alone'})",
        file=sys.stderr,
    )


def _encoded(ids: list[int], names: tuple[str, ...]) -> dict[str, Any]:
    """What an encoder reads.

    Raises:
        ConfigError: it reads no tokens.
    """
    import numpy as np

    from .capture.tasks import SPECTRUM

    if SPECTRUM in names:
        raise ConfigError(
            "this model hears speech, which no prompt can give; examples/transcribe.py transcribes with it"
        )
    tokens = np.array([ids], np.int64)
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}


def _first_tokens(folder: Path) -> list[int]:
    """What an encoder-decoder's output begins after: the start token, and the language's where one is forced.

    Raises:
        ModelError: the folder's configuration does not tell.
    """
    from .capture.checkpoint import read_json

    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            found |= {
                key: settings[key] for key in ("decoder_start_token_id", "forced_bos_token_id") if key in settings
            }
    start, forced = found.get("decoder_start_token_id"), found.get("forced_bos_token_id")
    if not isinstance(start, int):
        raise ModelError(f"{folder / 'config.json'} names no decoder_start_token_id, so the output cannot begin")
    return [start, forced] if isinstance(forced, int) else [start]


def _prompt(option: str) -> str:
    """The text of ``--prompt``, which may come from standard input.

    Raises:
        ConfigError: it is empty, or not UTF-8.
    """
    if option != "-":
        prompt = option
    else:
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"the prompt on standard input is not UTF-8: {error}") from error
    if not prompt:
        raise ConfigError("the prompt is empty")
    if not is_text(prompt):  # bytes of the command line that are not UTF-8 are halves of surrogate pairs here
        raise ConfigError("the prompt is not UTF-8")
    return prompt


def _show(text: str) -> None:
    with to_standard_output():
        print(text, end="")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template; generate without --chat")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stop_tokens(tokenizer: Any, folder: Path) -> list[int]:
    """End-of-text tokens by the generation configuration, else the tokenizer's."""
    from .capture.checkpoint import read_json

    found: Any = None
    if (folder / "generation_config.json").is_file():
        found = read_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]

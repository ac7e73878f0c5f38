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

_DESCRIPTION = """Generate text from an exported causal language model, token by token, with ONNX Runtime and (where it is
installed) claq-runtime.

example:
  claq-export generate ./smol --prompt "The capital of France is" --max-new-tokens 32
"""


def add_generate_command(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``generate`` to a parser's subparsers; parsed arguments carry ``run=run_generate``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="stream text from an artifact",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER", help="folder of an artifact, or its model.onnx")
    parser.add_argument("--prompt", required=True, help="text to go on with; - reads it from standard input")
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

    path = Path(options.model)
    library = runtime_library(options.library)
    generator = Generator(path, library, options.threads)
    tokenizer = open_tokenizer(generator.path.parent, chosen=options.tokenizer)
    prompt = _prompt(options.prompt)
    ids = _encode(tokenizer, prompt, options.chat)
    stop = _stop_tokens(tokenizer, generator.path.parent)
    drawn = generator.tokens(
        ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=stop,
    )
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
    print(
        f"{timing.prompt_tokens} prompt tokens at {timing.prefill_rate:.1f} tokens/s, "
        f"{timing.new_tokens} new ones at {timing.decode_rate:.1f} tokens/s "
        f"({'claq-runtime' if library else 'ONNX Runtime alone'})",
        file=sys.stderr,
    )


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

"""``claq-export generate``: streams text from an artifact, so that one can see at once whether the model makes sense."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelError

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
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default: ONNX Runtime's)")
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
        ConfigError: a setting is out of range, or the prompt is empty.
        ModelError: the artifact or its tokenizer cannot be loaded, or the artifact has no cache.
    """
    from .evaluation.models import open_tokenizer, runtime_library
    from .generation import Generator

    path = Path(options.model)
    library = runtime_library(options.library)
    generator = Generator(path, library, options.threads)
    tokenizer = open_tokenizer(options.tokenizer, generator.path.parent)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt:
        raise ConfigError("the prompt is empty")
    ids = _encode(tokenizer, prompt, options.chat)
    stop = _stop_tokens(tokenizer, generator.path.parent)
    if not options.chat:
        print(prompt, end="", flush=True)
    shown, tokens = "", []
    for token in generator.tokens(
        ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=stop,
    ):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may take several tokens; until it is whole, it decodes to a replacement mark.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    timing = generator.timing
    print(
        f"{timing.prompt_tokens} prompt tokens at {timing.prefill_rate:.1f} tokens/s, "
        f"{timing.new_tokens} new ones at {timing.decode_rate:.1f} tokens/s "
        f"({'claq-runtime' if library else 'ONNX Runtime alone'})",
        file=sys.stderr,
    )


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

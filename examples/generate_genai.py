"""Generate with an exported language model through ONNX Runtime GenAI.

GenAI loads custom operators only from within the model's folder (a rule of its own), so claq's library is copied there
when claq-runtime is installed; without it the file runs on standard operators.

Usage: python examples/generate_genai.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime_genai as og


def open_model(folder: Path) -> tuple[og.Model, bool]:
    """GenAI's model on the artifact, with claq's kernels where claq-runtime is installed; and whether its cache may then stay
    in buffers that each token is written into, by what the file says of itself."""
    config = og.Config(str(folder))
    try:
        import claq_runtime
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
        return og.Model(config), False
    library = Path(shutil.copy(claq_runtime.library_path(), folder)).name
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"custom_ops_library": "{library}"}}}}}}}}')
    return og.Model(config), b"claq.cache_buffers" in (folder / "model.onnx").read_bytes()


def likeliest(model: og.Model, in_place: bool, prompt: Sequence[int], count: int) -> list[int]:
    """A prompt and the ``count`` likeliest tokens after it."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False, past_present_share_buffer=in_place)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, text, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 32
    model, in_place = open_model(folder)
    tokenizer = og.Tokenizer(model)
    print(tokenizer.decode(likeliest(model, in_place, tokenizer.encode(text), count)))


if __name__ == "__main__":
    main()

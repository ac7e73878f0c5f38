"""Generate with an exported language model through ONNX Runtime GenAI.

GenAI loads custom operators only from within the model's folder (a rule of its own), so claq's library is copied there
when claq-runtime is installed; without it the file runs on standard operators.

Usage: python examples/generate_genai.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import shutil
import sys
from pathlib import Path

import onnxruntime_genai as og


def open_model(folder: Path) -> og.Model:
    """GenAI's model on the artifact, with claq's kernels where claq-runtime is installed."""
    config = og.Config(str(folder))
    try:
        import claq_runtime

        library = Path(shutil.copy(claq_runtime.library_path(), folder)).name
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"custom_ops_library": "{library}"}}}}}}}}')
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
    return og.Model(config)


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, text, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 32
    model = open_model(folder)
    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode(text)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    print(tokenizer.decode(generator.get_sequence(0)))


if __name__ == "__main__":
    main()

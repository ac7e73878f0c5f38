"""Generate text with an exported language model in plain ONNX Runtime: no torch, no transformers, NumPy only.

Usage: python examples/generate_onnxruntime.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def open_session(model: Path) -> ort.InferenceSession:
    """A session with claq's kernels where claq-runtime is installed; without it the same file runs on standard operators."""
    options = ort.SessionOptions()
    try:
        import claq_runtime

        claq_runtime.register(options)
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def generate(session: ort.InferenceSession, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token, ``count`` times. The first run reads the whole prompt, the others one token each."""
    inputs = {value.name: value for value in session.get_inputs()}
    cache = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16 if "float16" in value.type else np.float32)
        for name, value in inputs.items()
        if name.startswith("past_key_values")
    }
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    new, length, tokens = prompt, 0, []
    for _ in range(count):
        feed = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length + len(new)), np.int64)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(length, length + len(new))[None]
        logits, *state = session.run(outputs, feed | cache)
        cache = dict(zip(cache, state, strict=True))
        length += len(new)
        new = [int(logits[0, -1].argmax())]
        tokens += new
    return tokens


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, text, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 32
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(text).ids
    tokens = generate(open_session(folder / "model.onnx"), prompt, count)
    print(tokenizer.decode(prompt + tokens))


if __name__ == "__main__":
    main()

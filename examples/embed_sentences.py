"""Embed sentences with an exported MiniLM through ONNX Runtime: no torch, no transformers, a few lines of numpy.

Usage: python examples/embed_sentences.py model.onnx
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "A cat sleeps on the warm windowsill.",
]


def open_session(model: str) -> ort.InferenceSession:
    """A session with claq's kernels where claq-runtime is installed; without it the same file runs on standard operators."""
    options = ort.SessionOptions()
    try:
        import claq_runtime

        claq_runtime.register(options)
        print(f"claq-runtime {claq_runtime.__version__}")
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def embed(session: ort.InferenceSession, tokenizer: Tokenizer, sentences: list[str]) -> np.ndarray:
    """Unit vectors [sentences, 384]: the mean of the token states over the attention mask."""
    encoded = tokenizer.encode_batch(sentences)
    feeds = {
        "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], dtype=np.int64),
    }
    wanted = {i.name for i in session.get_inputs()}
    (states,) = session.run(["last_hidden_state"], {k: v for k, v in feeds.items() if k in wanted})
    mask = feeds["attention_mask"][..., None].astype(np.float32)
    pooled = (states * mask).sum(1) / mask.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def main() -> None:
    model = Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    vectors = embed(open_session(str(model)), tokenizer, SENTENCES)
    similarity = vectors @ vectors.T
    for i, sentence in enumerate(SENTENCES):
        nearest = max((j for j in range(len(SENTENCES)) if j != i), key=lambda j: similarity[i, j])
        print(f"{sentence}\n    nearest ({similarity[i, nearest]:.2f}): {SENTENCES[nearest]}")


if __name__ == "__main__":
    main()

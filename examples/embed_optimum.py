"""Embed sentences with an exported encoder through optimum's ORTModelForFeatureExtraction.

Usage: python examples/embed_optimum.py FOLDER
"""

import sys

import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer

SENTENCES = ["A man is playing a guitar on stage.", "Someone performs music.", "The stock market fell sharply."]


def embed(folder: str, sentences: list[str]) -> torch.Tensor:
    """Unit vectors ``[sentences, hidden]``: the mean of the token states over the attention mask."""
    options = ort.SessionOptions()
    try:
        import claq_runtime

        claq_runtime.register(options)
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
    model = ORTModelForFeatureExtraction.from_pretrained(folder, file_name="model.onnx", session_options=options)
    inputs = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    vectors = embed(sys.argv[1], SENTENCES)
    for sentence, similarity in zip(SENTENCES, (vectors @ vectors[0]).tolist(), strict=True):
        print(f"{similarity:.3f}  {sentence}")


if __name__ == "__main__":
    main()

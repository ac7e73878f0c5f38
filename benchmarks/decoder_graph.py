"""Is the exported decoder the original's function? Perplexity of both with quantization off, and of the original.

    python benchmarks/decoder_graph.py SMOLLM2 --text wiki.test.raw [--windows 2] [--length 512] [--json results.json]

The graph with cache is captured, its operators are fused, and it is emitted with all weights as they are. Perplexity is
taken once in one piece (empty cache) and once with each window fed in two parts, the second with the first in the cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from claq_export.capture.decoder import capture_decoder
from claq_export.capture.pretrained import load_pretrained
from claq_export.compiler import emit_captured
from claq_export.evaluation.language import language_quality, read_text, token_windows
from claq_export.evaluation.models import TorchModel
from claq_export.generation import Generator
from claq_export.passes import AdditiveMasks, PassContext, Pipeline, RemoveNoops, decoder_pipeline


class Steps:
    """The emitted graph as a model of logits; each window in one piece, or in two."""

    def __init__(self, generator: Generator, parts: int) -> None:
        self.generator, self.parts = generator, parts

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        cache, length, found = self.generator.empty_cache(), 0, []
        for part in np.array_split(tokens.numpy(), self.parts, axis=1):
            logits, cache = self.generator.step(part, length, cache)
            length += part.shape[1]
            found.append(logits)
        return torch.from_numpy(np.concatenate(found, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of a causal language model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer, _ = load_pretrained(options.model)
    windows = token_windows(read_text(options.text), tokenizer, options.length, options.windows)
    results = {"original": language_quality(TorchModel(model.model), windows).perplexity}
    captured = capture_decoder(model)
    Pipeline([AdditiveMasks(), RemoveNoops()]).run(captured.graph_module, PassContext(task="text-generation"))
    for record in decoder_pipeline().run(captured.graph_module, PassContext(task="text-generation")):
        print(record.name, *record.notes, sep="\n  ")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        emit_captured(captured, path)
        generator = Generator(path)
        results["ONNX, one piece"] = language_quality(Steps(generator, 1), windows).perplexity
        results["ONNX, two pieces"] = language_quality(Steps(generator, 2), windows).perplexity
    for name, value in results.items():
        print(f"{name:18} {value:.6f}")
    if options.json:
        results |= {"windows": options.windows, "length": options.length}
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

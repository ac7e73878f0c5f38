"""Generate text in PyTorch with 4-bit weights: compile, generate, save, load without calibrating again.

python examples/torch_compile.py SmolLM2-135M          # a folder or hub id of a causal language model
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_export


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    start = time.perf_counter()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(f"  {time.perf_counter() - start:.1f} s")
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main(folder: str, fallback: str = "inductor", samples: int = 16, sequence_length: int = 256) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = "The history of the railway begins with"
    print("original:", generate(model, tokenizer, prompt))

    # Calibrated on the text that comes with claq; `generate` asks for nothing else.
    options = {
        "bits": 4,
        "fallback": fallback,
        "tokenizer": tokenizer,
        "samples": samples,
        "sequence_length": sequence_length,
        "release_weights": True,
    }
    model.forward = torch.compile(model.forward, backend="claq", options=options)
    print("quantized, with compilation:", generate(model, tokenizer, prompt))
    print("quantized:", generate(model, tokenizer, prompt))

    with tempfile.TemporaryDirectory() as out:
        claq_export.save_compiled(model, out)
        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        fresh.forward = torch.compile(fresh.forward, backend="claq", options={"weights": out, "fallback": fallback})
        print("loaded:", generate(fresh, tokenizer, prompt))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])

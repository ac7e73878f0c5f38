"""Generate text with a claq folder inside transformers, on the quantized weights.

    claq-export ./SmolLM2-135M-Instruct --out smol/model.onnx
    python examples/transformers_load.py smol --prompt "The sea was"

The folder is the one that claq-export wrote for ONNX Runtime; nothing is converted. Where claq-runtime is installed the
quantized layers run on its kernels, elsewhere on a slower reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_export.integrations.transformers  # noqa: F401 - registers the quantization method "claq"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder that claq-export wrote from a causal language model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at most (default: %(default)s)")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"{model.get_memory_footprint() / 1e6:.1f} MB in memory")


if __name__ == "__main__":
    main()

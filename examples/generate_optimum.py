"""Generate with an exported language model through optimum: beam search, sampling and all else that transformers offers.

Needs optimum-onnx (and, today, transformers 4.57, which it asks for); claq-export itself is not needed.

Usage: python examples/generate_optimum.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import sys

import onnxruntime as ort
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def open_model(folder: str) -> ORTModelForCausalLM:
    """optimum's model on the artifact, with claq's kernels where claq-runtime is installed."""
    options = ort.SessionOptions()
    try:
        import claq_runtime

        claq_runtime.register(options)
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
    # IO binding allocates outputs by shapes that it works out itself; on the CPU plain runs are as fast.
    return ORTModelForCausalLM.from_pretrained(
        folder, file_name="model.onnx", session_options=options, use_io_binding=False
    )


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, text, count = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = open_model(folder).generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=count, do_sample=False
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

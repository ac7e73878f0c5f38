"""Text from a causal language model in ONNX Runtime, token by token; the service is the same before and after its move.

The key/value cache stays in ONNX Runtime's own memory: what a step returns is bound as an input of the next one, and no
array passes through Python but one row of logits.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PAST, PRESENT = "past_key_values.", "present."


class Decoder:
    """A language model with a cache, in files named as optimum and claq-export name them, and its tokenizer.

    Args:
        model: ``model.onnx``, with ``tokenizer.json`` and ``config.json`` beside it.
        options: of the session.
    """

    def __init__(self, model: Path, options: onnxruntime.SessionOptions) -> None:
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
        settings = json.loads((model.parent / "config.json").read_text())
        generation = model.parent / "generation_config.json"
        if generation.is_file():
            settings |= json.loads(generation.read_text())
        end = settings.get("eos_token_id")
        self.end = set(end) if isinstance(end, list) else {end}
        self.context = settings.get("max_position_embeddings", 2048)
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.takes_positions = "position_ids" in inputs
        self.cache = {name: value for name, value in inputs.items() if name.startswith(PAST)}

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """The likeliest next token, at most ``count`` times; the text's end is not yielded."""
        binding = self.session.io_binding()
        for name, value in self.cache.items():
            _, heads, _, size = value.shape
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            binding.bind_cpu_input(name, np.zeros((1, heads, 0, size), dtype))
        new, length = prompt, 0
        for _ in range(count):
            binding.bind_cpu_input("input_ids", np.array([new], np.int64))
            binding.bind_cpu_input("attention_mask", np.ones((1, length + len(new)), np.int64))
            if self.takes_positions:
                binding.bind_cpu_input("position_ids", np.arange(length, length + len(new))[None])
            # Bound again for every step: an output that keeps its buffer keeps its shape, and the cache grows.
            for name in ("logits", *(PRESENT + name.removeprefix(PAST) for name in self.cache)):
                binding.bind_output(name)
            self.session.run_with_iobinding(binding)
            logits, *state = binding.get_outputs()
            for name, value in zip(self.cache, state, strict=True):
                binding.bind_ortvalue_input(name, value)
            length += len(new)
            token = int(logits.numpy()[0, -1].argmax())
            if token in self.end:
                return
            yield token
            new = [token]

    def stream(self, prompt: list[int], count: int) -> Iterator[tuple[int, str]]:
        """Each token with the text that it completes, empty where a character takes further tokens."""
        tokens, shown = [], ""
        for token in self.tokens(prompt, count):
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            piece = "" if text.endswith("\ufffd") else text[len(shown) :]
            shown += piece
            yield token, piece

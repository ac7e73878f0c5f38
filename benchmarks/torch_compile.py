"""Decoding in PyTorch: torch.compile(model, backend="claq") against Inductor in float32.

    python benchmarks/torch_compile.py --model SmolLM2-135M [--artifact exported] [--eager] [--rounds 12] [--threads 2]

Every variant decodes the same prompt with a dynamic cache, one token a step; the prompt itself runs uncompiled and is not
timed. The variants take turns, a few steps each, so that whatever else the machine does hits all alike; printed are medians
and the ratio of medians to Inductor's. Greedy tokens through the backend (``fallback="eager"``, which spares a compilation of
the prompt's graph) are compared with those of a model from ``claq_export.quantize`` with the same settings; with
``--artifact``, those of the backend on the artifact's weights with those that ONNX Runtime generates from the artifact.
``--eager`` times the model as it is, and with the modules of ``claq_export.quantize``, without torch.compile, too. Writes
benchmarks/results/torch_compile_KERNEL.md and .json, KERNEL being the family of claq's kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cpu_matmul import cpu_name, report_name

import claq_export
from claq_export import Config
from claq_export.backend import claq
from claq_export.capture import TaskModel
from claq_export.evaluation import runtime_library
from claq_export.generation import Generator

RESULTS = Path(__file__).parent / "results"
STEPS = 8
"""Tokens a variant decodes before the next one's turn."""


class Decoder:
    """A model that decodes greedily, one token a call of :meth:`step`.

    Args:
        prefill: what runs the prompt.
        decode: what runs a step.
        prompt: tokens ``[1, sequence]``.
    """

    def __init__(self, prefill: Any, decode: Any, prompt: torch.Tensor) -> None:
        self._prefill = prefill
        self._decode = decode
        self._prompt = prompt
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        output = self._prefill(self._prompt, use_cache=True)
        self._cache = output.past_key_values
        self._token = output.logits[:, -1:].argmax(-1)
        self.tokens = [int(self._token)]

    @torch.no_grad()
    def step(self) -> float:
        start = time.perf_counter()
        output = self._decode(self._token, past_key_values=self._cache, use_cache=True)
        self._token = output.logits[:, -1:].argmax(-1)
        seconds = time.perf_counter() - start
        self.tokens.append(int(self._token))
        return seconds


def load(folder: str, layers: int | None) -> Any:
    from transformers import AutoModelForCausalLM

    cut = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **cut).eval()


def quantized_eagerly(model: Any, config: Config, tokenizer: Any) -> Any:
    wrapped = TaskModel(model, "text-generation")
    example = tuple(wrapped.example_inputs().values())
    claq_export.quantize(wrapped, example, config, tokenizer=tokenizer)
    return model


def count_equal(got: list[int], wanted: list[int]) -> str:
    """How many tokens agree before the first difference."""
    pairs = zip(got, wanted, strict=True)
    return f"{next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted))} of {len(wanted)}"


def compare_with_artifact(arguments: argparse.Namespace, prompt: torch.Tensor) -> str:
    """How many greedy tokens of the backend on an artifact's weights are those of ONNX Runtime with claq-runtime on it.

    Both in float32 arithmetic, which is what layers have in PyTorch; a file asks for int8 by default.
    """
    torch._dynamo.reset()
    model = load(arguments.model, arguments.layers)
    options = {"weights": arguments.artifact, "fallback": "eager", "progress": False}
    compiled = torch.compile(model.forward, backend=claq, options=options)
    decoder = Decoder(compiled, compiled, prompt)
    for _ in range(arguments.check_tokens - 1):
        decoder.step()
    torch._dynamo.reset()
    os.environ["CLAQ_ACCURACY"] = "fp32"  # read when the session is made
    generator = Generator(arguments.artifact, runtime_library("auto"), arguments.threads)
    del os.environ["CLAQ_ACCURACY"]
    return count_equal(decoder.tokens, list(generator.tokens(prompt[0].tolist(), arguments.check_tokens)))


def compare_tokens(
    arguments: argparse.Namespace, settings: dict[str, Any], own: dict[str, Any], tokenizer: Any, prompt: torch.Tensor
) -> str:
    """How many greedy tokens of the backend agree with those of the model quantized in place."""
    torch._dynamo.reset()
    model = load(arguments.model, arguments.layers)
    chosen = {**settings, **own, "fallback": "eager", "progress": False}
    compiled = torch.compile(model.forward, backend=claq, options=chosen)
    expected = quantized_eagerly(load(arguments.model, arguments.layers), Config(**settings), tokenizer)
    runs = [Decoder(one, one, prompt) for one in (compiled, expected)]
    for _ in range(arguments.check_tokens - 1):
        for run in runs:
            run.step()
    torch._dynamo.reset()
    return count_equal(runs[0].tokens, runs[1].tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--layers", type=int, help="only the model's first layers: compiling all takes minutes")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--calibration", default="none", help="text file, 'default' or 'none'")
    parser.add_argument("--artifact", type=Path, help="folder that claq-export made of the model: compare its tokens")
    parser.add_argument("--accuracy", nargs="+", default=["fp32", "int8"], choices=["fp32", "int8"])
    parser.add_argument("--eager", action="store_true", help="also without torch.compile")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--check-tokens", type=int, default=48, help="greedy tokens compared; 0: none")
    parser.add_argument("--machine", default="", help="what it is; default: the processor and number of cores")
    parser.add_argument("--note", default="", help="written beside the figures, such as what else the machine did")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = (
        "The history of the railway begins with wooden tracks on which horses drew carts full of coal and stone. " * 8
    )
    prompt = torch.tensor([tokenizer(text)["input_ids"][: arguments.prompt]])
    settings: dict[str, Any] = {"bits": arguments.bits, "calibration": arguments.calibration}
    own = {"tokenizer": tokenizer} if arguments.calibration != "none" else {}
    agreement = exported = ""
    if arguments.check_tokens:
        agreement = compare_tokens(arguments, settings, own, tokenizer, prompt)
        print(f"greedy tokens equal to those of claq_export.quantize: {agreement}", flush=True)
    if arguments.check_tokens and arguments.artifact:
        exported = compare_with_artifact(arguments, prompt)
        print(f"greedy tokens equal to those of the exported artifact: {exported}", flush=True)

    decoders: dict[str, Decoder] = {}
    for name, accuracy in [("Inductor, float32", None), *((f"claq, {name}", name) for name in arguments.accuracy)]:
        model = load(arguments.model, arguments.layers)
        if accuracy is None:
            decode = torch.compile(model.forward, dynamic=True)
        else:
            chosen = {**settings, **own, "accuracy": accuracy, "progress": False}
            decode = torch.compile(model.forward, backend=claq, dynamic=True, options=chosen)
        start = time.perf_counter()
        decoders[name] = Decoder(model, decode, prompt)
        for _ in range(3):
            decoders[name].step()
        print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)

    if arguments.eager:
        dense = load(arguments.model, arguments.layers)
        modules = quantized_eagerly(load(arguments.model, arguments.layers), Config(**settings), tokenizer)
        decoders["eager, float32"] = Decoder(dense, dense, prompt)
        decoders["claq's modules, eager, fp32"] = Decoder(modules, modules, prompt)
    for decoder in decoders.values():
        decoder.restart()
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(arguments.rounds):
        for name, decoder in decoders.items():
            decoder.step()  # the caches of the processor hold another model's weights
            seconds[name] += [decoder.step() for _ in range(STEPS)]
    base = statistics.median(seconds["Inductor, float32"])
    rows = [
        {
            "variant": name,
            "ms a token": round(1e3 * statistics.median(times), 2),
            "tokens a second": round(1 / statistics.median(times), 1),
            "speed to Inductor": round(base / statistics.median(times), 2),
        }
        for name, times in seconds.items()
    ]
    about = {
        "model": Path(arguments.model).name,
        "layers": arguments.layers,
        "bits": arguments.bits,
        "calibration": Path(arguments.calibration).name,
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "steps": arguments.rounds * STEPS,
        "greedy tokens equal to those of claq_export.quantize": agreement,
        "to those of the exported artifact in ONNX Runtime": exported,
        "torch": torch.__version__,
        "machine": arguments.machine or f"{cpu_name()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "note": arguments.note,
    }
    lines = [
        f"# Decoding with torch.compile: {about['model']}, {arguments.bits:g} bits",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items() if value and key not in ("model", "bits")) + ".",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"torch_compile_{report_name()}.md"
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

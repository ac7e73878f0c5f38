"""One quantized language model as graphs in float32, float16 and bfloat16: greedy tokens, perplexity, bytes, decode speed.

All graphs hold the same quantized layers: they are quantized once, and each export goes on from them. What is compared is the
graph's arithmetic alone.

    python benchmarks/dtypes.py --model ./SmolLM2-135M --text wiki.test.raw --folder dtypes --out benchmarks/results/dtypes.md

Artifacts that are in ``--folder`` already are measured, not made again. A bfloat16 graph runs on the CPU as its wide copy
(:mod:`claq_export.onnx_session`), so its speed is not reported.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
from datetime import date
from pathlib import Path

import onnxruntime

import claq_export
from claq_export.api import capture
from claq_export.calibration.progress import ProgressReporter
from claq_export.compiler import Compilation, used_state
from claq_export.evaluation import (
    OnnxModel,
    language_quality,
    open_tokenizer,
    read_text,
    runtime_library,
    token_windows,
)
from claq_export.generation import Generator

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "The first law of thermodynamics states",
)
SPEED_PROMPT = "It was a dark and stormy night;"

_HEAD = """# One model in several dtypes

`benchmarks/dtypes.py`, {model}, {bits:g} bits, calibration {calibration} ({samples} samples); {date}, {machine},
{threads} threads, ONNX Runtime {onnxruntime}, load average {load:.1f} at the end. Perplexity over {windows} windows of {context}
tokens of {text}; KL to the float32 graph; greedy tokens equal to the float32 graph's before the first difference, {prompts}
prompts.

| graph | model.onnx and data | claq.safetensors | equal greedy tokens | perplexity | KL | tokens/s, runtime | tokens/s, stock |
|---|---|---|---|---|---|---|---|
"""


def make_artifacts(options: argparse.Namespace) -> None:
    """Export what is missing; the layers are quantized once, into a work folder that each export gets a copy of."""
    missing = [dtype for dtype in options.dtypes if not (options.folder / dtype / "model.onnx").is_file()]
    layers = options.folder / "layers"

    def config(dtype: str) -> claq_export.Config:
        return claq_export.Config(
            bits=options.bits,
            dtype=dtype,
            calibration=options.calibration,
            samples=options.samples,
            sequence_length=options.sequence_length,
        )

    with ProgressReporter(quiet=options.quiet) as reporter:
        if missing and not layers.is_dir():
            captured, module = capture(options.model)
            compilation = Compilation(captured, config("float32"), reporter, used_state(module, captured))
            del module
            compilation.quantize_sites(layers)
        for dtype in missing:
            work = options.folder / f"{dtype}.work"
            shutil.copytree(layers, work, dirs_exist_ok=True)
            out = options.folder / dtype / "model.onnx"
            claq_export.export(
                options.model, out=out, config=config(dtype), work=work, verify=options.verify, reporter=reporter
            )


def greedy(folder: Path, count: int, threads: int) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    tokenizer = open_tokenizer(folder)
    generator = Generator(folder, runtime_library("auto"), threads)
    return [list(generator.tokens(tokenizer(prompt)["input_ids"], count)) for prompt in PROMPTS]


def decode_rate(folder: Path, library: Path | None, threads: int, count: int, rounds: int) -> float:
    """Median tokens a second after the first one."""
    prompt = open_tokenizer(folder)(SPEED_PROMPT)["input_ids"]
    generator = Generator(folder, library, threads)
    rates = []
    for _ in range(rounds + 1):
        for _ in generator.tokens(prompt, count):
            pass
        rates.append(generator.timing.decode_rate)
    return statistics.median(rates[1:])


def equal_tokens(found: list[list[int]], wanted: list[list[int]]) -> str:
    """How many tokens agree before the first difference, over all prompts."""
    same = 0
    for a, b in zip(found, wanted, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return f"{same} of {sum(map(len, wanted))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a causal language model")
    parser.add_argument("--text", required=True, help="text for the perplexity")
    parser.add_argument("--folder", type=Path, required=True, help="where the artifacts are or go")
    parser.add_argument("--out", type=Path, help="the table to write (default: print it)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", help="what it is (default: its architecture)")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    make_artifacts(options)

    library = runtime_library("auto")
    reference = options.folder / options.dtypes[0]
    wanted = greedy(reference, options.tokens, options.threads)
    windows = token_windows(read_text(options.text), open_tokenizer(reference), options.context, options.windows)
    original = OnnxModel(reference / "model.onnx", library, options.threads)
    rows = []
    for dtype in options.dtypes:
        folder = options.folder / dtype
        files = sorted(folder.glob("model.onnx*"))
        model = OnnxModel(folder / "model.onnx", library, options.threads)
        quality = language_quality(model, windows, None if folder == reference else original)
        speed = ["not measured", "not measured"]
        if dtype != "bfloat16":
            speed = [
                f"{decode_rate(folder, chosen, options.threads, options.tokens, options.rounds):.1f}"
                for chosen in (library, None)
            ]
        rows.append(
            f"| {dtype} | {sum(file.stat().st_size for file in files) / 1e6:.1f} MB "
            f"| {(folder / 'claq.safetensors').stat().st_size / 1e6:.1f} MB "
            f"| {equal_tokens(greedy(folder, options.tokens, options.threads), wanted)} | {quality.perplexity:.3f} "
            f"| {0.0 if quality.kl_mean is None else quality.kl_mean:.1e} | {speed[0]} | {speed[1]} |"
        )
    text = _HEAD.format(
        model=Path(options.model).name,
        bits=options.bits,
        calibration=options.calibration,
        samples=options.samples,
        date=date.today().isoformat(),
        machine=options.machine or platform.machine(),
        threads=options.threads,
        onnxruntime=onnxruntime.__version__,
        load=os.getloadavg()[0],
        windows=len(windows),
        context=options.context,
        text=Path(options.text).name,
        prompts=len(PROMPTS),
    )
    text += "\n".join([*rows, ""])
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

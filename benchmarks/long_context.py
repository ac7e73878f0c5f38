"""Decoding after prompts of thousands of tokens: claq with its cache in place and copied, beside MatMulNBits and llama.cpp.

    claq-export SMOLLM2 --out smol/model.onnx --last-logits
    claq-export SMOLLM2 --out smol16/model.onnx --last-logits --cache-dtype float16
    python benchmarks/long_context.py smol [--narrow smol16] [--gguf Q4_K_M.gguf Q4_0.gguf] [--write NAME]

Each system reads the prompt and generates ``--new-tokens``; they take turns, and each turn begins with another. The peer
``MatMulNBits`` is the graph of ``decoder.py``, sibling linears stacked, with ONNX Runtime's own ``Attention``, which makes a
longer cache at each step. llama.cpp runs where llama-cpp-python is installed and a file given; its cache is float16, as that of
``--narrow`` is; that of the others is float32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from cpu_matmul import cpu_name
from decoder import as_nbits, each, llama_tokens, turns, written_at_once

import claq_runtime
from claq_export.generation import Generator

RESULTS = Path(__file__).parent / "results"
Tokens = Callable[[list[int], int], Iterator[int]]


def systems(
    folder: Path, narrow: Path | None, work: Path, gguf: list[Path], room: int, threads: int
) -> dict[str, Tokens]:
    """What generates tokens after a prompt, by name; ``room`` is for the longest."""
    library = Path(claq_runtime.library_path())

    def generator(source: Path, name: str) -> Generator:
        place = work / name
        place.mkdir(exist_ok=True)
        for file in source.glob("model.onnx*"):
            written_at_once(file, place)
        made = Generator(place / "model.onnx", library, threads)
        if not made.in_place:
            raise SystemExit(f"{source} does not take buffers for its cache")
        return made

    in_place, copied = generator(folder, "float32"), generator(folder, "float32")
    copied.in_place = False
    nbits = Generator(as_nbits(folder, work / "nbits.onnx", True), library, threads)
    found: dict[str, Tokens] = {} if narrow is None else {"claq, float16": generator(narrow, "float16").tokens}
    found |= {
        "claq, in place": in_place.tokens,
        "claq, copied": copied.tokens,
        "MatMulNBits": nbits.tokens,
    }
    for path in gguf:
        found[f"llama.cpp {path.stem}"] = llama_tokens(written_at_once(path, work), room, 512, threads)
    return found


def measure(runs: dict[str, Tokens], prompt: list[int], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians: milliseconds of a new token, seconds of the prompt."""
    steps: dict[str, list[float]] = {name: [] for name in runs}
    prompts: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in turns(list(runs), rounds):
        first, *others = each(runs[name](prompt, count))
        prompts[name].append(first)
        steps[name] += others
    return {
        name: {"token_ms": 1000 * statistics.median(steps[name]), "prompt_s": statistics.median(prompts[name])}
        for name in runs
    }


def table(document: dict[str, Any]) -> str:
    names = list(next(iter(document["lengths"].values())))
    lines = [
        "# Long contexts",
        "",
        f"Written by `benchmarks/long_context.py` on {document['date']}: {document['cpu']}, {document['threads']} threads, ONNX "
        f"Runtime {document['onnxruntime']}, load average {document['load']:.0f} at the start. {document['note']}".rstrip(),
        "Milliseconds of a token after a prompt of so many tokens, medians, systems in turns; in brackets the prompt's seconds.",
        "",
        "| prompt | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for length, found in document["lengths"].items():
        cells = (f"{found[name]['token_ms']:.1f} ({found[name]['prompt_s']:.2f})" for name in names)
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a language model exported by claq-export")
    parser.add_argument("--narrow", type=Path, help="the same model with a cache in float16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 512, 2000, 4000, 7500])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="llama.cpp files of the same model")
    parser.add_argument("--note", default="", help="written into the results")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md and NAME.json")
    options = parser.parse_args()
    vocabulary = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    draw = np.random.default_rng(0).integers(3, vocabulary, max(options.lengths)).tolist()
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": options.threads,
        "onnxruntime": ort.__version__,
        "load": os.getloadavg()[0],
        "note": options.note,
        "lengths": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        room = max(options.lengths) + options.new_tokens
        runs = systems(options.folder, options.narrow, Path(scratch), options.gguf, room, options.threads)
        for length in options.lengths:
            document["lengths"][length] = measure(runs, draw[:length], options.new_tokens, options.rounds)
            print(length, document["lengths"][length], flush=True)
    text = table(document)
    print(text)
    if options.write:
        (RESULTS / f"{options.write}.md").write_text(text)
        (RESULTS / f"{options.write}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

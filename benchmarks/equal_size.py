"""The whole widths of `--bits N` beside a budget of true bits that makes a file of the same size.

    python benchmarks/equal_size.py MODEL --text sts-test.csv --task sts [--bits 2 3 4] [--write NAME]
    python benchmarks/equal_size.py MODEL --text wiki.test.raw --task perplexity --windows 20 --samples 16

Exports the model at each width, and with the budget that this came to, rounded down to hundredths. Both are measured by
`claq-export eval` in the file's int8 arithmetic, and timed in turns on one thread: a sentence encoder on a sentence of 128
tokens, a language model on tokens after a prompt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from cpu_matmul import cpu_name
from decoder import each, turns
from settled import settled_turn

import claq_export
import claq_runtime
from claq_export.generation import Generator

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
COLUMNS = {
    "sts": {"cosine_mean": "cosine to the original", "spearman": "Spearman correlation"},
    "perplexity": {"perplexity": "perplexity", "kl_mean": "KL to the original", "top1_agreement": "top-1 agreement"},
}


def exported(model: Path, folder: Path, bits: float, samples: int | None) -> dict[str, Any]:
    """Bits and size of an export, and its seconds but for those of verification, which is left out."""
    config = claq_export.Config(bits=bits, samples=samples)
    result = claq_export.export(model, out=folder / "model.onnx", config=config, verify=False)
    return {
        "bits": bits,
        "true_bits": result.true_bits,
        "megabytes": result.artifact_bytes / 1e6,
        "export_s": sum(result.seconds.values()),
    }


def measured(artifact: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [str(Path(sys.executable).with_name("claq-export")), "eval", str(artifact), "--task", options.task]
    command += ["--text", str(options.text), "--reference", str(options.model), "--quiet", "--json"]
    if options.windows is not None:
        command += ["--windows", str(options.windows)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def encoding(artifact: Path) -> Callable[[], list[float]]:
    """Times of one sentence of 128 tokens."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    claq_runtime.register(options)
    session = ort.InferenceSession(artifact, options)
    tokens = np.random.default_rng(0).integers(1000, 20000, (1, 128))
    values = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    feeds = {value.name: values[value.name] for value in session.get_inputs()}
    return lambda: settled_turn(lambda: session.run(None, feeds))


def decoding(artifact: Path) -> Callable[[], list[float]]:
    """Times of the tokens after a prompt of 16."""
    generator = Generator(artifact, Path(claq_runtime.library_path()), 1)
    prompt = np.random.default_rng(0).integers(1000, 20000, 16).tolist()
    return lambda: each(generator.tokens(prompt, 33))[1:]


def table(document: dict[str, Any]) -> str:
    names = COLUMNS[document["task"]]
    lines = [
        "# Whole widths and budgets of the same size",
        "",
        f"Written by `benchmarks/equal_size.py` on {document['date']}: {document['model']}, {document['settings']}; "
        f"{document['cpu']}, {os.cpu_count()} cores, load average {document['load']:.0f} at the start. Embeddings and heads "
        "count in the bits. Export: seconds without verification. Time: of a sentence of 128 tokens, or of a token, medians "
        "on one thread, relative to the first row.",
        "",
        f"| `--bits` | true bits | MB | {' | '.join(names.values())} | time | export |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in document["rows"]:
        figures = " | ".join(f"{row[name]:.4f}" if row[name] < 10 else f"{row[name]:.2f}" for name in names)
        lines.append(
            f"| {row['bits']:g} | {row['true_bits']:.3f} | {row['megabytes']:.2f} | {figures} | "
            f"{row['time']:.2f} | {row['export_s']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of a BERT sentence encoder or a language model")
    parser.add_argument("--task", choices=COLUMNS, default="perplexity")
    parser.add_argument("--text", type=Path, required=True, help="what `claq-export eval --text` takes")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(2, 3, 4))
    parser.add_argument("--samples", type=int, help="of the calibration text (default: as an export has)")
    parser.add_argument("--windows", type=int, help="first windows of the text alone")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/equal_size_NAME.md")
    options = parser.parse_args()
    settings = "calibrated on the text that comes with claq"
    settings += f", {options.samples} samples" if options.samples else ""
    settings += f"; {options.text.name}" + (f", {options.windows} windows" if options.windows else "")
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "model": options.write or options.model.resolve().name,
        "task": options.task,
        "settings": settings,
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],
        "rows": [],
    }
    rows = document["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        timed: dict[str, Callable[[], list[float]]] = {}
        for bits in options.bits:
            budget: float = bits
            for _ in ("widths", "budget"):
                folder = Path(scratch) / f"{budget:g}"
                row = exported(options.model, folder, budget, options.samples)
                artifact = folder / "model.onnx"
                rows.append(row | measured(artifact, options))
                print(rows[-1], flush=True)
                timed[f"{budget:g}"] = (encoding if options.task == "sts" else decoding)(artifact)
                budget = math.floor(100 * row["true_bits"]) / 100
        times: dict[str, list[float]] = {name: [] for name in timed}
        for turn, name in turns(list(timed), ROUNDS + 1):
            seconds = timed[name]()
            times[name] += seconds if turn else []  # the first warms up
    medians = {name: statistics.median(values) for name, values in times.items()}
    for row in rows:
        row["time"] = medians[f"{row['bits']:g}"] / medians[f"{rows[0]['bits']:g}"]
    text = table(document)
    print(text)
    if options.write:
        (RESULTS / f"equal_size_{options.write}.md").write_text(text)


if __name__ == "__main__":
    main()

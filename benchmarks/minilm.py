"""Measures a sentence encoder (all-MiniLM-L6-v2) at 4, 3 and 2 bits, beside GPTQ on the same calibration text.

All encoder linears are quantized, in the rows called "whole" the word embeddings too. Reported: true bits, file size,
mean cosine of the mean-pooled, normalised embeddings to those of the float32 model on the STS sentences (never used for
calibration), and Spearman's rank correlation with the human scores. claq's rows run the exported ONNX file in ONNX
Runtime, with the runtime library where there is one.

    python benchmarks/minilm.py --model FOLDER --sts sts-test.csv [--only 'claq*'] [--write]
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import claq_export
from benchmarks.peers import bert
from benchmarks.peers.common import Group, Inputs, Quantized
from benchmarks.peers.uniform import gptq, round_to_nearest
from claq_export.algorithm.presets import PAPER_TOKEN_CLIP, preset_settings
from claq_export.api import capture
from claq_export.calibration.loading import load_calibration
from claq_export.evaluation import (
    EncoderModel,
    OnnxModel,
    SimilarityPair,
    open_model,
    open_tokenizer,
    read_pairs,
    runtime_library,
    sentence_quality,
)

RESULTS = Path(__file__).resolve().parent / "results"

LINEARS: dict[str, Any] = {"embedding_bits": 0}
"""Setting of the rows that leave the word embeddings in float32, as the peers do."""

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "claq-4": ("claq 4 bits", {"bits": 4, **LINEARS}),
    "claq-3": ("claq 3 bits", {"bits": 3, **LINEARS}),
    "claq-3-outliers": ("claq 3 bits, 0.4% reserved", {"bits": 3, "outliers": 0.004, **LINEARS}),
    "claq-2.5": ("claq 2.5 true bits (budget)", {"bits": 2.5, **LINEARS}),
    "claq-2": ("claq 2 bits", {"bits": 2, **LINEARS}),
    "claq-2-outliers": ("claq 2 bits, 0.4% reserved", {"bits": 2, "outliers": 0.004, **LINEARS}),
    "claq-4-whole": ("claq 4 bits, whole model (the default)", {"bits": 4}),
    "claq-4-whole-plain": ("claq 4 bits, whole model, no exact tokens", {"bits": 4, "exact_tokens": 0.0}),
    "claq-3-whole": ("claq 3 bits, whole model, embeddings 4", {"bits": 3}),
    "claq-3-whole-3": ("claq 3 bits, whole model, embeddings 3", {"bits": 3, "embedding_bits": 3}),
}
"""Settings of the product by row name; everything else at its default. Peers leave the embeddings alone, so most rows do."""

PAPER = ("claq-4", "claq-3", "claq-2", "claq-2.12")

PEERS: dict[str, tuple[str, Callable[[torch.Tensor, Inputs], Quantized]]] = {
    f"gptq-{bits}-{'row' if group is None else f'g{group}'}": (
        f"GPTQ {bits} bits, {'per row' if group is None else f'groups of {group}'}, act-order",
        lambda w, x, bits=bits, group=group: gptq(w, x.hessian, bits, group),
    )
    for bits, group in ((4, None), (4, 128), (4, 32), (3, None), (3, 128), (3, 32), (2, 128), (2, 32))
} | {
    f"rtn-{bits}-g{group}": (
        f"Round to nearest {bits} bits, groups of {group}",
        lambda w, x, bits=bits, group=group: round_to_nearest(w, bits, group),
    )
    for bits, group in ((4, 128), (4, 32), (3, 128), (3, 32))
}


class Remembered:
    """A reference encoder that computes each batch once for all rows of the table."""

    def __init__(self, model: EncoderModel) -> None:
        self.model = model
        self.known: dict[bytes, torch.Tensor] = {}

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        key = tokens.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model.hidden(tokens, mask)
        return self.known[key]


def measure_export(
    folder: str, tokenizer: Any, config: claq_export.Config, pairs: list[SimilarityPair], reference: EncoderModel
) -> dict[str, Any]:
    """Export with the settings and judge the written file."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model.onnx"
        began = time.perf_counter()
        result = claq_export.export(folder, out=out, config=config, task="feature-extraction", verify=False)
        seconds = time.perf_counter() - began
        model = OnnxModel(out, runtime_library("auto"))
        quality = sentence_quality(model, tokenizer, pairs=pairs, reference=reference)
        return {
            "true_bits": result.true_bits,
            "nominal_bits": result.nominal_bits,
            "size": result.artifact_bytes,
            "original_size": result.original_bytes,
            "mean_layer_error": sum(layer.error for layer in result.layers) / len(result.layers),
            "seconds": round(seconds, 1),
            **quality.to_json(),
        }


def measure_peer(
    folder: str,
    tokenizer: Any,
    quantize: Callable[[torch.Tensor, Inputs], Quantized],
    batches: list[dict[str, torch.Tensor]],
    pairs: list[SimilarityPair],
    reference: EncoderModel,
) -> dict[str, Any]:
    """Quantize layer after layer and judge the PyTorch model with the dequantized weights."""
    model = open_model(folder, causal=False)
    bits, weights, errors = 0.0, 0, []

    def visit(group: Group, values: list[torch.Tensor]) -> None:
        nonlocal bits, weights
        inputs, weight = Inputs.of(values), group.stacked()
        result = quantize(weight, inputs)
        difference = result.weight - weight
        errors.append(
            float(((difference @ inputs.hessian) * difference).sum() / ((weight @ inputs.hessian) * weight).sum())
        )
        group.assign(result.weight)
        bits, weights = bits + result.bits, weights + weight.numel()

    began = time.perf_counter()
    bert.walk(model.module, batches, visit)
    seconds = time.perf_counter() - began
    quality = sentence_quality(model, tokenizer, pairs=pairs, reference=reference)
    return {
        "true_bits": bits / weights,
        "mean_layer_error": sum(errors) / len(errors),
        "seconds": round(seconds, 1),
        **quality.to_json(),
    }


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The table, by true bits."""
    lines = [
        title,
        "",
        "| method | true bits | file | mean cosine | lowest cosine | mean layer error | STS-B Spearman | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda r: -r["true_bits"]):
        label = f"**{row['label']}**" if row["own"] else row["label"]
        size = f"{row['size'] / 1e6:.1f} MB" if "size" in row else ""
        lines.append(
            f"| {label} | {row['true_bits']:.3f} | {size} | {row['cosine_mean']:.4f} | {row['cosine_min']:.4f} | "
            f"{row['mean_layer_error']:.3%} | {row['spearman']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def calibration_sentences(path: str, measured: Sequence[SimilarityPair]) -> list[str]:
    """The sentences of scored pairs, without any that the measurement uses."""
    used = {text for pair in measured for text in (pair.first, pair.second)}
    sentences = dict.fromkeys(text for pair in read_pairs(path) for text in (pair.first, pair.second))
    return [text for text in sentences if text not in used]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a BERT sentence encoder")
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="of the model, for the title")
    parser.add_argument("--sts", required=True, help="scored sentence pairs (STS-B)")
    parser.add_argument(
        "--calibration",
        default="default",
        help="calibration text, or scored pairs (.csv) other than --sts whose sentences are used; default: claq's own text",
    )
    parser.add_argument("--samples", type=int, help="calibration samples (default: claq's own)")
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns over row names")
    parser.add_argument(
        "--write",
        action="store_true",
        help="keep table and numbers in benchmarks/results, beside the rows of earlier runs",
    )
    arguments = parser.parse_args()

    tokenizer = open_tokenizer(arguments.model)
    reference = Remembered(open_model(arguments.model, causal=False))
    pairs = read_pairs(arguments.sts)
    calibration, calibration_name, results_name = (
        arguments.calibration,
        "the packaged State of the Union text",
        "minilm",
    )
    if arguments.calibration != "default":
        calibration_name = Path(arguments.calibration).name
        results_name = f"minilm_{Path(arguments.calibration).stem}"
    if arguments.calibration.endswith(".csv"):
        calibration = calibration_sentences(arguments.calibration, pairs)
    config = claq_export.Config(samples=arguments.samples, calibration=calibration)
    captured, _ = capture(arguments.model, task="feature-extraction")
    batches = load_calibration(captured, config)
    del captured

    rows: list[dict[str, Any]] = []

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)

    def keep(name: str, label: str, values: dict[str, Any], own: bool = False) -> None:
        rows.append({"name": name, "label": label, "own": own, **values})
        print(
            f"{name:20} {values['true_bits']:.3f} bits  cosine {values['cosine_mean']:.4f}  "
            f"Spearman {values['spearman']:.2f} (float32 {values['reference_spearman']:.2f})",
            flush=True,
        )

    for name, (label, changes) in OURS.items():
        if wanted(name):
            settings = dataclasses.replace(config, **changes)
            keep(name, label, measure_export(arguments.model, tokenizer, settings, pairs, reference), own=True)
    for preset in PAPER:
        if wanted(f"paper-{preset}"):
            values = dataclasses.asdict(preset_settings(preset))
            settings = dataclasses.replace(config, token_clip=PAPER_TOKEN_CLIP, algorithm=values, **LINEARS)
            label = f"CLAQ as in the paper, preset {preset}"
            keep(f"paper-{preset}", label, measure_export(arguments.model, tokenizer, settings, pairs, reference))
    for name, (label, quantize) in PEERS.items():
        if wanted(name):
            keep(name, label, measure_peer(arguments.model, tokenizer, quantize, batches, pairs, reference))
    if not rows:
        print("no row matches --only")
        return

    stored = RESULTS / f"{results_name}.json"
    if arguments.write and stored.is_file():
        made = {row["name"] for row in rows}
        rows += [row for row in json.loads(stored.read_text(encoding="utf-8")) if row["name"] not in made]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    original = next((f", {row['original_size'] / 1e6:.1f} MB" for row in rows if "original_size" in row), "")
    title = (
        f"{arguments.name}, float32 baseline: STS-B Spearman {rows[0]['reference_spearman']:.2f}{original}. "
        f"Cosine over {rows[0]['sentences']} sentences of {Path(arguments.sts).name}; calibration: "
        f"{sum(len(batch['input_ids']) for batch in batches)} samples ({tokens} tokens) of {calibration_name}. "
        "Files hold float32 embeddings but where the whole model is quantized."
    )
    table = markdown(rows, title)
    print(table)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{results_name}.md").write_text(table, encoding="utf-8")
        rows.sort(key=lambda row: row["name"])
        stored.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

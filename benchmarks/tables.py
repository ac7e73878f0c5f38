"""Measures what quantizing the embedding and the output head alone costs a language model, all linears in float32.

The vocabulary table is quantized against the Hessian of the head's input, as a tied one is, its rows counting alike or by
their use in the fit of codebooks, with some of the most frequent tokens of the calibration text kept exactly, and put in the
place of the head, of the embedding, and of both. Prints and writes perplexity, KL divergence to the original and top-1
agreement.

    python benchmarks/tables.py --model FOLDER --text wiki.test.raw --calibration text.txt [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from claq_export.algorithm import Hessian, LayerSettings, measure, quantize_layer
from claq_export.algorithm.exact_rows import keep_rows, most_frequent
from claq_export.evaluation import open_model, open_tokenizer, read_text
from claq_export.evaluation.language import _compare, token_windows

RESULTS = Path(__file__).resolve().parent / "results"
_TOKENS_AT_ONCE = 128


@dataclass(frozen=True)
class Table:
    """A quantized vocabulary: its code width, the power of a row's chance that it counts by, the share of exact rows, its true
    bits, its dense weight."""

    bits: float
    power: float
    exact: float
    true_bits: float
    weight: torch.Tensor


class Sums:
    """Losses and divergences of one variant, over all positions so far."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, logits: torch.Tensor, original: torch.Tensor, target: torch.Tensor) -> None:
        for part, base, wanted in zip(*(x.split(_TOKENS_AT_ONCE) for x in (logits, original, target)), strict=True):
            self.parts.append(_compare(part, base, wanted))

    def result(self) -> dict[str, float]:
        loss, base, kl, agree = (torch.cat([part[i] for part in self.parts]) for i in range(4))
        return {
            "perplexity": float(loss.mean().exp()),
            "reference_perplexity": float(base.mean().exp()),
            "kl": float(kl.mean()),
            "top1": float(agree.double().mean()),
        }


def head_hessian(model: Any, windows: torch.Tensor, clip: float | None) -> Hessian:
    """The Hessian of the head's input over windows of text."""
    hessian = Hessian(model.get_input_embeddings().weight.shape[1], token_clip=clip)
    for window in windows:
        hessian.add(hidden(model, window)[0])
    return hessian


def hidden(model: Any, window: torch.Tensor) -> torch.Tensor:
    """The head's input ``[1, S, K]``."""
    states: torch.Tensor = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder of a causal language model with tied embedding"
    )
    parser.add_argument("--name", help="of the model, for the title; default: the folder's")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--bits", type=float, nargs="*", default=[4, 3], help="code widths")
    parser.add_argument("--exact", type=float, nargs="*", default=[0, 0.005, 0.01, 0.02], help="shares of exact rows")
    parser.add_argument(
        "--powers", type=float, nargs="*", default=[0, 0.5], help="of a row's chance, that it counts by; 0: all alike"
    )
    parser.add_argument("--write", action="store_true", help="keep table and numbers in benchmarks/results")
    arguments = parser.parse_args()

    tokenizer = open_tokenizer(arguments.model)
    opened: Any = open_model(arguments.model, causal=True)
    model = opened.module
    windows = token_windows(read_text(arguments.text), tokenizer, arguments.length, arguments.windows)
    calibration = token_windows(read_text(arguments.calibration), tokenizer, arguments.length, arguments.samples)
    embedding = model.get_input_embeddings()
    original = embedding.weight.detach().clone()

    began = time.perf_counter()
    hessian = head_hessian(model, calibration, 2.0)
    print(f"Hessian of the head's input: {time.perf_counter() - began:.0f} s", flush=True)
    everything = token_windows(read_text(arguments.calibration), tokenizer, arguments.length).flatten()
    frequency = torch.bincount(everything, minlength=original.shape[0])
    tables: list[Table] = []
    for bits, power in itertools.product(arguments.bits, arguments.powers):
        began = time.perf_counter()
        settings = LayerSettings(bits=bits, frequency_power=power)
        layer = quantize_layer(original, hessian, settings, row_frequency=frequency).layer
        print(f"{bits:g} bits, power {power:g}: {time.perf_counter() - began:.0f} s", flush=True)
        for exact in arguments.exact:
            kept = keep_rows(layer, original, most_frequent(frequency, exact))
            tables.append(Table(bits, power, exact, measure(kept).true_bits, kept.dequantize()))

    sums: dict[tuple[str, int], Sums] = {}
    for number, window in enumerate(windows):
        target = window[1:]
        embedding.weight.data.copy_(original)
        base_hidden = hidden(model, window)[0, :-1]
        base = base_hidden @ original.T
        for index, table in enumerate(tables):
            sums.setdefault(("head", index), Sums()).add(base_hidden @ table.weight.T, base, target)
            embedding.weight.data.copy_(table.weight)
            own = hidden(model, window)[0, :-1]
            sums.setdefault(("embedding", index), Sums()).add(own @ original.T, base, target)
            sums.setdefault(("both", index), Sums()).add(own @ table.weight.T, base, target)
        kl = ", ".join(
            f"{what} {tables[i].bits:g} (power {tables[i].power:g}, {tables[i].exact:.1%} exact) {one.result()['kl']:.4f}"
            for (what, i), one in sums.items()
        )
        print(f"window {number + 1} of {len(windows)}: KL {kl}", flush=True)

    rows = [
        {
            "what": what,
            "bits": tables[i].bits,
            "power": tables[i].power,
            "exact": tables[i].exact,
            "true_bits": tables[i].true_bits,
            **one.result(),
        }
        for (what, i), one in sums.items()
    ]
    name = arguments.name or Path(arguments.model).name
    lines = [
        f"{name}: vocabulary of {original.shape[0]} x {original.shape[1]}, everything else in float32. "
        f"{len(windows)} windows of {arguments.length} tokens of {Path(arguments.text).name}, perplexity of the original "
        f"{rows[0]['reference_perplexity']:.3f}; calibration: {len(calibration)} windows of {Path(arguments.calibration).name}, "
        "token frequencies from all of it. *Power*: a row counts in the fit of a column's codebook by its chance to this power.",
        "",
        "| quantized | code width | power | exact rows | true bits | perplexity | KL (nats) | top-1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['what']} | {row['bits']:g} | {row['power']:g} | {row['exact']:.1%} | "
        f"{row['true_bits']:.3f} | {row['perplexity']:.3f} | {row['kl']:.4f} | {row['top1']:.1%} |"
        for row in rows
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        (RESULTS / "tables.md").write_text(text, encoding="utf-8")
        (RESULTS / "tables.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Layer error of each part of the method on real weights and activations, at stated true bits.

    python benchmarks/ablation.py --model FOLDER --text FILE [--tokens 16384] [--layers 24] [--write]

``--model`` is a Hugging Face folder of an encoder or a decoder, ``--text`` running text for calibration. Linear
layers of the model that read the same tensor are stacked (q/k/v), as the compiler does. The error of a layer is
tr(dW H dW^T) / tr(W H W^T), H measured in the unquantized model on the calibration text; the table gives the
geometric mean over layers, and how many layers a step made better.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from claq_export.algorithm import (
    ColumnPlan,
    Hessian,
    LayerSettings,
    measure,
    preset_settings,
    profile_layer,
    quantize_layer,
    solve,
)

RESULT = Path(__file__).parent / "results" / "ablation.md"


@dataclass(frozen=True)
class Matrix:
    """One (stacked) linear layer with the Hessians of its inputs, with and without clipping of token norms."""

    name: str
    weight: torch.Tensor
    hessian: Hessian


def capture(folder: Path, text: Path, tokens: int, limit: int) -> list[Matrix]:
    """Weights and Hessians of all linear layers; layers fed by the very same tensor are stacked."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(256, getattr(model.config, "max_position_embeddings", 256))
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace")[: tokens * 8], add_special_tokens=False)[
        "input_ids"
    ]
    batch = torch.tensor(ids[: len(ids[:tokens]) // length * length]).reshape(-1, length)

    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hessians: dict[str, Hessian] = {}
    groups: dict[str, list[torch.nn.Linear]] = {}
    last: dict[str, object] = {"input": None, "name": ""}

    def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0] is last["input"]:
            leader = str(last["name"])
        else:
            leader = names[module]
            last.update(input=inputs[0], name=leader)
            hessians.setdefault(leader, Hessian(module.in_features)).add(inputs[0])
        members = groups.setdefault(leader, [])
        if module not in members:
            members.append(module)

    handles = [module.register_forward_pre_hook(hook) for module in names]
    with torch.no_grad():
        for row in batch.split(8):
            model(input_ids=row)
    for handle in handles:
        handle.remove()
    matrices = [
        Matrix(leader, torch.cat([m.weight.detach() for m in members]), hessians[leader])
        for leader, members in groups.items()
        if "pooler" not in leader
    ]
    picked = np.linspace(0, len(matrices) - 1, min(limit, len(matrices))).round().astype(int)
    return [matrices[i] for i in picked]


def round_to_nearest(matrix: Matrix, bits: int, group: int = 128) -> tuple[float, float]:
    """Relative layer error and true bits of asymmetric round-to-nearest, float16 scale and a zero point for each
    group of inputs."""
    weight = matrix.weight
    decoded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        low = part.amin(dim=1, keepdim=True).clamp(max=0)
        high = part.amax(dim=1, keepdim=True).clamp(min=0)
        step = ((high - low) / (2**bits - 1)).to(torch.float16).float().clamp(min=1e-8)
        zero = (-low / step).round()
        codes = (part / step + zero).round().clamp(0, 2**bits - 1)
        decoded[:, start : start + group] = (codes - zero) * step
    error = matrix.hessian.energy(decoded - weight).sum() / matrix.hessian.energy(weight).sum()
    groups = -(-weight.shape[1] // group)
    return float(error), bits + groups * (16 + bits) / weight.shape[1]


def quantized(
    matrix: Matrix, settings: LayerSettings, feedback: bool, plan: ColumnPlan | None = None
) -> tuple[float, float]:
    """Relative layer error and true bits of claq's quantizer."""
    result = quantize_layer(matrix.weight, matrix.hessian if feedback else None, settings, plan=plan)
    if feedback:
        return result.error, result.true_bits
    difference = result.layer.dequantize() - matrix.weight
    error = matrix.hessian.energy(difference).sum() / matrix.hessian.energy(matrix.weight).sum()
    return float(error), result.true_bits


def rows(matrices: list[Matrix], optimal: bool) -> Iterator[tuple[str, str, list[tuple[float, float]], float]]:
    """(section, label, error and bits of each layer, seconds) of every line of the report."""

    def line(section: str, label: str, settings: LayerSettings, feedback: bool = True):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        found = [quantized(m, settings, feedback) for m in matrices]
        return section, label, found, time.perf_counter() - began

    for bits in (4, 3, 2):
        section = f"{bits} bits"
        began = time.perf_counter()
        found = [round_to_nearest(m, bits) for m in matrices]
        yield section, "round to nearest, groups of 128", found, time.perf_counter() - began
        plain = LayerSettings(
            bits=bits, row_scale="none", kmeans="lloyd", descent=0, refit_row_scale=False, row_weights="uniform"
        )
        yield line(section, "column k-means", plain, feedback=False)
        yield line(section, "+ error feedback (GPTQ loop), columns as they stand", replace(plain, act_order=False))
        yield line(section, "+ act-order", plain)
        scaled = replace(plain, row_scale="rms")
        yield line(section, "+ row scale (RMS)", scaled)
        better = replace(scaled, kmeans="coarse")
        yield line(section, "+ k-means near the optimum", better)
        if optimal:
            yield line(section, "+ k-means optimal", replace(better, kmeans="optimal"))
        weighted = replace(better, row_weights="energy")
        yield line(section, "+ rows weighted by energy", weighted)
        yield line(section, "+ codebooks refitted in closed form", replace(weighted, refit_codebook=True))
        yield line(section, "+ 2 sweeps of coordinate descent instead", replace(weighted, descent=2))
        yield line(section, "+ row scales refitted", replace(weighted, descent=2, refit_row_scale=True))

    base = LayerSettings(bits=2, kmeans="coarse", row_weights="uniform", descent=0, refit_row_scale=False)
    section = "Adaptive Precision, 2.1 nominal bits"
    yield line(section, "2 bits everywhere", base)
    adaptive = replace(base, bits=2.1)
    yield line(section, "2 & 4, outlier order, S = 13 (paper)", replace(adaptive, ranking="outlier_order"))
    yield line(
        section, "2 & 4, outlier order, S = 5", replace(adaptive, ranking="outlier_order", outlier_threshold=5.0)
    )
    yield line(section, "2 & 4, saliency", replace(adaptive, ranking="saliency"))
    yield line(section, "2 & 4, conditional loss", replace(adaptive, ranking="loss"))
    yield line(section, "2 & 3, conditional loss", replace(adaptive, ranking="loss", widths=(3, 2)))

    section = "Outlier Reservation, 2 bits"
    yield line(section, "none", base)
    paper = replace(base, outliers=0.005, ranking="outlier_order", outlier_choice="sides")
    yield line(section, "0.5 %, fixed", replace(paper, reservation="fixed"))
    yield line(
        section,
        "0.5 %, fixed, codebook fitted with the outliers in (authors' code)",
        replace(paper, reservation="fixed", fit_outliers=True),
    )
    yield line(section, "0.5 %, dynamic by outlier order (paper)", replace(paper, reservation="dynamic"))
    yield line(section, "0.5 %, dynamic by saliency", replace(paper, reservation="dynamic", ranking="saliency"))
    by_size = replace(paper, ranking="saliency", outlier_choice="magnitude")
    yield line(section, "0.5 %, dynamic by saliency, largest magnitudes", by_size)
    yield line(section, "0.5 %, counts by saliency, largest magnitudes", replace(by_size, reservation="saliency"))

    for name in ("claq-2.12", "claq-2.5", "claq-3.12"):
        section = f"Bit budget against {name} at equal true bits"
        yield line(section, f"{name}: fixed fractions in every layer (paper)", preset_settings(name))
        fixed = replace(preset_settings(name), row_scale="rms", kmeans="coarse")
        yield line(section, "+ row scale, k-means near the optimum", fixed)
        began = time.perf_counter()
        config = LayerSettings(outlier_choice="magnitude")
        size = sum(measure(quantize_layer(m.weight, m.hessian, fixed).layer).nbytes for m in matrices)
        profiles = [profile_layer(m.name, m.weight, m.hessian, config) for m in matrices]
        plans = solve(profiles, nbytes=size).plans
        found = [quantized(m, config, True, plans[m.name]) for m in matrices]
        yield section, "bit budget over columns and outliers of all layers", found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=24, help="layers to measure, evenly picked")
    parser.add_argument("--optimal", action="store_true", help="also with optimal k-means, which is slow")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULT.name} in benchmarks/results")
    args = parser.parse_args()

    matrices = capture(args.model, args.text, args.tokens, args.layers)
    out = [
        "# Ablation: layer error of each part of the method",
        "",
        f"`python benchmarks/ablation.py` on {len(matrices)} (stacked) linear layers of "
        f"{args.model.resolve().parent.name}/{args.model.name}, {args.tokens} calibration tokens of {args.text.name}, "
        "token norms clipped to twice the median. Relative error tr(dW H dW^T) / tr(W H W^T), geometric mean over "
        "layers, at the true bits of the format over all weights. 'better' counts the layers whose error fell "
        "against the line before.",
    ]
    section, before = "", None
    for title, label, found, seconds in rows(matrices, args.optimal):
        if title != section:
            section, before = title, None
            out += ["", f"## {title}", "", "| | true bits | layer error | better | seconds |", "|---|---|---|---|---|"]
            print(f"\n{title}")
        errors = np.array([error for error, _ in found])
        bits = float(np.average([b for _, b in found], weights=[m.weight.numel() for m in matrices]))
        better = "" if before is None else f"{int((errors < before).sum())} of {len(errors)}"
        mean = float(np.exp(np.log(errors).mean()))
        out.append(f"| {label} | {bits:.3f} | {mean:.5f} | {better} | {seconds:.1f} |")
        print(f"{label:70} {bits:.3f} {mean:.5f} {better:10} {seconds:.1f} s", flush=True)
        before = errors
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compares weight quantizers at equal true bits: same language model, same calibration text, same evaluation text.

Every linear of the decoder blocks is quantized, embeddings and head stay as they are. Prints and writes one table
(perplexity, KL divergence to the original, top-1 agreement, all bits counted) and a plot.

    python benchmarks/quality.py --model FOLDER --text wiki.test.raw [--only 'gptq*'] [--work FOLDER]

Each configuration's result is kept in the work folder, so that a run can be interrupted, done in pieces, and resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.util
import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools

from benchmarks.peers.awq import awq
from benchmarks.peers.bench import Bench
from benchmarks.peers.common import Inputs, Quantized
from benchmarks.peers.ggml import find_library, k_quant
from benchmarks.peers.hqq import hqq
from benchmarks.peers.rows import squeezellm
from benchmarks.peers.uniform import gptq, round_to_nearest
from claq_export.algorithm import REVISION, Hessian, LayerSettings, quantize_layer
from claq_export.algorithm.budget import LayerProfile
from claq_export.algorithm.presets import PAPER_TOKEN_CLIP, PRESETS, preset_settings
from claq_export.api import capture
from claq_export.calibration.data import Batch
from claq_export.calibration.progress import ProgressReporter
from claq_export.calibration.sensitivity import Guidance
from claq_export.calibration.stage import CalibrationStage
from claq_export.calibration.tune import TuneSettings
from claq_export.compiler import Compilation
from claq_export.config import Config
from claq_export.errors import OutputError
from claq_export.evaluation import open_tokenizer, read_text

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: key, also of the cached result.
        family: what the plot joins by a line.
        label: what the table prints.
        quantize: leaves the bench's model quantized; returns all bits stored.
        settings: what the result depends on; a cached result with other settings is made again.
    """

    name: str
    family: str
    label: str
    quantize: Callable[[Bench], float]
    settings: dict[str, Any]


def _grouping(group: int | None) -> str:
    return "row" if group is None else f"g{group}"


def peers(library: Path | None) -> list[Candidate]:
    """Everybody else. Four bits in groups of 32 or 64 are left out: the model comes from such a grid and would look
    unhurt."""
    found: list[Candidate] = []

    def add(name: str, family: str, label: str, run: Callable[[Bench], float], **settings: Any) -> None:
        found.append(Candidate(name, family, label, run, settings))

    for bits, group in ((4, None), (4, 128), (3, None), (3, 128), (3, 32), (2, None), (2, 128), (2, 32)):
        where = _grouping(group)
        add(
            f"gptq-{bits}-{where}",
            "GPTQ (per row)" if group is None else "GPTQ (groups)",
            f"GPTQ {bits} bits, {'per row' if group is None else f'groups of {group}'}, act-order",
            lambda b, bits=bits, group=group: b.in_sequence(lambda g, w, x: gptq(w, Inputs.of(x).hessian, bits, group)),
            bits=bits,
            group=group,
        )
    for bits, group in ((4, 128), (3, 128), (2, 128)):
        add(
            f"gptq-{bits}-g{group}-static",
            "GPTQ (static groups)",
            f"GPTQ {bits} bits, static groups of {group}, act-order",
            lambda b, bits=bits, group=group: b.in_sequence(
                lambda g, w, x: gptq(w, Inputs.of(x).hessian, bits, group, static_groups=True)
            ),
            bits=bits,
            group=group,
            static_groups=True,
        )
    for bits, group in ((4, None), (4, 128), (3, 128), (3, 32), (2, 32)):
        add(
            f"rtn-{bits}-{_grouping(group)}",
            "Round to nearest",
            f"Round to nearest {bits} bits, {'per row' if group is None else f'groups of {group}'}",
            lambda b, bits=bits, group=group: b.at_once(lambda g, w: round_to_nearest(w, bits, group)),
            bits=bits,
            group=group,
        )
    for bits, group in ((4, 128), (3, 128), (3, 64), (2, 64), (2, 32), (2, 16)):
        add(
            f"hqq-{bits}-g{group}",
            "HQQ",
            f"HQQ {bits} bits, groups of {group}",
            lambda b, bits=bits, group=group: b.at_once(lambda g, w: hqq(w, bits, group)),
            bits=bits,
            group=group,
        )
    for bits, group in ((4, 128), (3, 128), (3, 32), (2, 32)):
        add(
            f"awq-{bits}-g{group}",
            "AWQ",
            f"AWQ {bits} bits, groups of {group}",
            lambda b, bits=bits, group=group: b.at_once(
                lambda g, w: awq(
                    w,
                    b.statistics[g.name].hessian,
                    b.statistics[g.name].magnitude,
                    bits,
                    group,
                    scaled=g.scale_folds,
                    frozen_rows=g.frozen_rows,
                )
            ),
            bits=bits,
            group=group,
        )
    for bits, sparse in ((4, 0.0), (3, 0.0), (3, 0.0045), (2, 0.0), (2, 0.0045)):
        add(
            f"squeezellm-{bits}" + (f"-{sparse}" if sparse else ""),
            "SqueezeLLM (sparse)" if sparse else "SqueezeLLM",
            f"SqueezeLLM {bits} bits, codebook a row" + (f", {sparse:.2%} sparse" if sparse else ""),
            lambda b, bits=bits, sparse=sparse: b.at_once(lambda g, w: squeezellm(w, b.fisher[g.name], bits, sparse)),
            bits=bits,
            sparse=sparse,
        )
    if library is not None:
        for kind in ("Q4_K", "Q3_K", "Q2_K"):
            add(
                f"gguf-{kind}",
                "GGUF K-quants",
                f"GGUF {kind} with importance matrix",
                lambda b, kind=kind: b.at_once(lambda g, w: interleaved_k_quant(b, g.name, w, kind, library)),
                kind=kind,
                columns="interleaved",
            )
    return found


def interleaved_k_quant(bench: Bench, name: str, weight: torch.Tensor, kind: str, library: Path) -> Quantized:
    """A K-quant on interleaved columns, so that each of its blocks draws on many blocks of the Q4_1 grid the model is on.

    On the columns as they stand, and even shifted by half a block, its search for a scale finds that grid again.
    """
    order = torch.arange(weight.shape[1]).view(-1, 32).T.flatten()
    importance = bench.statistics[name].hessian.diagonal() / bench.statistics[name].tokens
    result = k_quant(weight[:, order].contiguous(), importance[order], kind, library)
    dense = torch.empty_like(result.weight)
    dense[:, order] = result.weight
    return Quantized(dense, result.bits)


def claq(settings: LayerSettings, token_clip: float | None, asymmetric: bool = False) -> Callable[[Bench], float]:
    """claq's quantizer of single layers, each planned for itself, in the same walk as GPTQ.

    ``asymmetric``: each layer matches what it gives in the unquantized model.
    """

    def quantize(
        _: Any, weight: torch.Tensor, inputs: Sequence[torch.Tensor], originals: Sequence[torch.Tensor] | None = None
    ) -> Quantized:
        hessian = Hessian(weight.shape[1], token_clip=token_clip)
        for x, original in zip(inputs, originals or [None] * len(inputs), strict=True):
            hessian.add(x, reference=original)
        result = quantize_layer(weight, hessian, settings)
        return Quantized(result.layer.dequantize(), result.true_bits * weight.numel())

    return lambda bench: bench.in_sequence(quantize, beside_the_original=asymmetric)


def parts_of_the_method() -> list[Candidate]:
    """The ablation on a whole model: each switch that goes beyond the paper, turned the other way at 3 bits."""
    base = LayerSettings(bits=3)
    found = [
        Candidate("part-default", ABLATION, "defaults", claq(base, 2.0), {}),
        Candidate(
            "part-asymmetric",
            ABLATION,
            "asymmetric calibration",
            claq(base, 2.0, asymmetric=True),
            {"asymmetric": True},
        ),
        Candidate(
            "part-no-clip", ABLATION, "tokens of huge norm count in full", claq(base, None), {"token_clip": None}
        ),
    ]
    switches: dict[str, tuple[str, dict[str, Any]]] = {
        "no-row-scale": ("no row scale", {"row_scale": "none"}),
        "energy": ("rows weighted by energy", {"row_weights": "energy"}),
        "lloyd": ("plain Lloyd iterations", {"kmeans": "lloyd"}),
        "no-act-order": ("columns as they stand", {"act_order": False}),
        "refit": ("codebooks refitted in closed form", {"refit_codebook": True}),
        "descent": ("two sweeps of coordinate descent", {"descent": 2}),
        "outliers": ("0.46 % outliers by saliency", {"outliers": 0.0046, "reservation": "saliency"}),
        "adaptive-outlier-order": ("4 and 2 bits by outlier order", {"widths": (4, 2), "ranking": "outlier_order"}),
        "adaptive-loss": ("4 and 2 bits by conditional loss", {"widths": (4, 2), "ranking": "loss"}),
    }
    for name, (label, changes) in switches.items():
        settings = dataclasses.replace(base, **changes)
        found.append(Candidate(f"part-{name}", ABLATION, label, claq(settings, 2.0), changes))
    return found


def paper() -> list[Candidate]:
    """The paper's configurations, by the presets of the product (docs: nominal bits as the paper counts, all bits
    counted here)."""
    return [
        Candidate(
            name,
            "CLAQ (paper)",
            f"CLAQ as in the paper, preset {name}",
            claq(preset_settings(name), PAPER_TOKEN_CLIP),
            dataclasses.asdict(preset_settings(name)),
        )
        for name in PRESETS
    ]


UNGUIDED = "claq (this project, --no-guided)"

ABLATION = "ablation"
"""Family of the rows that have a table of their own and no line in the plot."""

OURS: dict[str, dict[str, Any]] = {
    "ours-4.1": {"bits": 4.1},
    "ours-3.1": {"bits": 3.1},
    "ours-2.25": {"bits": 2.25},
    "ours-4": {"bits": 4},
    "ours-3": {"bits": 3},
    "ours-2.5": {"bits": 2.5},
    "ours-3.5": {"bits": 3.5},
    "ours-4.5": {"bits": 4.5},
    "ours-4-unguided": {"bits": 4, "guided": False},
    "ours-3-unguided": {"bits": 3, "guided": False},
    "ours-4.1-unguided": {"bits": 4.1, "guided": False},
    "ours-3.1-unguided": {"bits": 3.1, "guided": False},
    "ours-2.25-unguided": {"bits": 2.25, "guided": False},
}
"""Settings of the product; everything else at its default. A fraction is a budget of true bits."""

TUNED = ("ours-4.1", "ours-3.1", "ours-2.25")
"""Those that are measured with tuning too."""

TUNE_WINDOWS = 128
"""Windows of the same text that tuning sees, as many as a user's export has by default."""


class Budgeting(Compilation):
    """A compilation whose profile of all columns is kept on disk: it is the same for every budget of one revision."""

    profile_path: Path

    def profiles(
        self, stage: CalibrationStage, batches: Sequence[Batch] | None, guide: Guidance | None = None
    ) -> list[LayerProfile]:
        if not self.profile_path.is_file():
            self.profile_path.write_bytes(pickle.dumps(super().profiles(stage, batches, guide)))
        return pickle.loads(self.profile_path.read_bytes())


def product(name: str, changes: dict[str, Any], tuned: TuneSettings | None = None) -> Callable[[Bench], float]:
    """The product from end to end: capture, passes, calibration walk, bit budget, tuning.

    Layers are kept in the work folder, so that the tuned row starts from those of the row without tuning.
    """

    def quantize(bench: Bench) -> float:
        bench.restore()
        constant = {
            "attention_mask": torch.ones(1, bench.calibration.shape[1], dtype=torch.int64),
            "position_ids": torch.arange(bench.calibration.shape[1])[None],
        }
        batches = [{"input_ids": window[None], **constant} for window in bench.calibration]
        config = Config(calibration=batches, samples=len(batches), embedding_bits=0, head_bits=0, **changes)
        captured, _ = capture(bench.folder, task="text-generation")
        log = bench.work / f"{name}{'-tune' if tuned else ''}.log.jsonl"
        with ProgressReporter(quiet=True, log_path=log) as reporter:
            compilation = Budgeting(captured, config, reporter, {})
            compilation.profile_path = (
                bench.work
                / f"profile-r{REVISION}-{len(bench.calibration)}{'-unguided' * (config.guided is False)}.pickle"
            )
            layers = bench.work / f"{name}.layers"
            try:
                compilation.quantize_sites(layers)
            except OutputError:  # of other settings or another version: they are of no use here
                compilation.quantize_sites(layers, resume=False)
            if tuned is not None:
                compilation.tune([{"input_ids": w[None], **constant} for w in bench.more_text(TUNE_WINDOWS)], tuned)
        bits, weights = 0.0, 0
        for done in compilation.sites.values():
            rows = [count for _, count in done.site.parts]
            for (part_name, _), part in zip(done.site.parts, done.layer.dequantize().split(rows), strict=True):
                bench.model.get_submodule(part_name).weight.data.copy_(part)
            size = done.layer.in_features * done.layer.out_features
            bits, weights = bits + done.bits.true_bits * size, weights + size
        if weights != bench.weights:
            raise RuntimeError(f"claq quantized {weights} weights, the others {bench.weights}")
        return bits

    return quantize


def ours(tuned: TuneSettings) -> list[Candidate]:
    """claq as a user runs it."""
    found = [
        Candidate(
            name,
            "claq (this project)" if changes.get("guided", True) else UNGUIDED,
            f"claq --bits {changes['bits']}" + " --no-guided" * (not changes.get("guided", True)),
            product(name, changes),
            changes,
        )
        for name, changes in OURS.items()
    ]
    for name in TUNED:
        settings = OURS[name] | {"tune": dataclasses.asdict(tuned), "tune_windows": TUNE_WINDOWS}
        label = f"claq --bits {OURS[name]['bits']} --tune"
        found.append(
            Candidate(f"{name}-tune", "claq (this project, tuned)", label, product(name, OURS[name], tuned), settings)
        )
    return found


def run(bench: Bench, candidate: Candidate, common: dict[str, Any], work: Path) -> dict[str, Any]:
    """The cached result of a candidate, or a fresh one."""
    path = work / f"{candidate.name}.json"
    settings = json.loads(json.dumps(common | candidate.settings))
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept
    began = time.perf_counter()
    bits = candidate.quantize(bench)
    quantized = time.perf_counter() - began
    quality = bench.evaluate()
    row = {
        "name": candidate.name,
        "family": candidate.family,
        "label": candidate.label,
        "true_bits": bits / bench.weights,
        **quality.to_json(),
        "seconds": round(quantized, 1),
        "settings": settings,
    }
    path.write_text(json.dumps(row, indent=1), encoding="utf-8")
    print(
        f"{candidate.name:24} {row['true_bits']:.3f} bits  perplexity {quality.perplexity:10.2f}  "
        f"KL {quality.kl_mean:.4f}  top-1 {quality.top1_agreement:.3f}  {quantized:.0f} s",
        flush=True,
    )
    return row


def rise(row: dict[str, Any]) -> float:
    """How much log-perplexity rises over the unquantized model."""
    return math.log(row["perplexity"] / row["reference_perplexity"])


def rise_at(rows: Sequence[dict[str, Any]], bits: float) -> float | None:
    """The rise of a family at a number of bits: log-linear between the lower envelope's neighbouring points; None
    outside of them."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["true_bits"], r["perplexity"])):
        if rise(row) > 0 and (not best or rise(row) < rise(best[-1])):
            best.append(row)
    for low, high in itertools.pairwise(best):
        if low["true_bits"] <= bits <= high["true_bits"]:
            share = (bits - low["true_bits"]) / (high["true_bits"] - low["true_bits"])
            return math.exp((1 - share) * math.log(rise(low)) + share * math.log(rise(high)))
    return None


def markdown(rows: Sequence[dict[str, Any]], title: str, missing: Sequence[str]) -> str:
    """The table, by true bits."""
    lines = [title, "", "| method | true bits | perplexity | KL mean | KL median | KL 99 % | top-1 agreement |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    parts = [r for r in rows if r["family"] == ABLATION]
    rows = [r for r in rows if r["family"] != ABLATION]
    for row in sorted(rows, key=lambda r: -r["true_bits"]):
        own = row["family"].startswith("claq (")
        tune = row["settings"].get("tune")
        label = row["label"] + (f" ({tune['steps']} updates)" if tune else "")
        label = f"**{label}**" if own else label
        perplexity = f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.1e}"
        lines.append(
            f"| {label} | {row['true_bits']:.3f} | {perplexity} | {row['kl_mean']:.4f} | {row['kl_median']:.4f} | "
            f"{row['kl_p99']:.3f} | {row['top1_agreement']:.1%} |"
        )
    own_rows = [r for r in rows if r["family"].startswith("claq (")]
    families = [f for f in dict.fromkeys(r["family"] for r in rows) if not f.startswith("claq (")]
    lines += [
        "",
        "Rise of log-perplexity over the unquantized model, ours over theirs at the same true bits. Theirs "
        "is interpolated log-linearly between the neighbouring points of their lower envelope; empty where they have none.",
        "",
    ]
    lines.append("| ours | true bits | " + " | ".join(families) + " |")
    lines.append("|---|---:|" + "---:|" * len(families))
    for own_row in sorted(own_rows, key=lambda r: -r["true_bits"]):
        cells = []
        for family in families:
            theirs = rise_at([r for r in rows if r["family"] == family], own_row["true_bits"])
            cells.append("" if theirs is None else f"{rise(own_row) / theirs:.2f}")
        lines.append(f"| {own_row['label']} | {own_row['true_bits']:.3f} | " + " | ".join(cells) + " |")
    if parts:
        lines += [
            "",
            "Parts of the method on the whole model: `--bits 3` without gradients, one switch changed at a time.",
            "",
            "| 3 bits | true bits | perplexity | KL mean | top-1 agreement |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['label']} | {r['true_bits']:.3f} | {r['perplexity']:.2f} | {r['kl_mean']:.4f} | {r['top1_agreement']:.1%} |"
            for r in parts
        ]
    if missing:
        lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path, baseline: float) -> None:
    """Perplexity over true bits, one line a family, through those of its points that no smaller one, and none that is hardly
    larger, is better than. Rows without gradients are in the table alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 5.2), dpi=150)
    left_out = {ABLATION, UNGUIDED}
    families = sorted({r["family"] for r in rows} - left_out, key=lambda f: (not f.startswith("claq (this"), f))
    colours = pyplot.get_cmap("tab10").colors
    for number, family in enumerate(families):
        points = sorted(
            (r["true_bits"], r["perplexity"]) for r in rows if r["family"] == family and r["perplexity"] < 2000
        )
        if not points:
            continue
        own = family.startswith("claq (")
        style: dict[str, Any] = {
            "marker": "o" if own else "osD^vPX*"[number % 8],
            "linewidth": 2.6 if own else 1.2,
            "markersize": 7 if own else 5,
            "color": "black" if own else colours[number % 10],
            "linestyle": "--" if own and number else "-",
            "markerfacecolor": "white" if own and number else None,
            "zorder": 3 if own else 2,
        }
        best = [p for i, p in enumerate(points) if all(p[1] < smaller[1] for smaller in points[:i])]
        best = [p for p in best if not any(q[0] - p[0] < 0.05 and q[1] < p[1] for q in best if q[0] > p[0])]
        axes.plot(*zip(*best, strict=True), label=family, **style)
        others = [p for p in points if p not in best]
        if others:
            axes.plot(*zip(*others, strict=True), **(style | {"linestyle": "none"}))
    axes.axhline(baseline, color="grey", linestyle="--", linewidth=1)
    axes.text(
        axes.get_xlim()[0], baseline, f" unquantized {baseline:.2f}", va="bottom", ha="left", color="grey", fontsize=8
    )
    axes.set_yscale("log")
    ticks = [t for t in (30, 40, 50, 70, 100, 200, 500, 1000, 2000) if t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("true bits a weight (codes, codebooks, scales, order, outliers: everything counted)")
    axes.set_ylabel("perplexity, WikiText-2 test")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a Llama model")
    parser.add_argument("--text", required=True, help="evaluation text, joined as it is")
    parser.add_argument(
        "--calibration", nargs="*", help="calibration texts (default: the package's State of the Union excerpt)"
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns over configuration names, in order")
    parser.add_argument("--tune-steps", type=int, default=TuneSettings.steps, help="updates of the tuned rows")
    parser.add_argument("--tune-minutes", type=float, help="most minutes of tuning a row")
    parser.add_argument("--skip-claq", action="store_true", help="peers only")
    parser.add_argument("--ggml", help="path of libggml-base, for the K-quants")
    parser.add_argument(
        "--baseline", default="dequantized Q4_1", help="what the unquantized weights are, for the title"
    )
    parser.add_argument("--work", default="quality-work", help="folder of cached results")
    parser.add_argument("--out", default=str(RESULTS / "quality"), help="path of the table, without suffix")
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--render", action="store_true", help="only write table and plot from what is cached")
    arguments = parser.parse_args()
    library = find_library(arguments.ggml)
    if library is not None and importlib.util.find_spec("gguf") is None:
        parser.error("the K-quants of --ggml need the package gguf: pip install gguf")
    candidates = peers(library)
    if not arguments.skip_claq:
        candidates += (
            paper()
            + parts_of_the_method()
            + ours(TuneSettings(steps=arguments.tune_steps, minutes=arguments.tune_minutes))
        )
    chosen = [c for pattern in arguments.only for c in candidates if fnmatch.fnmatch(c.name, pattern)]
    candidates = list({c.name: c for c in chosen}.values())
    if arguments.list:
        print("\n".join(f"{c.name:24} {c.label}" for c in candidates))
        return
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.calibration:
        names = [Path(p).name for p in arguments.calibration]
        calibration = "\n\n".join(read_text(p) for p in arguments.calibration)
    else:
        names = ["state_of_the_union.txt (packaged)"]
        calibration = (resources.files("claq_export.calibration") / "texts/state_of_the_union.txt").read_text("utf-8")
    common = {
        "text": Path(arguments.text).name,
        "calibration": names if len(names) < 4 else f"{len(names)} files, {names[0]} to {names[-1]}",
        "context": arguments.context,
        "windows": arguments.windows,
        "calibration_windows": arguments.calibration_windows,
    }
    if arguments.render:
        rows = []
        for candidate in candidates:
            path = work / f"{candidate.name}.json"
            if path.is_file():
                rows.append(json.loads(path.read_text(encoding="utf-8")))
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        bench = Bench(
            arguments.model,
            model,
            open_tokenizer(arguments.model),
            read_text(arguments.text),
            calibration,
            arguments.context,
            arguments.windows,
            arguments.calibration_windows,
            work,
        )
        rows = [run(bench, candidate, common, work) for candidate in candidates]
    done = {row["name"] for row in rows}
    write(rows, common, arguments, library, [c.label for c in candidates if c.name not in done])


def write(
    rows: list[dict[str, Any]],
    common: dict[str, Any],
    arguments: argparse.Namespace,
    library: Path | None,
    missing: Sequence[str],
) -> None:
    """Table, numbers and plot beside each other."""
    if not rows:
        print("no results")
        return
    baseline = rows[0]["reference_perplexity"]
    source = common["calibration"]
    title = (
        f"Unquantized perplexity {baseline:.2f} (baseline: {arguments.baseline}). Evaluation: {common['text']}, first "
        f"{common['windows']} windows of {common['context']} tokens. Calibration: {common['calibration_windows']} "
        f"windows of {common['context']} tokens of {source if isinstance(source, str) else ', '.join(source)}."
    )
    absent = list(missing)
    if library is None:
        absent.append("GGUF K-quants (libggml: neither llama-cpp-python nor pywhispercpp is installed)")
    table = markdown(rows, title, absent)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    out.with_suffix(".json").write_text(
        json.dumps(sorted(rows, key=lambda r: r["name"]), indent=1) + "\n", encoding="utf-8"
    )
    plot(rows, out.with_suffix(".png"), baseline)
    print(table)


if __name__ == "__main__":
    main()

"""Tries every family of architectures end to end and writes the table of docs/families.md.

Captured, planned, quantized at 4 bits with a small calibration, emitted, and run by ONNX Runtime alone and with
claq-runtime against the quantized graph in PyTorch. Run it once for each version of transformers:

    python benchmarks/families.py            # adds the installed version to the results, and writes the page
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from artifacts import quantized_artifact  # noqa: E402
from families import FAMILIES, Family, capture, samples  # noqa: E402

from claq_export import Config  # noqa: E402
from claq_export.calibration.progress import ProgressReporter  # noqa: E402
from claq_export.capture import CapturedModel  # noqa: E402
from claq_export.compiler import Compilation  # noqa: E402
from claq_export.errors import ClaqError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"

HEAD = """# Families of architectures

Written by `benchmarks/families.py`: one small model of each family with random weights, captured, its linears found by
the passes, quantized at 4 bits with a small calibration, emitted as ONNX, and compared: ONNX Runtime alone (`stock`) and
with `claq-runtime` (`runtime`) against the quantized graph in PyTorch at several sizes, batch and padding included (largest
deviation relative to the largest output). *graph* is how far the captured graph is from the module. No family has code of
its own in claq. Mixtures of experts run a loop over experts that can be traced (`claq_export/experts.py`), which
transformers 5 lets one put in place of its own.

| family | kind | linears |"""

TAIL = """
*Layers* counts linears, embeddings and heads; stacked siblings (q/k/v, gate/up) are one layer. Text decoders are tried here
without cache; [onnx.md](onnx.md) tells of their graph with cache. T5 and Whisper are one graph here, from inputs and decoder
tokens to logits; with a cache they are three files ([encoder-decoders.md](encoder-decoders.md)). Image models have
(`image-classification`, `image-feature-extraction`), CLIP for the half that reads images; here both halves are one module.
`tests/families` captures, plans and quantizes every family in CI, and emits Gemma 3, T5, CLIP and Mixtral.
"""


def attempt(family: Family, onnx: bool) -> dict[str, Any]:
    """Figures of a family, or under ``"error"`` why it does not pass."""
    start = time.perf_counter()
    try:
        captured, module = capture(family)
        inputs = samples(family, captured)
        if not onnx:
            error = max(_difference(family, captured, module, one) for one in inputs)
            layers = len(Compilation(captured, Config(calibration="none"), ProgressReporter(quiet=True)).plan.sites)
            return {"layers": layers, "graph": error, "seconds": round(time.perf_counter() - start, 1)}
        settings = Config(bits=4, calibration=[inputs[-1]], samples=4, accuracy="fp32")
        with tempfile.TemporaryDirectory() as folder:
            compilation, report = quantized_artifact(captured, Path(folder) / "model.onnx", inputs, settings)
    except ClaqError as error:
        return {"error": " ".join(str(error).split())}
    runs = {
        name: max(deviation.maximum for deviation in run.deviations.values())
        for name, run in report.runs.items()
        if run.deviations
    }
    return {"layers": len(compilation.sites), "runs": runs, "seconds": round(time.perf_counter() - start, 1)}


def _difference(
    family: Family, captured: CapturedModel, module: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> float:
    """Largest difference of the captured graph to the module, relative to the largest output."""
    with torch.no_grad():
        expected = module(*inputs.values()) if family.task else module(**inputs)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    pairs = zip(captured.run(inputs), wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/families.md."""
    versions = sorted(results, key=lambda text: [int(part) for part in text.split(".")[:2]], reverse=True)
    lines = [HEAD + "".join(f" transformers {version} |" for version in versions)]
    lines.append("|---|---|---|" + "---|" * len(versions))
    reasons = []
    for family in FAMILIES:
        cells = []
        for version in versions:
            row = results[version].get(family.name)
            if row is None:
                cells.append("not tried")
            elif "error" in row:
                reasons.append(f"- {family.name}, transformers {version}: {row['error']}")
                cells.append("no, see below")
            elif "runs" not in row:
                cells.append(f"{row['layers']} layers; graph {row['graph']:.0e}, ONNX not tried")
            else:
                runs = ", ".join(f"{name} {value:.0e}" for name, value in row["runs"].items())
                cells.append(f"{row['layers']} layers; {runs}")
        lines.append(f"| {family.name} | {family.kind} | {family.linears} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n" + TAIL
    return text + ("\nWhat does not pass, and why:\n\n" + "\n".join(reasons) + "\n" if reasons else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families to try (default: all)")
    parser.add_argument("--no-onnx", action="store_true", help="capture and plan only, for a first look")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    version = transformers.__version__
    for family in FAMILIES:
        if options.page_only or (options.names and family.name not in options.names):
            continue
        row = attempt(family, not options.no_onnx)
        print(f"{version} {family.name:<12} {row}", flush=True)
        # Read again each time: another version of transformers may be at work on the same file.
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        results.setdefault(version, {})[family.name] = row
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

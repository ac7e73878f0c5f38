"""``claq-export verify``: exits non-zero when an artifact is worse than allowed, for deployment pipelines."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..errors import VerificationError
from ..option_types import finite, not_negative, positive
from ..standard_output import to_standard_output
from .guard import LIMITS, GuardReport, guard
from .output import json_text, print_table

_DESCRIPTION = """Measure an artifact against its original model and fail when it is worse than allowed.

decoders          --max-kl, --max-kl-p99 (nats a token), --min-top1, --max-perplexity-ratio
encoders          --min-cosine, --min-cosine-worst (of sentence embeddings; --text has a sentence a line)
classifiers       --max-kl, --max-kl-p99, --min-top1
encoder-decoders  the same, at each token that the original writes (--text has a sentence a line; speech: --audio)

exit status: 0 every limit holds; 8 one does not; else as claq-export
"""

_HELP = {
    "max_kl": "mean KL divergence of the original to the artifact",
    "max_kl_p99": "its 99th percentile",
    "max_perplexity_ratio": "perplexity divided by the original's",
    "min_top1": "share of positions where both rank the same first",
    "min_cosine": "mean cosine of embeddings",
    "min_cosine_worst": "the lowest cosine of an embedding",
}


def add_verify_command(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``verify`` to a parser's subparsers; parsed arguments carry ``run=run_verify``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="fail when an artifact is worse than allowed",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help="model.onnx as --out named it, or its folder, or one with claq.safetensors"
    )
    parser.add_argument("--against", required=True, metavar="MODEL", help="the original: Hugging Face folder or hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", metavar="FILE", help="running text, or a sentence a line for all but decoders")
    data.add_argument("--audio", metavar="PATH", help="for models of speech: an audio file, or a folder of them")
    limits = parser.add_argument_group("limits (at least one)")
    for name, text in _HELP.items():
        limits.add_argument(f"--{name.replace('_', '-')}", type=finite, metavar="X", help=text)
    parser.add_argument("--task", help="of the model (default: as the artifact says)")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens a window (default: 512, or what the model takes if that is less)",
    )
    parser.add_argument(
        "--windows",
        type=not_negative,
        default=32,
        metavar="N",
        help="first N windows, or 4 N sentences or recordings; 0 = all (default: 32)",
    )
    parser.add_argument(
        "--layers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare layer by layer too (default: on)",
    )
    parser.add_argument(
        "--worst", type=not_negative, default=10, metavar="N", help="layers shown in the table (default: 10)"
    )
    parser.add_argument(
        "--library",
        default="auto",
        metavar="PATH",
        help="runtime library for ONNX files: a path, `auto` (installed claq-runtime) or `none`",
    )
    parser.add_argument("--threads", type=not_negative, default=0, metavar="N", help="threads of ONNX Runtime")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the original")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run_verify)
    return parser


def run_verify(options: argparse.Namespace) -> None:
    """Measure, print, and raise if a limit does not hold.

    Raises:
        VerificationError: a limit does not hold; all that do not are named.
        ClaqError: what is missing or wrong, named.
    """
    report = guard(
        options.artifact,
        options.against,
        options.text,
        {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None},
        audio=options.audio,
        task=options.task,
        context=options.context,
        windows=options.windows or None,
        library=options.library,
        threads=options.threads,
        layers=options.layers,
        trust_remote_code=options.trust_remote_code,
    )
    with to_standard_output():
        if options.json:
            print(json_text(report.to_json()))
        else:
            _print(report, options.worst)
    failed = [check for check in report.checks if not check.passed]
    if failed:
        broken = "; ".join(
            f"{check.measure} is {check.value:.6g}, {'at most' if LIMITS[check.limit][1] else 'at least'} "
            f"{check.allowed:g} is allowed"
            for check in failed
        )
        raise VerificationError(f"{report.artifact} is worse than allowed: {broken}")


def _print(report: GuardReport, worst: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("measure", "value", "limit", ""):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    checks = {check.measure: check for check in report.checks}
    for name, value in report.measures.items():
        check = checks.get(name)
        limit = "" if check is None else f"{'<=' if LIMITS[check.limit][1] else '>='} {check.allowed:g}"
        verdict = Text() if check is None else (Text("holds") if check.passed else Text("broken", style="red"))
        whole = math.isfinite(value) and value == int(value)
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if whole else f"{value:.5f}", limit, verdict)
    console = print_table(f"{report.artifact} against {report.original} ({report.task})", table)
    if report.layers:
        shown = report.layers[:worst]
        layers = Table(title=f"worst {len(shown)} of {len(report.layers)} layers", title_justify="left")
        for heading in ("layer", "out x in", "true bits", "weight error", "output error"):
            layers.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
        for layer in shown:
            layers.add_row(
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                f"{layer.true_bits:.3f}",
                f"{layer.weight_error:.2e}",
                "-" if layer.output_error is None else f"{layer.output_error:.2e}",
            )
        console.print(layers)

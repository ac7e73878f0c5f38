"""``claq-export eval``: measures an artifact or a model from the command line, as a table or as JSON."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError
from ..option_types import not_negative, positive
from ..standard_output import to_standard_output
from .lambada import lambada_quality, read_passages
from .language import language_quality, read_text, token_windows
from .models import open_model, open_tokenizer, sequence_limit, window_length
from .output import json_text, print_table
from .sentences import read_pairs, sentence_quality

_CONTEXT = 1024
"""Tokens a window where nothing else is asked for."""

TASKS = ("perplexity", "kl", "embedding", "sts", "lambada", "harness")

_DESCRIPTION = """Measure a model: an ONNX file, a folder with claq.safetensors, or a Hugging Face folder.

tasks:
  perplexity  over non-overlapping windows of a text (--text); with --reference also what `kl` prints
  kl          KL divergence to the original model (--reference): mean, median, 99th percentile; and top-1 agreement
  embedding   cosine of sentence embeddings to the original's (--reference), sentences from --text, one a line
  sts         Spearman correlation with human similarity scores, pairs from --text (STS-B, or CSV with the columns
              sentence1, sentence2, score)
  lambada     last-word accuracy, passages from --text (JSONL with a `text` field)
  harness     tasks of EleutherAI's lm-evaluation-harness (--harness-tasks); needs `pip install lm-eval`
"""


def add_eval_command(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``eval`` to a parser's subparsers; parsed arguments carry ``run=run_eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model or an artifact: perplexity, KL divergence, embeddings, STS, LAMBADA",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="ARTIFACT_OR_MODEL", help="model.onnx, a claq.safetensors folder, or a Hugging Face folder"
    )
    parser.add_argument("--task", choices=TASKS, default="perplexity", help="what to measure (default: perplexity)")
    parser.add_argument("--text", metavar="FILE", help="the task's data: a text, STS pairs, or LAMBADA passages")
    parser.add_argument("--reference", metavar="MODEL", help="the original model, to compare with")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: beside the model, then the reference)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"tokens a window (default: {_CONTEXT}, or what the model takes if that is less)",
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="first N windows only (default: the whole text)")
    parser.add_argument("--bos", action="store_true", help="begin every window with the BOS token, as llama.cpp does")
    parser.add_argument("--limit", type=positive, metavar="N", help="first N sentences, passages or items only")
    parser.add_argument(
        "--library",
        default="auto",
        metavar="PATH",
        help="runtime library for ONNX files: a path, `auto` (installed claq-runtime) or `none`",
    )
    parser.add_argument(
        "--threads", type=not_negative, default=0, metavar="N", help="threads of ONNX Runtime (default: its choice)"
    )
    parser.add_argument("--harness-tasks", metavar="A,B", help="names of lm-evaluation-harness tasks")
    parser.add_argument("--harness-path", metavar="FOLDER", help="folder with further task definitions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run_eval)
    return parser


def run_eval(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit code 0.

    Raises:
        ClaqError: what is missing or wrong, named.
    """
    values = measure(arguments)
    if arguments.json:
        with to_standard_output():
            print(json_text({"model": arguments.model, "task": arguments.task, **values}))
        return 0
    from rich.table import Table

    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in _flatten(values):
        table.add_row(name.replace("_", " "), _format(value))
    with to_standard_output():
        print_table(f"{arguments.task}: {arguments.model}", table)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The task's numbers by name."""
    task = arguments.task
    if task == "kl" and not arguments.reference:
        raise ConfigError("--task kl compares with the original model; name it with --reference")
    if task == "embedding" and not arguments.reference:
        raise ConfigError("--task embedding compares with the original model; name it with --reference")
    if task == "harness":
        if not arguments.harness_tasks and not arguments.text:
            raise ConfigError("--task harness needs --harness-tasks, or --text with LAMBADA passages")
    elif not arguments.text:
        raise ConfigError(f"--task {task} needs its data: --text FILE")
    causal = task not in ("embedding", "sts")
    tokenizer = open_tokenizer(arguments.model, arguments.reference, chosen=arguments.tokenizer)
    options = {"causal": causal, "library": arguments.library, "threads": arguments.threads}
    model = open_model(arguments.model, reference=arguments.reference, **options)
    reference = open_model(arguments.reference, **options) if arguments.reference and task != "lambada" else None

    if task in ("perplexity", "kl"):
        bos = tokenizer.bos_token_id if arguments.bos else None
        if arguments.bos and bos is None:
            raise ConfigError("--bos: the tokenizer has no BOS token")
        context = window_length(arguments.context, _CONTEXT, sequence_limit(model, reference))
        windows = token_windows(read_text(arguments.text), tokenizer, context, arguments.windows, bos)
        with _progress("windows", arguments) as advance:
            quality = language_quality(
                model, windows, reference, lambda done, total, q: advance(done, total, f"perplexity {q.perplexity:.3f}")
            )
        return quality.to_json()
    if task == "embedding":
        lines = [line.strip() for line in read_text(arguments.text).splitlines() if line.strip()]
        return sentence_quality(model, tokenizer, sentences=lines[: arguments.limit], reference=reference).to_json()
    if task == "sts":
        pairs = read_pairs(arguments.text)[: arguments.limit]
        return sentence_quality(model, tokenizer, pairs=pairs, reference=reference).to_json()
    if task == "lambada":
        with _progress("passages", arguments) as advance:
            passages = read_passages(arguments.text, arguments.limit)
            return lambada_quality(model, tokenizer, passages, lambda done, total: advance(done, total, "")).to_json()
    return _harness(arguments, model, tokenizer)


def _harness(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    from .harness import run_harness, write_lambada_task

    if arguments.harness_tasks:
        tasks = arguments.harness_tasks.split(",")
        return run_harness(model, tokenizer, tasks, include_path=arguments.harness_path, limit=arguments.limit)
    with tempfile.TemporaryDirectory() as folder:
        write_lambada_task(folder, arguments.text)
        return run_harness(model, tokenizer, ["lambada_local"], include_path=folder, limit=arguments.limit)


@contextmanager
def _progress(unit: str, arguments: argparse.Namespace) -> Iterator[Any]:
    """A progress bar on standard error; yields ``advance(done, total, note)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=arguments.quiet or arguments.json) as bar:
        line = bar.add_task(unit, total=None, note="")
        yield lambda done, total, note: bar.update(line, completed=done, total=total, note=note)


def _flatten(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {inner}", number) for inner, number in value.items())
        else:
            yield name, value


def _format(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

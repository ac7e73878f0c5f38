"""Check and time the Triton kernels on the GPU of this machine: one command, nothing downloaded, under nine minutes.

    python benchmarks/gpu/run_all.py [--minutes 9] [--tune [--write-dispatch]] [--quick] [--dry-run]

First every kernel against the dense weight in float64, then the operators as users call them, and small models under
torch.compile and in CUDA graphs. Then times: of a model beside eager and Inductor's, and of products at rotating copies of
the weights (so that the L2 cache does not hold them), launched one by one and as a CUDA graph, beside cuBLAS bf16, torch's
int4 kernel and GemLite where it is installed. Bandwidth is that of the packed weight, as a share of what a plain copy
reaches in the same run, at its beginning or end. Last, where libclaq and kernels compiled ahead of time are at hand,
benchmarks/gpu/runtime.py checks and times those, and ONNX Runtime's logits on CUDA.

Writes gpu_<device>.json and .md into benchmarks/results, or with --results FOLDER elsewhere, after every measurement. Needs
torch with CUDA, and triton. For the last part, on a machine without network and compiler of kernels:

    make kernels                                        # before, on any machine; runtime/kernels is carried along
    pip install ./runtime --no-build-isolation          # there: with cmake, scikit-build-core and a C++ compiler
    python benchmarks/gpu/run_all.py --runtime FOLDER   # or FOLDER/claq_runtime is carried along, from any site-packages

--dry-run goes the same way without a GPU: tiny sizes in Triton's interpreter, times that mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from children import in_children  # noqa: E402
from goals import goals  # noqa: E402
from layers import arguments, copies_of, layer_of, weight_bytes  # noqa: E402
from machine import Machine, reason_of  # noqa: E402
from models import model_times  # noqa: E402
from parts import Part, look  # noqa: E402
from peers import cublas, gemlite, torch_int4  # noqa: E402
from tiles import write_dispatch  # noqa: E402

from claq_export.format.layer import QuantizedLinear  # noqa: E402

MIXES = {"2": (2,), "3": (3,), "4": (4,), "2+4": (2,) * 9 + (4,)}
KINDS = [
    *((name, widths, 0.0, 0.0) for name, widths in MIXES.items()),
    ("4", (4,), 0.005, 0.0),
    ("4, exact rows", (4,), 0.0, 0.01),
]
"""What is timed: a name, widths, the share of outliers, the share of rows of which every weight is one (a vocabulary's most
frequent tokens); both of the latter at the main shape alone."""
SHARE_OF_CHECKS = 0.3
"""Most of the time that checks may take; nearly all of it goes into compiling kernels."""
SHARE_OF_OPERATORS = 0.42
"""The part of the time after which no further operator or model is checked; they follow the kernels."""
GRACE_SECONDS = 30
"""How much longer than its deadline a check that has begun may take."""
SECONDS_FOR_MODEL_TIMES = 60
SECONDS_FOR_LOOKUPS = 15
SECONDS_FOR_RUNTIME = 150


def timings(
    machine: Machine,
    deadline: float,
    quick: bool,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Append times of our products and of the others' to ``rows``, by shape, mix of widths, outliers and number of vectors;
    ``save`` is called after each."""
    from claq_export.kernels.triton.launch import linear

    sizes, dispatch = machine.sizes, machine.dispatch()
    for shape in sizes.shapes[:1] if quick else sizes.shapes:
        vectors = sizes.vectors if shape == sizes.main else sizes.few_vectors
        few = [m for m in vectors if m <= 128]
        try:
            dense = cublas(machine, *shape, vectors)
        except Exception as failure:  # of CUDA, out of memory for one
            rows.append({"shape": shape, "mix": "cuBLAS", "outliers": 0.0, "skipped": reason_of(failure)})
            continue
        peers = {"int4pack": torch_int4(machine, *shape, few), "gemlite": gemlite(machine, *shape, few)}
        for name, widths, outliers, exact_rows in KINDS:
            if (outliers or exact_rows) and shape != sizes.main:
                continue
            head = {"shape": shape, "mix": name, "outliers": outliers or exact_rows}
            if time.monotonic() > deadline:
                rows.append({**head, "skipped": "out of time"})
                continue
            layers = copies_of(layer_of(*shape, widths, outliers, exact_rows=exact_rows).to(machine.device), sizes)
            size = weight_bytes(layers[0])
            for m in vectors:
                x = torch.randn(m, shape[0], device=machine.device, dtype=torch.bfloat16)
                calls = [lambda layer=layer, x=x: linear(*arguments(layer, x), dispatch=dispatch) for layer in layers]
                row: dict[str, Any] = {**head, "vectors": m, "bytes": size}
                try:
                    row["graph_us"] = machine.seconds(calls, graph=True) * 1e6
                    row["eager_us"] = machine.seconds(calls, graph=False, repeats=3) * 1e6
                except Exception as failure:  # of CUDA, Triton's compiler or its launcher
                    rows.append({**head, "skipped": f"M = {m}: {reason_of(failure)}"})
                    print(rows[-1], flush=True)
                    save()
                    continue
                row["cublas_bf16_us"] = dense[m] * 1e6
                for peer, times in peers.items():
                    row[f"{peer}_us"] = times[m] * 1e6 if isinstance(times, dict) and m in times else None
                rows.append(row)
                print(row, flush=True)
                save()
        for peer, times in peers.items():
            if isinstance(times, str):
                rows.append({"shape": shape, "mix": peer, "outliers": 0.0, "skipped": times})


def profiles(machine: Machine, deadline: float, rows: list[dict[str, Any]]) -> None:
    """Append the times of the kernels of one call to ``rows``. A profiler slows what runs after it: this comes last."""
    from claq_export.kernels.triton.launch import linear

    main, dispatch = machine.sizes.main, machine.dispatch()
    for name, widths, outliers, exact_rows in KINDS:
        if time.monotonic() > deadline:
            continue
        layer = layer_of(*main, widths, outliers, exact_rows=exact_rows)
        layers = copies_of(layer.to(machine.device), machine.sizes)
        for m in (1, 16):
            x = torch.randn(m, main[0], device=machine.device, dtype=torch.bfloat16)
            calls = [partial(linear, *arguments(layer, x), dispatch=dispatch) for layer in layers]
            head = {"mix": name, "outliers": outliers or exact_rows, "vectors": m}
            rows.append({**head, "kernels_us": machine.kernel_times(calls)})


def set_shares(result: dict[str, Any]) -> None:
    """Give every timed product the share of the copy bandwidth that it reached: of the faster of the copies so far."""
    bandwidth = max(result["copies"].values(), default=float("nan"))
    for row in result["timings"]:
        if "skipped" not in row:
            row["copy_bandwidth_percent"] = 100 * row["bytes"] / (row["graph_us"] * 1e-6) / bandwidth


def lookups(machine: Machine, deadline: float, rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append times of looking up rows of a table, beside a dense bf16 table, to ``rows``."""
    from claq_export.kernels.triton.launch import embedding

    (vocabulary, width), dispatch = machine.sizes.table, machine.dispatch()

    def look_up(table: QuantizedLinear, ids: torch.Tensor) -> torch.Tensor:
        settings = (width, vocabulary, table.columns, torch.bfloat16)
        return embedding(ids, *table.tensors().values(), *settings, dispatch=dispatch)

    dense = torch.randn(vocabulary, width, device=machine.device, dtype=torch.bfloat16)
    for name in ("2", "4"):
        if time.monotonic() > deadline:
            rows.append({"mix": name, "skipped": "out of time"})
            continue
        layer = layer_of(width, vocabulary, MIXES[name]).to(machine.device)
        for count in machine.sizes.tokens:
            every = [torch.randint(vocabulary, (count,), device=machine.device) for _ in range(16)]
            calls = [partial(look_up, layer, ids) for ids in every]
            others = [partial(torch.nn.functional.embedding, ids, dense) for ids in every]
            row: dict[str, Any] = {"mix": name, "table": [vocabulary, width], "tokens": count}
            row["graph_us"] = machine.seconds(calls, graph=True) * 1e6
            row["eager_us"] = machine.seconds(calls, graph=False, repeats=3) * 1e6
            row["dense_us"] = machine.seconds(others, graph=True) * 1e6
            rows.append(row)
            print(row, flush=True)
            save()


def tune(machine: Machine, deadline: float, rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append microseconds of the few-vectors and tensor-core kernels over tile sizes to ``rows``: numbers for
    kernels/triton/dispatch.json."""
    from claq_export.kernels.triton.dispatch import GemmConfig, GemvConfig
    from claq_export.kernels.triton.launch import linear

    base, main = machine.dispatch(), machine.sizes.main
    gemv = [GemvConfig(4, *tile) for tile in product((32, 64), (2, 4, 8), (1, 2), (4, 8, 16))]
    gemm = [
        GemmConfig(1 << 30, vectors, 64, blocks, blocks, stages, programs)
        for vectors, blocks, stages, programs in product((16, 32, 64), (4, 8), (1, 2), (1, 2))
    ]
    if machine.dry:
        gemv, gemm = gemv[:2], gemm[:1]
    for name in ("2", "4", "3"):
        layers = copies_of(layer_of(*main, MIXES[name]).to(machine.device), machine.sizes)
        for m, configs in ((1, gemv), (16, gemm), (128, gemm)):
            x = torch.randn(m, main[0], device=machine.device, dtype=torch.bfloat16)
            for config in configs:
                if time.monotonic() > deadline:
                    return
                if isinstance(config, GemvConfig):
                    dispatch = dataclasses.replace(base, gemv=config)
                else:
                    dispatch = dataclasses.replace(base, gemm=(config,))
                calls = [
                    lambda layer=layer, x=x, dispatch=dispatch: linear(*arguments(layer, x), dispatch=dispatch)
                    for layer in layers
                ]
                try:
                    time_us: float | str = machine.seconds(calls, graph=True) * 1e6
                except Exception as failure:
                    # A tile that needs more shared memory or registers than there are is an answer, too.
                    time_us = reason_of(failure)
                rows.append({"mix": name, "vectors": m, "tile": dataclasses.asdict(config), "us": time_us})
                print(rows[-1], flush=True)
                save()


def ahead_of_time(machine: Machine, results: Path, seconds: float) -> dict[str, Any]:
    """What benchmarks/gpu/runtime.py finds, in a process of its own; or why it was not tried."""
    if machine.dry:
        return {"not tried": "a dry run has no GPU"}
    if not list((ROOT / "runtime" / "kernels").glob("*.kernels")):
        return {"not tried": "runtime/kernels holds no kernels: make kernels, on any machine"}
    if importlib.util.find_spec("claq_runtime") is None:
        return {"not tried": "claq-runtime is not installed: pip install ./runtime"}
    command = [sys.executable, str(HERE / "runtime.py"), "--results", str(results)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(10.0, seconds))
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {seconds:.0f} s"}
    return {"status": done.returncode, "output": (done.stdout + done.stderr)[-6000:]}


def _peer(row: dict[str, Any], peer: str) -> str:
    return f"{row[f'{peer}_us']:.1f}" if row[f"{peer}_us"] else ""


def _model_table(rows: list[dict[str, Any]]) -> list[str]:
    names = ("eager", "inductor", "claq")
    lines = ["", "A transformer's block in 16 bits, one token a sequence, microseconds:", ""]
    lines += ["| sequences | launched | eager | Inductor | claq, 4 bits |", "|---|---|---|---|---|"]
    for row in rows:
        head = f"| {row['batch']} | {'CUDA graph' if row['graph'] else 'one by one'} |"
        if "skipped" in row:
            lines.append(f"{head} not measured: {row['skipped']} |")
            continue
        cells = [
            f"{row['us'][name]:.1f}" if name in row["us"] else f"failed: {row['failures'][name]}" for name in names
        ]
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    checks = result["checks"]
    failed = [check for check in checks if check.get("passed") is False]
    passed = sum(check.get("passed") is True for check in checks)
    copies = ", ".join(f"{speed / 1e12:.2f} TB/s at the {when}" for when, speed in result["copies"].items())
    lines = [
        f"# Triton kernels on {result['device']}",
        "",
        f"`benchmarks/gpu/run_all.py`, {result['date']}, torch {result['torch']}, triton {result['triton']}; copy bandwidth "
        f"{copies}. {passed} of {len(checks)} comparisons with the dense weight passed, "
        f"{len(failed)} failed, {len(checks) - passed - len(failed)} were not reached. The run took {result['seconds']:.0f} s.",
        "",
    ]
    reached = [finding for finding in result["operators"] if "skipped" not in finding]
    wrong = [finding for finding in reached if not finding["passed"]]
    lines += [f"{len(reached) - len(wrong)} of {len(reached)} operators and models agree.", ""]
    lines += [f"- not tried: {left['what']}: {left['skipped']}" for left in result["operators"] if "skipped" in left]
    lines += [f"- FAILED: {failure}" for failure in (*result["failures"], *failed, *wrong)]
    lines += ["| goal | bound | worst measured | |", "|---|---|---|---|"]
    for goal in result["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}"
        verdict = {True: "met", False: "**missed**", None: ""}[goal["met"]]
        lines.append(f"| {goal['goal']} | {goal['bound']} | {value} | {verdict} |")
    lines += [
        "",
        "| in x out | mix | outliers | M | graph us | eager us | % of copy | cuBLAS bf16 us | times cuBLAS | int4pack us | "
        "GemLite us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["timings"]:
        head = f"| {row['shape'][0]} x {row['shape'][1]} | {row['mix']} | {row['outliers']:.3f} | "
        if "skipped" in row:
            lines.append(f"{head} not measured: {row['skipped']} |")
            continue
        lines.append(
            f"{head}{row['vectors']} | {row['graph_us']:.1f} | {row['eager_us']:.1f} | "
            f"{row['copy_bandwidth_percent']:.0f} | {row['cublas_bf16_us']:.1f} | "
            f"{row['cublas_bf16_us'] / row['graph_us']:.2f} | {_peer(row, 'int4pack')} | {_peer(row, 'gemlite')} |"
        )
    lines += [
        *_model_table(result["models"]),
        "",
        "Rows of a table looked up; the few that are read again come from the L2 cache:",
    ]
    lines += ["", "| table | mix | rows | graph us | eager us | dense bf16 us |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["lookups"]:
        if "skipped" in row:
            lines.append(f"| | {row['mix']} | not measured: {row['skipped']} |")
            continue
        lines.append(
            f"| {row['table'][0]} x {row['table'][1]} | {row['mix']} | {row['tokens']} | {row['graph_us']:.1f} | "
            f"{row['eager_us']:.1f} | {row['dense_us']:.1f} |"
        )
    lines += ["", "Kernels of one call, microseconds:", ""]
    for row in result["kernels"]:
        if row["kernels_us"]:
            parts = ", ".join(f"{name} {us:.1f}" for name, us in row["kernels_us"].items())
            lines.append(f"- {row['mix']}, outliers {row['outliers']:.3f}, M = {row['vectors']}: {parts}")
    for name in sorted({(row["mix"], row["vectors"]) for row in result["tuning"]}):
        measured = [row for row in result["tuning"] if (row["mix"], row["vectors"]) == name]
        best = sorted((row for row in measured if isinstance(row["us"], float)), key=lambda row: row["us"])[:3]
        lines += ["", f"Fastest tiles for mix {name[0]}, M = {name[1]}:", ""]
        lines += [f"- {row['us']:.1f} us: {row['tile']}" for row in best]
    runtime = result["ahead_of_time"]
    if "status" in runtime:
        lines += [
            "",
            f"Kernels compiled ahead of time: exit status {runtime['status']}; see gpu_runtime_*.md beside this.",
        ]
    else:
        reason = runtime.get("not tried") or f"failed: {runtime['failed']}"
        lines += ["", f"Kernels compiled ahead of time, and ONNX Runtime: {reason}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything; the exit status is 1 when a comparison failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="end within this time, whatever is left out")
    parser.add_argument("--tune", action="store_true", help="also time other tile sizes")
    parser.add_argument("--write-dispatch", action="store_true", help="put the fastest tiles into dispatch.json")
    parser.add_argument("--quick", action="store_true", help="one shape only")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--runtime", type=Path, help="folder to import claq_runtime from, where it is not installed")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write into")
    options = parser.parse_args()
    if options.write_dispatch and (options.dry_run or not options.tune):
        parser.error("--write-dispatch needs --tune, and a GPU")
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false (--dry-run needs none)", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed", file=sys.stderr)
        return 2
    if options.runtime:
        if not (options.runtime / "claq_runtime" / "__init__.py").exists():
            parser.error(f"--runtime: {options.runtime} holds no claq_runtime")
        # This process and those that it starts; of site-packages as a folder nothing but claq_runtime is wanted.
        only = tempfile.TemporaryDirectory()
        Path(only.name, "claq_runtime").symlink_to((options.runtime / "claq_runtime").resolve())
        sys.path.insert(0, only.name)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (only.name, os.environ.get("PYTHONPATH"))))
    machine = Machine(options.dry_run)
    import triton

    started, total = time.monotonic(), 60 * options.minutes
    # A measurement that has begun is finished: the last half minute is left for it.
    deadline = started + total - 30 - SECONDS_FOR_RUNTIME
    result: dict[str, Any] = {
        "device": machine.name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": [],
        "operators": [],
        "copies": {},
        "models": [],
        "lookups": [],
        "timings": [],
        "tuning": [],
        "kernels": [],
        "goals": [],
        "ahead_of_time": {"not tried": "the run had ended"},
        "failures": [],
    }
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", result["device"].lower()).strip("_")
    smallest = machine.sizes.main[0] * machine.sizes.main[1]
    options.results.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        # After every step: a GPU is lent for minutes, and whatever ends the run must not take the findings with it.
        set_shares(result)
        result["goals"] = [] if machine.dry else goals(result["timings"], smallest)
        result["seconds"] = time.monotonic() - started
        (options.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.results / f"{name}.md").write_text(table(result))

    def step(part: str, measure: Callable[[], Any]) -> None:
        try:
            found = measure()
            if found is not None:
                result[part] = found
        except Exception as failure:
            result["failures"].append(f"{part}: {reason_of(failure)}")
            print("FAILED", result["failures"][-1], flush=True)
        save()

    def report_to(part: str) -> Callable[[dict[str, Any]], None]:
        def report(finding: dict[str, Any]) -> None:
            result[part].append(finding)
            if part == "operators" or finding.get("passed") is False:
                print("FAILED" if finding.get("passed") is False else "found", finding, flush=True)
            save()

        return report

    save()
    # Most of the time of comparing kernels goes into compiling them.
    processes = 1 if machine.dry else min(16, os.cpu_count() or 1)
    for part, share, several in (
        ("checks", SHARE_OF_CHECKS, processes),
        ("operators", SHARE_OF_OPERATORS, 1),
        ("models", SHARE_OF_OPERATORS, 1),
    ):
        end = started + share * total
        work = [Part(part, machine.dry, end, first, several) for first in range(several)]
        report = report_to("checks" if part == "checks" else "operators")
        step(part, partial(in_children, look, work, max(0.0, end - time.monotonic()) + GRACE_SECONDS, report))
    step("copies", lambda: {"beginning": machine.copy_bandwidth()})
    end_of_timings = deadline - SECONDS_FOR_MODEL_TIMES - SECONDS_FOR_LOOKUPS
    step("timings", lambda: timings(machine, end_of_timings, options.quick, result["timings"], save))
    step("lookups", lambda: lookups(machine, end_of_timings + SECONDS_FOR_LOOKUPS, result["lookups"], save))
    step("models", lambda: model_times(machine, deadline, result["models"], save))
    if options.tune:
        step("tuning", lambda: tune(machine, deadline, result["tuning"], save))
    step("copies", lambda: {**result["copies"], "end": machine.copy_bandwidth()})
    step("kernels", lambda: profiles(machine, deadline, result["kernels"]))
    step("ahead_of_time", lambda: ahead_of_time(machine, options.results, started + total - time.monotonic()))
    print(table(result))
    if options.write_dispatch:
        write_dispatch(result["tuning"], torch.cuda.get_device_capability(), f"benchmarks/results/{name}.json")
    findings = (*result["checks"], *result["operators"])
    failed = result["failures"] or any(finding.get("passed") is False for finding in findings)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

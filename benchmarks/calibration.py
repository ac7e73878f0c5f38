"""Times the quantization of a causal language model, calibration included, and measures its peak memory.

    python benchmarks/calibration.py MODEL [--text FILE] [--samples 128] [--length 1024] [--bits 3] [--threads 2]

MODEL is a Hugging Face folder; the calibration text is the one that comes with claq, which holds 41 windows of 1024
tokens of SmolLM2, or FILE. Capture, calibration data and
quantization run in a process of their own (nothing is emitted or verified), whose largest resident set the kernel
reports; under GNU time (`/usr/bin/time -v`), where that is installed, and by `getrusage` both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEFAULT_TEXT = "default"
LIMIT_SECONDS, LIMIT_BYTES = 600, 4 * 2**30


def quantize(args: argparse.Namespace) -> None:
    """The measured work; prints one line of JSON."""
    import torch

    from claq_export.api import capture
    from claq_export.calibration.progress import ProgressReporter
    from claq_export.compiler import Compilation
    from claq_export.config import Config

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    captured, _ = capture(args.model, reread=True)  # as an export does
    captured_after = time.perf_counter() - start
    config = Config(
        bits=args.bits,
        calibration=args.text,
        samples=args.samples,
        sequence_length=args.length,
        batch_size=args.batch_size,
        include=tuple(args.include),
    )
    with ProgressReporter(quiet=True, log_path=args.log) as reporter:
        compilation = Compilation(captured, config, reporter)
        batches = compilation.batches() or []
        start, cpu = time.perf_counter(), time.process_time()
        compilation.quantize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    print(
        json.dumps(
            {
                "tokens": sum(batch["input_ids"].numel() for batch in batches),
                "layers": len(compilation.sites),
                "weights": compilation.quantized_weights,
                "true_bits": compilation.true_bits,
                "capture_seconds": captured_after,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "steps": compilation.quantization_seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run :func:`quantize` in a process of its own."""
    timer = shutil.which("time", path="/usr/bin")
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    began = os.getloadavg()[0]
    run = subprocess.run(
        ([timer, "-v"] if timer else []) + command,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if timer else None,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
    )
    found: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    found["load_before"] = began
    found["load_after"] = os.getloadavg()[0]
    for line in (run.stderr or "").splitlines():
        if "Maximum resident set size" in line:
            found["time_v_bytes"] = int(line.split()[-1]) * 1024
    return found


def table(args: argparse.Namespace, found: dict[str, object]) -> str:
    seconds, cpu = float(str(found["seconds"])), float(str(found["cpu_seconds"]))
    peak = int(str(found.get("time_v_bytes", found["peak_bytes"])))
    steps = dict(found["steps"])  # type: ignore[call-overload]
    patterns = "".join(f" --include '{pattern}'" for pattern in args.include)
    lines = [
        "# Calibration and quantization of a language model",
        "",
        f"`python benchmarks/calibration.py MODEL --samples {args.samples} --length {args.length} --bits {args.bits:g} "
        f"--threads {args.threads}{patterns}`: "
        f"{Path(args.model).resolve().name}, {found['layers']} layers (stacks counted once), "
        f"{int(str(found['weights'])) / 1e6:.1f} M weights, {found['tokens']} calibration tokens, "
        f"{float(str(found['true_bits'])):.3f} true bits a weight; {args.threads} threads on "
        f"{os.cpu_count()} {platform.machine()} processors, load average {float(str(found['load_before'])):.1f} before and "
        f"{float(str(found['load_after'])):.1f} at the end of the run (its own threads included). {args.note}".rstrip(),
        "",
        "| | found | wanted |",
        "|---|---|---|",
        f"| quantization, calibration included | {seconds:.0f} s | < {LIMIT_SECONDS} s |",
        f"| processor time of it, all threads | {cpu:.0f} s | |",
        f"| largest resident set, the whole process ({'GNU time' if 'time_v_bytes' in found else 'getrusage'}) "
        f"| {peak / 2**30:.2f} GiB | < {LIMIT_BYTES / 2**30:.0f} GiB |",
        "",
        "| step | seconds | share |",
        "|---|---|---|",
        *(f"| {step} | {spent:.1f} | {spent / seconds:.0%} |" for step, spent in steps.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="calibration text (default: the one that comes with claq)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--batch-size", type=int, help="default: as claq-export chooses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="only layers that match")
    parser.add_argument("--note", default="", help="said about the run in the table, for example: busy machine")
    parser.add_argument("--log", help="JSON line for every layer")
    parser.add_argument(
        "--write", nargs="?", const="calibration", metavar="NAME", help="write benchmarks/results/NAME.md and NAME.json"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        quantize(args)
        return
    found = measure(args)
    text = table(args, found)
    print(text)
    if args.write:
        (RESULTS / f"{args.write}.md").write_text(text)
        (RESULTS / f"{args.write}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

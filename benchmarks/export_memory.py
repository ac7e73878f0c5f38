"""Measures how much resident memory claq-export takes, stage by stage, beside the size of the model in float32.

    python benchmarks/export_memory.py MODEL [--write NAME] [claq-export's own options, for example --samples 8]

MODEL is a Hugging Face folder. The command runs in a process of its own; at every stage that its log names, the kernel's
high-water mark of the process (``VmHWM``: files mapped into memory included) is read and started afresh, so that each stage
has its own. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WANTED = 2.5
_POLL_SECONDS = 0.02


def high_water(process: int) -> int:
    """Bytes of the process's largest resident set since the mark was started; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def start_afresh(process: int) -> None:
    """Let the mark begin at what is resident now."""
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return  # the process has ended


def stages_of(log: Path) -> list[str]:
    """Messages of the stages that have begun."""
    if not log.exists():
        return []
    events = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return [str(event["message"]) for event in events if event["event"] == "stage"]


def measure(model: str, options: list[str]) -> tuple[dict[str, int], float]:
    """Export once: peak bytes by stage, and seconds."""
    with tempfile.TemporaryDirectory(prefix="claq-") as folder:
        log, out = Path(folder) / "log.jsonl", Path(folder) / "out" / "model.onnx"
        out.parent.mkdir()
        command = [
            sys.executable,
            "-m",
            "claq_export.cli",
            model,
            "--out",
            str(out),
            "--log",
            str(log),
            "--quiet",
            *options,
        ]
        start = time.perf_counter()
        peaks = {"starting": 0}
        stage, seen = "starting", 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            while process.poll() is None:
                begun = stages_of(log)
                peaks[stage] = max(peaks[stage], high_water(process.pid))  # right before it may start afresh
                if len(begun) > seen:
                    seen, stage = len(begun), begun[-1].replace(str(out), "model.onnx")
                    peaks.setdefault(stage, 0)
                    start_afresh(process.pid)
                time.sleep(_POLL_SECONDS)
            printed = process.stdout.read() if process.stdout else ""
        if process.returncode:
            sys.exit(f"claq-export failed with {process.returncode}:\n{printed}")
        return peaks, time.perf_counter() - start


def float32_bytes(model: Path) -> int:
    """What the model's weights take in float32."""
    from claq_export.errors import ModelError
    from claq_export.inputs import SafetensorsFile

    files = [SafetensorsFile(path, ModelError) for path in sorted(model.glob("*.safetensors"))]
    return sum(4 * info.nbytes // info.dtype.itemsize for file in files for info in file.tensors.values())


def table(model: Path, options: list[str], peaks: dict[str, int], seconds: float, note: str) -> str:
    size, highest = float32_bytes(model), max(peaks.values())
    lines = [
        "# Memory of an export",
        "",
        f"`python benchmarks/export_memory.py MODEL {' '.join(options)}`: {model.resolve().name}, {size / 1e6:.0f} MB in "
        f"float32; {os.cpu_count()} {platform.machine()} processors, {seconds:.0f} s. {note}".rstrip(),
        "",
        "| stage | largest resident set (MB) | of the weights in float32 |",
        "|---|---|---|",
        *(f"| {stage} | {peak / 1e6:,.0f} | {peak / size:.2f} |" for stage, peak in peaks.items()),
        f"| **all** (wanted: {WANTED}) | **{highest / 1e6:,.0f}** | **{highest / size:.2f}** |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--note", default="", help="said about the run in the table, for example the processor")
    parser.add_argument(
        "--write", nargs="?", const="export_memory", metavar="NAME", help="write benchmarks/results/NAME.md"
    )
    arguments, options = parser.parse_known_args()
    text = table(Path(arguments.model), options, *measure(arguments.model, options), arguments.note)
    print(text)
    if arguments.write:
        RESULTS.joinpath(f"{arguments.write}.md").write_text(text)


if __name__ == "__main__":
    main()

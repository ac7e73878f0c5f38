"""What it costs when an artifact's file lies in memory in small pages: decode speed of two copies of one artifact.

    claq-export SMOLLM2 --out smol/model.onnx --last-logits
    python benchmarks/file_pages.py smol [--threads 1 2] [--out benchmarks/results/file_pages.md]

Linux keeps a written file in memory in pieces as large as the writes were, where the file system can (ext4 and XFS of
current kernels), and ONNX Runtime maps weights from there. One copy is written in pieces of a page, as a program that
writes small tensors one by one does it, the other at once. Sessions on both take turns in one process: compare the ratios.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
from pathlib import Path

import onnxruntime as ort
from cpu_matmul import cpu_name
from decoder import each, fastest_tenth, interleaved, written_at_once

import claq_runtime
from claq_export.generation import Generator

PIECE = 4096


def written_in_pages(source: Path, folder: Path) -> Path:
    """A copy of a file in ``folder`` that was written page by page."""
    target = folder / source.name
    content = source.read_bytes()
    with target.open("wb", buffering=0) as file:
        for start in range(0, len(content), PIECE):
            file.write(content[start : start + PIECE])
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a language model exported by claq-export")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="Markdown table to write")
    options = parser.parse_args()

    writers = {"pages of 4 KiB": written_in_pages, "large pages": written_at_once}
    prompt = list(range(100, 116))
    lines = [
        "| threads | written in pages of 4 KiB, ms a token | at once, ms a token | at once / in pages | fastest tenths |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
        folders = {}
        for name, write in writers.items():
            folders[name] = Path(scratch) / name.replace(" ", "-")
            folders[name].mkdir()
            for file in options.folder.glob("model.onnx*"):
                write(file, folders[name])
        for threads in options.threads:
            library = Path(claq_runtime.library_path())
            generators = {name: Generator(path, library, threads) for name, path in folders.items()}
            runs = {
                name: lambda generator=generator: each(generator.tokens(prompt, options.new_tokens))[1:]
                for name, generator in generators.items()
            }
            small, large = interleaved(runs, options.rounds).values()
            medians, tenths = ([of(small), of(large)] for of in (statistics.median, fastest_tenth))
            lines.append(
                f"| {threads} | {1e3 * medians[0]:.2f} | {1e3 * medians[1]:.2f} | {medians[1] / medians[0]:.2f} "
                f"| {tenths[1] / tenths[0]:.2f} |"
            )
            print(lines[-1], flush=True)
    head = (
        f"{datetime.date.today()}, {cpu_name()}, Linux {platform.release()}, ONNX Runtime {ort.__version__}, "
        f"load average {os.getloadavg()[0]:.1f}; `python benchmarks/file_pages.py`\n\n"
    )
    text = "# Decoding from a file in small and in large pages\n\n" + head + "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()

"""Compile the Triton kernels ahead of time: ``python -m claq_export.kernels.aot --targets sm_80,sm_90 --out kernels``.

Needs Triton, but no GPU and no CUDA toolkit. The same sources and Triton version give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from .compile import KernelBuildError
from .jobs import compile_all
from .package import manifest_entry, package_name, write_manifest, write_package
from .variants import variants

DEFAULT_TARGETS = "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120"


def _target(text: str) -> int:
    digits = text.strip().removeprefix("sm_")
    if not digits.isdigit() or int(digits) < 80:
        raise argparse.ArgumentTypeError(f"a target looks like sm_80 and is at least that, got {text!r}")
    return int(digits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m claq_export.kernels.aot", description=__doc__)
    parser.add_argument(
        "--targets",
        type=lambda text: [_target(part) for part in text.split(",")],
        default=DEFAULT_TARGETS,
        help=f"GPU generations (default {DEFAULT_TARGETS})",
    )
    parser.add_argument("--out", type=Path, default=Path("claq-kernels"), help="folder to write (default claq-kernels)")
    parser.add_argument("--only", default="", help="compile only the kernels whose name starts with this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--no-ptx", action="store_true", help="leave out the PTX for GPUs that no target fits")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    jobs = [(t, v.name) for t in options.targets for v in variants(t) if v.name.startswith(options.only)]
    if not jobs:
        print(f"no kernel's name starts with {options.only!r}", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        compiled = compile_all(jobs, options.jobs)
    except KernelBuildError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    packages = {}
    for target in options.targets:
        kernels = [kernel for kernel in compiled if kernel.target == target]
        for ptx in (False, True):
            # PTX for sm_80 is assembled by the driver of any later GPU; that of sm_90 and up fits one generation alone.
            if ptx and (target != 80 or options.no_ptx):
                continue
            path = options.out / package_name(target, ptx)
            write_package(kernels, path, ptx)
            packages[path.name] = manifest_entry(path, kernels)
            print(f"{path}: {len(kernels)} kernels, {path.stat().st_size / 1e6:.2f} MB")
    write_manifest(packages, triton.__version__, options.out / "manifest.json")
    print(f"triton {triton.__version__}, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

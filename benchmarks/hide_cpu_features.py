"""Runs a benchmark as on a processor without some of this one's instructions, for claq and its peers alike.

    python benchmarks/hide_cpu_features.py avx512,amx benchmarks/cpu_matmul.py                  # what is left: AVX2 with AVX-VNNI
    python benchmarks/hide_cpu_features.py avx512,amx,avxvnni benchmarks/cpu_matmul.py          # AVX2
    python benchmarks/hide_cpu_features.py amx,avx512vbmi benchmarks/cpu_matmul.py --threads 1  # AVX-512 as Cascade Lake has it

CLAQ_KERNEL forces claq's kernels alone; ONNX Runtime and PyTorch choose theirs by the instruction `cpuid`, whose answers
hide_cpu_features.c changes. Linux on x86-64 with `cpuid_fault` in /proc/cpuinfo (Intel's processors have it, some
hypervisors too), and a C compiler. What was chosen when a program was compiled or started, a llama.cpp for one processor or
the C library's memcpy, stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "CLAQ_HIDDEN_FEATURES"


def hidden_features() -> list[str]:
    """The features that are hidden from this process, in order of their names."""
    return sorted(filter(None, os.environ.get(VARIABLE, "").split(",")))


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    features, *command = arguments
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "hide_cpu_features.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), VARIABLE: features}
        return subprocess.run([sys.executable, *command], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

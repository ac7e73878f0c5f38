"""Runs a benchmark as on a processor without some of this one's instructions, for claq and its peers alike.

    python benchmarks/hide_cpu_features.py avx512,amx benchmarks/cpu_matmul.py                  # what is left: AVX2 with AVX-VNNI
    python benchmarks/hide_cpu_features.py avx512,amx,avxvnni benchmarks/cpu_matmul.py          # AVX2
    python benchmarks/hide_cpu_features.py amx,avx512vbmi benchmarks/cpu_matmul.py --threads 1  # AVX-512 as Cascade Lake has it

CLAQ_KERNEL forces claq's kernels alone; ONNX Runtime and PyTorch choose theirs by the instruction `cpuid`, whose answers
hide_cpu_features.c changes. Linux on x86-64 and a C compiler. Where `cpuid` can fault (Intel's processors let it, some
hypervisors too, `cpuid_fault` in /proc/cpuinfo) that holds for all that is loaded; elsewhere for copies of onnxruntime and
claq_runtime whose `cpuid` has been replaced, found by objdump, which stand first in Python's path. What was chosen when a
program was compiled or started, a llama.cpp for one processor or the C library's memcpy, stays as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "CLAQ_HIDDEN_FEATURES"
CPUID, INVD = b"\x0f\xa2", b"\x0f\x08"
PACKAGES = ("onnxruntime", "claq_runtime")


def hidden_features() -> list[str]:
    """The features that are hidden from this process, in order of their names."""
    return sorted(filter(None, os.environ.get(VARIABLE, "").split(",")))


def file_offsets(library: bytes, addresses: list[int]) -> list[int]:
    """Where in an ELF file of 64 bits lie what is loaded at these addresses."""
    start, size, count = (struct.unpack_from(form, library, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56)))
    segments = []
    for i in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", library, start + i * size)
        if kind == 1:  # PT_LOAD
            segments.append((address, length, offset))
    return [
        address - begin + offset
        for address in addresses
        for begin, length, offset in segments
        if begin <= address < begin + length
    ]


def replace_cpuid(library: Path) -> int:
    """Puts `invd` in the place of each `cpuid` of a shared library; says how many there were.

    The bytes alone do not tell: they occur within other instructions too, which a disassembler knows.
    """
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], check=True, capture_output=True, text=True
    )
    lines = (line.split("\t") for line in listing.stdout.splitlines())
    addresses = [int(line[0].strip(" :"), 16) for line in lines if len(line) > 1 and line[1].strip() == "cpuid"]
    content = bytearray(library.read_bytes())
    offsets = file_offsets(content, addresses)
    if len(offsets) != len(addresses) or any(content[at : at + 2] != CPUID for at in offsets):
        raise RuntimeError(f"{library}: objdump's addresses are not those of the file")
    for at in offsets:
        content[at : at + 2] = INVD
    library.write_bytes(content)
    return len(offsets)


def copy_packages_without_cpuid(folder: Path) -> None:
    """Copies of PACKAGES, to stand first in Python's path."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        copy = shutil.copytree(Path(spec.origin).parent, folder / package)
        replaced = {path.name: replace_cpuid(path) for path in copy.rglob("*.so*") if not path.is_symlink()}
        if not any(replaced.values()):
            raise RuntimeError(f"{package}: no cpuid found in {', '.join(replaced)}")


def environment(folder: Path) -> dict[str, str]:
    """Builds in `folder`, which has to stay, what has to be loaded first: this process's environment with it.

    A program that is started with it, and with the features to hide in VARIABLE, does without these.
    """
    library = folder / "hide_cpu_features.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    result = os.environ | {"LD_PRELOAD": str(library)}
    # Asked of the library itself: a kernel may refuse what the processor could.
    if subprocess.run(["true"], env=result | {VARIABLE: ""}, capture_output=True).returncode:
        packages = folder / "packages"
        copy_packages_without_cpuid(packages)
        path = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        result |= {"CLAQ_CPUID_REPLACED": "1", "PYTHONPATH": os.pathsep.join(path)}
    return result


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    features, *command = arguments
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *command], env=environment(Path(folder)) | {VARIABLE: features}
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

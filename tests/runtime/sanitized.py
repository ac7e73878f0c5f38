"""The runtime's whole test suite with libclaq under the sanitizers.

    python tests/runtime/sanitized.py                      # AddressSanitizer and UndefinedBehaviorSanitizer: tests/runtime
    python tests/runtime/sanitized.py --thread             # ThreadSanitizer: what runs on libclaq's own threads
    python tests/runtime/sanitized.py -k validation -x     # with options of pytest

libclaq is built with g++ and the sanitizers, put before the installed claq-runtime on Python's path, and the sanitizer's
library is loaded ahead of everything else. The first report ends the process it happens in, and so fails a test. The two
checks that memory stays flat run by themselves, without the quarantine in which AddressSanitizer keeps what was freed. Left
out:

- leaks, because Python never frees all it has (test_sanitizers.py checks them with a C++ program);
- ``little_memory``: the sanitizer's own tables do not fit under a limit on addresses;
- test_cuda.py and test_dispatch.py, whose fake driver and cpuid have to be loaded ahead of the sanitizer's library;
- test_sanitizers.py itself;
- under ThreadSanitizer the tests that run layers inside of ONNX Runtime: it does not see how those threads wait for one
  another and would report races where there are none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = [
    "--ignore=tests/runtime/test_cuda.py",
    "--ignore=tests/runtime/test_dispatch.py",
    "--ignore=tests/runtime/test_sanitizers.py",
]
_CHECK = "tests/runtime/test_service.py::test_holds[{}]"
_FLAT = [_CHECK.format(name) for name in ("churn", "memory_of_runs")]
_NO_QUARANTINE = "quarantine_size_mb=0:thread_local_quarantine_size_kb=0"


@dataclass(frozen=True)
class Sanitizers:
    """What is built with and loaded, the sanitizers' options, and the runs of pytest: options and arguments of each."""

    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    runs: tuple[tuple[str, list[str]], ...]


ADDRESS = Sanitizers(
    "-fsanitize=address,undefined -fno-sanitize-recover=all",
    ("libasan.so", "libubsan.so"),
    {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"},
    (
        (
            "",
            [
                "tests/runtime",
                *LEFT_OUT,
                *(f"--deselect={name}" for name in (*_FLAT, _CHECK.format("little_memory"))),
            ],
        ),
        (_NO_QUARANTINE, _FLAT),
    ),
)
THREAD = Sanitizers(
    "-fsanitize=thread",
    ("libtsan.so",),
    # PyTorch, numpy and Python are not instrumented: what they do to memory between two calls is none of libclaq's.
    {"TSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:ignore_noninstrumented_modules=1"},
    (
        (
            "",
            [
                *(f"tests/runtime/test_{name}.py" for name in ("kernels", "native", "validation")),
                _CHECK.format("fork_library"),
            ],
        ),
    ),
)


def build(folder: Path, sanitizers: Sanitizers) -> Path:
    """Build libclaq in ``folder``; returns the folder of a package ``claq_runtime`` with it.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    flags = f"{sanitizers.flags} -fno-omit-frame-pointer -g"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake", "-S", ROOT / "runtime", "-B", folder, *generator, "-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCLAQ_OPTIMIZATION=-O0",
    ]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", folder, "--target", "claq"], check=True)
    package = folder / "site" / "claq_runtime"
    shutil.copytree(ROOT / "runtime" / "claq_runtime", package, dirs_exist_ok=True)
    shutil.copy(folder / "libclaq.so", package)
    return package.parent


def paths_of(libraries: tuple[str, ...]) -> str:
    """What to load first: the sanitizers, and the C++ library whose functions they stand before."""
    names = (*libraries, "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout for name in names
    ]
    return " ".join(str(Path(path.strip()).resolve()) for path in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer in the place of the other two")
    parser.add_argument("--build", type=Path, help="where libclaq is built and kept (default: a temporary folder)")
    options, rest = parser.parse_known_args()
    sanitizers = THREAD if options.thread else ADDRESS
    failed = False
    with tempfile.TemporaryDirectory(prefix="claq-sanitized-") as scratch:
        packages = build(options.build or Path(scratch), sanitizers)
        environment = {
            **os.environ,
            **sanitizers.options,
            "LD_PRELOAD": paths_of(sanitizers.libraries),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")])),
            "PYTHONMALLOC": "malloc",
        }
        where = "import claq_runtime, sys; sys.exit(not claq_runtime.library_path().startswith(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", where, str(packages)], check=True, env=environment)
        for more, arguments in sanitizers.runs:
            if more:
                environment["ASAN_OPTIONS"] += f":{more}"
            command = [sys.executable, "-m", "pytest", *arguments, *rest]
            failed = subprocess.run(command, cwd=ROOT, env=environment).returncode != 0 or failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

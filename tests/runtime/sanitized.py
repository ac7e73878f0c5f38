"""The runtime's whole test suite with libclaq under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/runtime/sanitized.py                      # build, then run tests/runtime
    python tests/runtime/sanitized.py -k validation -x     # with options of pytest

libclaq is built with g++ and the sanitizers, put before the installed claq-runtime on Python's path, and the sanitizer's
library is loaded ahead of everything else. The first report ends the process it happens in, and so fails a test. Left out:

- leaks, because Python never frees all it has (test_sanitizers.py checks them with a C++ program);
- ``little_memory``: the sanitizer's own tables do not fit under a limit on addresses;
- test_cuda.py, whose fake driver has to be loaded ahead of the sanitizer's library;
- test_sanitizers.py itself, and ThreadSanitizer, which does not see how ONNX Runtime's threads wait for one another and reports
  races where there are none (the C++ program runs under it).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = [
    "--ignore=tests/runtime/test_cuda.py",
    "--ignore=tests/runtime/test_sanitizers.py",
    "--deselect=tests/runtime/test_service.py::test_holds[little_memory]",
]


def build(folder: Path) -> Path:
    """Build libclaq in ``folder``; returns the folder of a package ``claq_runtime`` with it.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
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


def sanitizer_libraries() -> str:
    """What to load first: the sanitizer, and the C++ library whose functions it stands before."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout for name in names
    ]
    return " ".join(str(Path(path.strip()).resolve()) for path in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="where libclaq is built and kept (default: a temporary folder)")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="claq-sanitized-") as scratch:
        packages = build(options.build or Path(scratch))
        environment = {
            **os.environ,
            "LD_PRELOAD": sanitizer_libraries(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")])),
            "PYTHONMALLOC": "malloc",
        }
        where = "import claq_runtime, sys; sys.exit(not claq_runtime.library_path().startswith(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", where, str(packages)], check=True, env=environment)
        command = [sys.executable, "-m", "pytest", "tests/runtime", *LEFT_OUT, *rest]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

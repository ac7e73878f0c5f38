"""Coverage-guided fuzzing of everything that reads foreign bytes: one command for CI and for long campaigns.

    python fuzz/run.py                              # every target for 5 seconds
    python fuzz/run.py --runs 1000000               # the campaign behind docs/security.md
    python fuzz/run.py layer native --runs 1000000  # some targets
    python fuzz/run.py --seeds                      # write the seed corpus anew

Python readers run under atheris (``pip install atheris``), libclaq under clang's libFuzzer with AddressSanitizer and
UndefinedBehaviorSanitizer. A target whose tool is absent is skipped, and the reason printed. What the fuzzer learns is
kept in ``--corpus`` (a temporary folder by default); inputs that crash go to ``fuzz/findings``. Exit status 1: findings.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON_TARGETS = ("safetensors", "checkpoint", "layer", "onnx", "paths", "calibration", "index", "config", "arrays")
NATIVE = "native"
TARGETS = (*PYTHON_TARGETS, NATIVE)

MEMORY_LIMIT_MB = 2048
SLOWEST_SECONDS = 20


def _clang() -> str | None:
    """The newest clang++ that knows every CPU feature libclaq asks for (version 18 and later)."""
    for name in (*(f"clang++-{version}" for version in range(30, 17, -1)), "clang++"):
        path = shutil.which(name)
        if path is not None:
            version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
            if int(version.split(".")[0] or 0) >= 18:
                return path
    return None


def build_native(build: Path) -> Path:
    """Compile libclaq and its target with clang and the sanitizers; returns the program."""
    flags = "-fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    configure = [
        "cmake", "-S", ROOT / "runtime", "-B", build, f"-DCLAQ_CHECK={HERE / 'targets' / 'fuzz_layer.cpp'}",
        f"-DCMAKE_CXX_COMPILER={_clang()}", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_EXE_LINKER_FLAGS=-fsanitize=fuzzer",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCLAQ_OPTIMIZATION=-O1", "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", build, "--target", "claq_check"]):
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"libclaq cannot be built with clang:\n{(result.stdout + result.stderr)[-3000:]}")
    return build / "claq_check"


def missing_tool(target: str) -> str:
    """Why a target cannot run here, or empty."""
    if target == NATIVE:
        absent = [
            name for name, path in (("clang++ 18 or newer", _clang()), ("cmake", shutil.which("cmake"))) if not path
        ]
        return f"needs {' and '.join(absent)}" if absent else ""
    return "" if importlib.util.find_spec("atheris") else "needs atheris: pip install atheris"


def write_seeds() -> None:
    """Write the committed seed corpus."""
    sys.path[:0] = [str(ROOT), str(HERE / "targets")]
    import readers

    inputs = readers.seeds() | {NATIVE: [bytes([m, 7, 40, 9, 1, 0]) + bytes(80) for m in (0, 1, 2, 4, 6, 8, 16, 32)]}
    for name, contents in inputs.items():
        folder = HERE / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(contents):
            (folder / f"seed-{number}").write_bytes(content)


def run(target: str, program: list[str], limits: list[str], corpus: Path) -> dict[str, object]:
    """Run one target; executions, coverage, and the names of what it found."""
    findings = HERE / "findings" / target
    findings.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    command = [
        *program, *limits, "-print_final_stats=1", f"-artifact_prefix={findings}{os.sep}",
        f"-rss_limit_mb={MEMORY_LIMIT_MB}", "-max_len=4096", str(corpus),
        str(HERE / "corpus" / target),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    seconds = time.perf_counter() - start
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", result.stderr)
    done = re.findall(r"^#(\d+)\s", result.stderr, re.M)
    coverage = re.findall(r"cov: (\d+)", result.stderr)
    # A slow unit is told by the fuzzer of a stalled machine too; one that hangs is a timeout.
    found = sorted(path.name for path in set(findings.iterdir()) - before if not path.name.startswith("slow-unit"))
    if result.returncode and not found:
        print(result.stdout[-2000:], result.stderr[-4000:], file=sys.stderr)
        found = [f"exit status {result.returncode}"]
    elif found:
        print(result.stderr[-6000:], file=sys.stderr)
    return {
        "target": target,
        "executions": int(executed[1]) if executed else int(done[-1]) if done else 0,
        "seconds": seconds,
        "coverage": int(coverage[-1]) if coverage else 0,
        "findings": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--seconds", type=int, default=5, help="of each target, if --runs is not given (default: 5)")
    parser.add_argument(
        "--slowest",
        type=int,
        default=SLOWEST_SECONDS,
        help=f"seconds by the clock that an input may take (default: {SLOWEST_SECONDS}); more where the fuzzer has to wait for "
        "a processor, which it takes for a hang",
    )
    parser.add_argument("--corpus", type=Path, help="where what the fuzzer learns is kept")
    parser.add_argument("--build", type=Path, help="where libclaq is built with the sanitizers")
    parser.add_argument("--seeds", action="store_true", help="write the seed corpus and stop")
    options = parser.parse_args()
    if options.seeds:
        write_seeds()
        return 0
    failed = False
    with tempfile.TemporaryDirectory(prefix="claq-fuzz-") as scratch:
        print("| target | executions | seconds | coverage | findings |\n|---|---|---|---|---|")
        for target in options.targets or TARGETS:
            reason = missing_tool(target)
            if reason:
                print(f"| {target} | skipped: {reason} | | | |", flush=True)
                continue
            if target == NATIVE:
                program = [str(build_native(options.build or Path(scratch) / "build"))]
            else:
                program = [sys.executable, str(HERE / "targets" / "fuzz_python.py"), target]
            limits = [f"-runs={options.runs}"] if options.runs else [f"-max_total_time={options.seconds}"]
            limits.append(f"-timeout={options.slowest}")
            found = run(target, program, limits, (options.corpus or Path(scratch)) / target)
            names = ", ".join(found["findings"]) or "none"  # type: ignore[arg-type]
            print(
                f"| {target} | {found['executions']:,} | {found['seconds']:.0f} | {found['coverage']} | {names} |",
                flush=True,
            )
            failed = failed or bool(found["findings"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""libclaq and a C++ test program, compiled with sanitizers and run; also cross-compiled for AArch64 where that works here."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "runtime"


def configure_and_build(build: Path, *options: str) -> Path:
    """Builds libclaq with the test program; returns the program."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(
        [
            "cmake",
            "-S",
            RUNTIME,
            "-B",
            build,
            *generator,
            f"-DCLAQ_CHECK={ROOT / 'tests/runtime/claq_check.cpp'}",
            *options,
        ],
        check=True,
        capture_output=True,
    )
    result = subprocess.run(["cmake", "--build", build, "--target", "claq_check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return build / "claq_check"


def run(*command: object, **variables: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | variables, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"
)


# Compiling takes most of the time here. The checks are the same when each of AddressSanitizer's is a call, and when a function
# is a function: what the kernels have inlined with `always_inline` (the compiler's own headers write it otherwise) would be
# compiled, and checked, once for every call. A local variable that outlives such a function is then one of a stack that was left.
QUICKLY = "--param asan-instrumentation-with-call-threshold=0 -Dalways_inline=unused"


def check_with(sanitizers: str, build: Path, *options: str) -> str:
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer {QUICKLY}"
    program = configure_and_build(
        build,
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_CXX_FLAGS_DEBUG=-g1",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCLAQ_OPTIMIZATION=-O0",
        *options,
    )
    return run(program, ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1", TSAN_OPTIONS="halt_on_error=1")


@needs_cmake
@pytest.mark.slow
def test_address_and_undefined_behaviour(tmp_path):
    """On x86-64 with AVX-512 and AMX as plain C++, so that their kernels run on any CPU and every access is seen."""
    if platform.machine() not in ("x86_64", "AMD64"):
        check_with("address,undefined", tmp_path)
        return
    emulated = f"-DCLAQ_EMULATED_AVX512={ROOT / 'tests/runtime/emulated_avx512'}"
    checked = check_with("address,undefined", tmp_path, emulated)
    assert "avx512amx avx512vnni avx512bwvnni avx512bw " in checked  # whatever this processor has besides
    assert "portable: 0 failures" in checked


@needs_cmake
@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CLAQ_THREAD_SANITIZER"), reason="a second build: set CLAQ_THREAD_SANITIZER=1 for it"
)
def test_threads(tmp_path):
    check_with("thread", tmp_path)


CROSS = {"compiler": "aarch64-linux-gnu-g++", "emulator": "qemu-aarch64"}


@needs_cmake
@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in CROSS.values()), reason=f"needs {' and '.join(CROSS.values())}"
)
def test_neon_under_emulation(tmp_path):
    program = configure_and_build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS['compiler']}",
    )
    assert "neon portable" in run(CROSS["emulator"], "-L", "/usr/aarch64-linux-gnu", program)

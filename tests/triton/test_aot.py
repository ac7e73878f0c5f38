"""Kernels compiled ahead of time, without a GPU: budgets of instructions and registers, packages, reproducible bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install claq-export[gpu])", allow_module_level=True)

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "gpu_instructions.json").read_text())

# Instructions a weight at which a GPU with these arithmetic units still reads codes at full memory speed, roughly.
CEILINGS = {
    "gemv_w2_v1_r1": 2.0,
    "gemv_w3_v1_r1": 3.0,
    "gemv_w4_v1_r1": 3.5,
    "gemm_w2_v1_m16": 3.0,
    "gemm_w4_v1_m16": 4.5,
}

COUNTER = """
import json, sys
from claq_export.kernels.aot.compile import compile_variant
from claq_export.kernels.aot.sass import main_loop, resources
from claq_export.kernels.aot.variants import variants
found = {}
for target in (80, 90):
    for variant in variants(target):
        if variant.name in sys.argv[1:]:
            kernel = compile_variant(variant, target)
            found[f"sm_{target} {variant.name}"] = (
                len(main_loop(kernel.cubin)) / kernel.weights, resources(kernel.cubin).stack
            )
print(json.dumps(found))
"""

# At run time Triton makes a constant of every integer argument that is 1, also where the source expects a tensor.
ONES = """
import dataclasses, sys
from claq_export.kernels.aot.compile import compile_variant
from claq_export.kernels.aot.variants import variants
for variant in variants(80):
    if variant.name in sys.argv[1:]:
        integers = {name for name, kind in variant.signature.items() if kind == "i32"}
        rest = {name: kind for name, kind in variant.signature.items() if name not in integers}
        constants = {**variant.constants, **dict.fromkeys(integers, 1)}
        compile_variant(dataclasses.replace(variant, signature=rest, constants=constants, multiples=()), 80)
        print(variant.name)
"""


def _run(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[float, int]]:
    done = _run("-c", COUNTER, *CEILINGS)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", list(CEILINGS))
def test_instructions_per_weight_and_spills_stay_within_budget(
    counts: dict[str, tuple[float, int]], kernel: str, target: str
) -> None:
    import triton

    instructions, spilled = counts[f"{target} {kernel}"]
    assert instructions <= CEILINGS[kernel]
    assert spilled <= 16
    if triton.__version__ == RECORD["triton"]:
        recorded = RECORD["targets"][target][kernel]
        assert instructions <= recorded["instructions_per_weight"] * 1.05
        assert spilled <= recorded["spilled_bytes"]


@pytest.mark.slow
def test_kernels_compile_when_every_integer_is_one() -> None:
    names = [
        "gemv_w2_v1_r1",
        "gemm_w2_v1_m16",
        "quantize_fp32_u16_o1",
        "scale_fp16_i32_o1_c4096",
        "scale_bf16_u16_o0_c0",
        "finish_fp16_u16_m1",
        "finish_bf16_i32_m16",
        "dequantize_w3_fp16_u16",
        "outliers_fp16_u16",
        "gather_bf16_u16_i64",
    ]
    done = _run("-c", ONES, *names)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == sorted(names)


@pytest.mark.slow
def test_two_builds_give_the_same_bytes_and_packages_read_back(tmp_path: Path) -> None:
    from claq_export.kernels.aot.package import read_package

    for name in ("one", "two"):
        done = _run(
            "-m", "claq_export.kernels.aot", "--targets", "sm_80,sm_90", "--only", "gemv_w2_v1_r1", "--jobs", "1",
            "--out", str(tmp_path / name), cache=tmp_path / f"cache-{name}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["claq_ptx80.kernels", "claq_sm80.kernels", "claq_sm90.kernels", "manifest.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())["packages"]
    for name in files[:3]:
        kernel = read_package(tmp_path / "one" / name)["gemv_w2_v1_r1"]
        assert kernel["entry"] == "claq_gemv"
        assert kernel["parameters"] == "pppppiiiiii"
        assert kernel["tile"] == (256, 1, 4)
        assert kernel["num_warps"] == 4
        assert kernel["shared"] == manifest[name]["kernels"]["gemv_w2_v1_r1"]["shared"]
        text = kernel["image"]
        assert text.startswith(b"\x7fELF") != kernel["ptx"]
        assert str(ROOT).encode() not in text


def test_damaged_package_is_refused(tmp_path: Path) -> None:
    from claq_export.kernels.aot.compile import CompiledKernel
    from claq_export.kernels.aot.package import read_package, write_package

    kernel = CompiledKernel(
        "k", 80, "entry", 4, 0, (("a_ptr", "*i32"), ("N", "i32")), (1, 2, 3), 0.0, 4, 8, b"image", "ptx"
    )
    path = tmp_path / "claq_sm80.kernels"
    write_package([kernel], path)
    assert read_package(path)["k"]["parameters"] == "pi"
    assert (read_package(path)["k"]["most_vectors"], read_package(path)["k"]["programs"]) == (4, 8)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="image of k is damaged"):
        read_package(path)
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="truncated"):
        read_package(path)
    path.write_bytes(b"something else, long enough to hold a header")
    with pytest.raises(ValueError, match="not a package"):
        read_package(path)


def test_unknown_target_and_kernel_are_named() -> None:
    bad = _run("-m", "claq_export.kernels.aot", "--targets", "sm_75")
    assert bad.returncode == 2
    assert "sm_75" in bad.stderr
    none = _run("-m", "claq_export.kernels.aot", "--targets", "sm_80", "--only", "gemx")
    assert none.returncode == 2
    assert "gemx" in none.stderr

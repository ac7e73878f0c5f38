"""The GPU layers of libclaq without a GPU: a fake driver takes the launches and Triton's interpreter runs them.

What the host code does (which kernels, grids, parameters, workspace, packages, messages) is the real thing; the machine
code of the kernels is not run here (``benchmarks/gpu/run_all.py`` does that on a GPU).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import problem

import claq_runtime

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "cuda"
BOUNDS = {"float32": 3e-7, "bfloat16": 8e-3}  # the interpreter truncates to bfloat16
FLOAT16_BOUND = 6e-4
# source, library, further options
BUILT: list[tuple[str, str, list[str]]] = [
    ("fake_driver.cpp", "libcuda.so.1", []),
    ("fake_driver.cpp", "older/libcuda.so.1", ["-DBEFORE_CUDA_12"]),
    ("fake_cublas.cpp", "libcublas.so.12", []),
    ("fake_cublas.cpp", "libcublas.so.11", []),
    ("count_reads.cpp", "count_reads.so", []),
    ("fake_ort.cpp", "fake_ort.so", []),
    ("fake_ort.cpp", "second_ort.so", []),
    ("pretend_cuda.cpp", "pretend_cuda.so", []),
]
PROVIDER = "libonnxruntime_providers_cuda.so"

if (reason := problem()) is not None:
    pytest.skip(reason, allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("no g++ to build the fake driver", allow_module_level=True)


def _rows(table: str) -> list[str]:
    """Lines of one of the program's tables."""
    source = (FOLDER / "emulated.py").read_text()
    start = source.index(f"{table}: ")
    return [line for line in source[start : source.index("\n]\n", start)].splitlines()[1:] if '"' in line]


def _cases() -> list[tuple[str, str, str]]:
    """Name, dtype and expected kernels of each product."""
    return [(row.split('"')[1], row.split("torch.")[1].split(",")[0], row.split('"')[3]) for row in _rows("CASES")]


def _names(table: str) -> list[str]:
    return [row.split('"')[1] for row in _rows(table)]


def _launches() -> list[tuple[str, str]]:
    """Kernel and field of each record that is damaged."""
    return [(row.split('"')[1], row.split('"')[3]) for row in _rows("LAUNCHES")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "older").mkdir()
    compiler = ["g++", "-shared", "-fPIC", "-O1"]
    for source, name, options in BUILT:
        soname = f"-Wl,-soname,{Path(name).name}"
        subprocess.run([*compiler, soname, *options, str(FOLDER / source), "-o", str(folder / name)], check=True)
    # The provider carries no name of its own, but that of its file.
    needs = ["-Wl,--no-as-needed", str(folder / "libcublas.so.11"), f"-Wl,-rpath,{folder}"]
    subprocess.run([*compiler, str(FOLDER / "fake_provider.cpp"), *needs, "-o", str(folder / PROVIDER)], check=True)
    return folder


def _run(program: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
            **environment,
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(built: Path) -> dict[str, Any]:
    preloaded = str(built / "count_reads.so")
    return _run("emulated.py", claq_runtime.library_path(), str(built), LD_PRELOAD=preloaded)


@pytest.mark.parametrize(("name", "dtype", "kernels"), _cases(), ids=lambda value: value if "-" in value else None)
def test_a_layer_is_computed(results: dict[str, Any], name: str, dtype: str, kernels: str) -> None:
    assert results[name]["kernels"] == kernels
    assert results[name]["error"] <= BOUNDS.get(dtype, FLOAT16_BOUND)
    assert results[name]["inside"]
    assert results[name]["waits"] == 0


def test_cublas_sums_float32_without_tf32(results: dict[str, Any]) -> None:
    compute_32f, compute_32f_pedantic = 68, 69  # cublasComputeType_t
    assert results["dense-float32"]["compute"] == compute_32f_pedantic
    assert results["dense"]["compute"] == results["dense-mixed"]["compute"] == compute_32f
    assert results["many-without-cublas"]["compute"] == 0


@pytest.mark.parametrize("name", _names("LOOKUPS"))
def test_rows_are_looked_up(results: dict[str, Any], name: str) -> None:
    assert results[name] == {"equal": True, "unknown_are_nan": True, "kernels": "gather", "inside": True}


def test_nodes_of_the_cuda_provider_are_made_run_and_destroyed(results: dict[str, Any]) -> None:
    found = results["nodes"]
    activations, widths, products, ids = 3, 2 * 2, 6, 2
    assert found["operators"] == activations * widths * (products + ids)
    assert (found["ClaqMatMul message"], found["ClaqGather message"]) == ("", "")
    assert found["ClaqMatMul error"] <= BOUNDS["float32"]
    assert found["ClaqGather equal"]
    assert found["kernels"] == "quantize gemv finish gather"
    for operator in ("ClaqMatMul", "ClaqGather"):
        message = f"{operator} node 'the node': order: element 0 is 99, expected 0 to 70 (the last means padding)"
        assert found[f"damaged {operator}"] == message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("ClaqMatMulAdd", "add"),
        ("ClaqMatMulAddNorm", "addnorm"),
        ("ClaqMatMulSwiGLU", "swiglu"),
        ("ClaqMatMulSplit", "take"),
        ("ClaqMatMulRotary", "take"),
        ("ClaqMatMulSplit of two", "take"),
    ],
)
def test_fused_nodes(results: dict[str, Any], dtype: str, operator: str, kernel: str) -> None:
    found = results["nodes"]["fused"][dtype][operator]
    assert found["message"] == ""
    assert found["kernels"].split()[-1] == kernel
    assert ("turn" in found["kernels"].split()) == (operator == "ClaqMatMulRotary")
    # The product and what is made of it are rounded, one after the other.
    assert found["error"] <= 2 * BOUNDS.get(dtype, FLOAT16_BOUND)


def test_fused_nodes_say_what_does_not_fit(results: dict[str, Any]) -> None:
    found = results["nodes"]["fused"]["float32"]
    assert found["odd message"].endswith("out_features: is 5, expected an even number")
    assert found["wide message"].endswith("cos: the last dimension is 3, expected rotary_dim / 2 = 2")
    assert found["short message"].endswith("split_2: is 0, expected parts of out_features = 2080")


@pytest.mark.parametrize("case", ["many sessions", "many threads"])
def test_a_package_is_read_once(results: dict[str, Any], case: str) -> None:
    assert results["reads"][case] == 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no context", "no CUDA context"),
        ("no package", "no kernels for this GPU (compute capability 8.0)"),
        ("empty package", "is not a package of claq kernels"),
        ("another file", "is not a package of claq kernels"),
        ("truncated package", "is truncated"),
        ("record without end", "a text of a record has no end"),
        ("damaged image", "its image is damaged"),
        ("no such entry", "cuModuleGetFunction"),
        ("no memory", "cuMemAlloc"),
        ("old GPU", "compute capability 7.5"),
        ("no GPU", "sees no GPU"),
    ],
)
def test_what_is_missing_is_said(results: dict[str, Any], case: str, message: str) -> None:
    unavailable = 4
    assert results["refusals"][case][0] == unavailable
    assert message in results["refusals"][case][1]


@pytest.mark.parametrize(("name", "field"), _launches(), ids=lambda value: value.replace("[", " ").rstrip("]"))
def test_a_package_whose_launches_cannot_be_is_refused(results: dict[str, Any], name: str, field: str) -> None:
    unavailable = 4
    status, message, made, modules = results["refusals"][f"{name} {field}"]
    assert (status, made, modules) == (unavailable, False, 0)
    assert f"{name}: {field} is " in message
    assert "expected at least " in message


def test_a_module_whose_kernel_is_not_found_is_unloaded(results: dict[str, Any]) -> None:
    *_, modules = results["refusals"]["no such entry"]
    assert modules == 0


def test_a_handle_of_a_cublas_that_is_not_loaded_takes_another_kernel(results: dict[str, Any]) -> None:
    found = results["handle without cuBLAS"]
    assert found["inside"]
    assert found["error"] < 2e-3
    assert found["kernels"] == "scale gemm finish"  # and the cases above use the cuBLAS that was loaded later


def test_the_driver_is_not_started_without_kernels(results: dict[str, Any]) -> None:
    unavailable = 4
    status, message, started = results["no kernels"]
    assert (status, started) == (unavailable, 0)
    assert message.startswith("no kernels for GPUs in ")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("order out of range", "order: element 0 is 65"),
        ("codes too short", "codes: shape is [7, 32]"),
        ("bias of another type", "bias: on a GPU its type must be that of x"),
        ("unaligned", "bias: its memory is not aligned"),
    ],
)
def test_a_damaged_layer_is_named(results: dict[str, Any], case: str, message: str) -> None:
    invalid_layer = 1
    assert results["refusals"][case] == [invalid_layer, results["refusals"][case][1], False]
    assert message in results["refusals"][case][1]


def test_kernels_of_an_older_chip_serve_a_newer_one_of_its_generation(results: dict[str, Any]) -> None:
    assert results["refusals"]["good"][:3] == [0, "", True]
    assert results["refusals"]["fits a later chip"][0] == 0
    assert "claq_sm80.kernels" in results["refusals"]["fits a later chip"][1]


def test_an_onnx_runtime_without_the_cuda_provider_does_not_start_the_driver(results: dict[str, Any]) -> None:
    assert results["no provider"]["started"] == 0
    assert results["no provider"]["error"] <= 1e-6


def test_sessions_on_the_cpu_do_not_mind_the_operators_for_gpus(results: dict[str, Any]) -> None:
    assert results["provider"]["error"] <= 1e-6


def test_a_second_onnx_runtime_is_called_by_its_own_table(results: dict[str, Any]) -> None:
    found = results["two hosts"]
    assert found["operators"] == results["nodes"]["operators"]
    assert found["message"] == ""
    first, second = found["calls"]
    assert (first, second > 0) == (0, True)


def test_layers_outlive_the_thread_s_context(results: dict[str, Any]) -> None:
    found = results["contexts"]
    assert found["waited for the weights"]
    assert (found["allocated"], found["kept"]) == (True, 0)
    assert found["context of the thread"] == 0
    assert found["context after one that is gone"] == 31


def test_a_context_where_another_was_gets_its_own_kernels(results: dict[str, Any]) -> None:
    first, again, renewed = results["contexts"]["kernels loaded"]
    assert first > 0
    assert again == 0
    assert renewed == first


def test_of_several_cublas_none_is_used(built: Path) -> None:
    found = _run("loaded_blas.py", "several", claq_runtime.library_path(), str(built))
    assert found["kernels"] == "scale gemm finish"
    assert found["calls"] == [0, 0]
    assert found["sizes"][0] == found["sizes"][1]


def test_the_cublas_of_the_provider_is_used(built: Path) -> None:
    found = _run("loaded_blas.py", "provider", claq_runtime.library_path(), str(built))
    own, other = found["calls"]
    assert found["kernels"] == "finish dequantize"
    assert (own > 0, other) == (True, 0)


def test_a_cublas_that_is_loaded_after_the_workspace_was_sized_finds_room(built: Path) -> None:
    found = _run("loaded_blas.py", "later", claq_runtime.library_path(), str(built))
    without, needed, reserved = found["sizes"]
    assert found["kernels"] == "finish dequantize"
    assert without < needed <= reserved
    assert found["stays"] == [needed, "finish dequantize"]
    assert found["new"] == "scale gemm finish"


def _follow(launches: dict[str, Any], total: int) -> bool:
    """Whether several launches take every row once, one after the other."""
    begins = [sum(launches["rows"][:launch]) for launch in range(len(launches["rows"]))]
    return len(begins) > 1 and launches["begin"] == begins and sum(launches["rows"]) == total


def test_the_bias_of_more_rows_than_a_grid_has_room_for(built: Path) -> None:
    found = _run("many_rows.py", "dense", claq_runtime.library_path(), str(built))
    assert found["error"] <= FLOAT16_BOUND
    assert _follow(found["finish"], found["total"])


def test_more_rows_than_a_grid_has_room_for_without_cublas(built: Path) -> None:
    found = _run("many_rows.py", "tens", claq_runtime.library_path(), str(built))
    assert _follow(found["finish"], found["total"])
    assert _follow(found["scale"], found["total"])
    assert found["gemm rows"] == found["scale"]["rows"]


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a CUDA driver")
def test_without_a_driver_the_reason_is_given() -> None:
    assert claq_runtime.cuda() == (False, "no CUDA driver: libcuda.so.1 cannot be loaded")

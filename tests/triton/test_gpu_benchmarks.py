"""What of benchmarks/gpu can be tried without a GPU: goals, tiles, pieces of wheels, and the way through all of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_interpreter import problem

from claq_export.emit.function import PRODUCTS
from claq_export.kernels.triton.dispatch import dispatch_for

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the benchmarks can import one another; none of them stays imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load(name: str) -> Any:
    """A module of the benchmarks; the fixture ``neighbours`` lets it import others."""
    spec = spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def row(bits: str, vectors: int, us: float, cublas: float, shape: tuple[int, int] = (4096, 11008)) -> dict[str, Any]:
    """A measured row; the copy bandwidth is such that 10 us are 60 percent of it."""
    return {
        "shape": shape,
        "mix": bits,
        "outliers": 0.0,
        "vectors": vectors,
        "graph_us": us,
        "cublas_bf16_us": cublas,
        "copy_bandwidth_percent": 600 / us,
    }


def test_goals_are_decided_by_the_worst_shape() -> None:
    module = load("goals")
    rows = [
        row("4", 1, 10.0, 30.0),
        row("4", 1, 12.0, 40.0, (8192, 28672)),
        row("4", 1, 500.0, 1.0, (64, 64)),  # smaller than the goals are meant for
        row("4", 16, 14.0, 30.0),
        row("4", 512, 110.0, 100.0),
        {"shape": (4096, 11008), "mix": "3", "outliers": 0.0, "skipped": "out of time"},
    ]
    found = {goal["goal"]: goal for goal in module.goals(rows, 4096 * 11008)}
    share = found["4 bits, M = 1: percent of copy bandwidth"]
    assert (share["value"], share["met"]) == (50.0, False)
    assert found["4 bits, M = 1: times as fast as cuBLAS bf16"]["met"]
    assert found["4 bits: M = 16 as a multiple of M = 1"]["met"]
    assert found["4 bits: M >= 512 as a multiple of cuBLAS bf16"]["met"]
    assert found["3 bits, M = 1: percent of copy bandwidth"]["met"] is None
    assert len(found) == 11


def test_fastest_tiles_go_into_the_table_of_their_generation(tmp_path: Path) -> None:
    module = load("tiles")
    base = dispatch_for(9, 0)
    path = tmp_path / "dispatch.json"
    path.write_text(module.DISPATCH.read_text())

    def timed(vectors: int, times: dict[int, list[float | str]], make: Any) -> list[dict[str, Any]]:
        return [
            {"mix": str(mix), "vectors": vectors, "tile": make(programs), "us": us}
            for programs, all_times in times.items()
            for mix, us in enumerate(all_times)
        ]

    gemv = lambda programs: {"max_vectors": 9, "lanes": 32, "warps": 8, "unroll": 2, "programs": programs}  # noqa: E731
    gemm = lambda programs: {  # noqa: E731
        "max_vectors": 1 << 30, "vectors": 32, "lanes": 64, "blocks": 4, "warps": 4, "stages": 2, "programs": programs,
    }  # fmt: skip
    tuning = timed(1, {4: [9.0, 9.0], 8: [8.0, 9.0], 16: [1.0, "too many registers"]}, gemv)
    module.write_dispatch(tuning, (9, 0), "measured there", path)
    entry = json.loads(path.read_text())["generations"]["9.0"]
    assert entry["gemv"] == {**gemv(8), "max_vectors": base.gemv.max_vectors}
    assert len(entry["gemm"]) == len(base.gemm)  # nothing was timed for those
    assert entry["source"] == "measured there"
    tuning += timed(16, {1: [5.0], 2: [4.0]}, gemm) + timed(128, {1: [5.0], 2: [6.0]}, gemm)
    module.write_dispatch(tuning, (9, 0), "again", path)
    entry = json.loads(path.read_text())["generations"]["9.0"]
    assert [(tile["max_vectors"], tile["programs"]) for tile in entry["gemm"]] == [(16, 2), (128, 1)]
    assert (
        json.loads(path.read_text())["generations"]["9"] == json.loads(module.DISPATCH.read_text())["generations"]["9"]
    )


def test_a_wheel_travels_in_pieces(tmp_path: Path) -> None:
    module = load("wheel_pieces")
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    data = bytes(range(256)) * 1000
    wheel.write_bytes(data)
    pieces = module.split(wheel, tmp_path / "pieces", megabytes=0.1)
    assert [path.name[-5:] for path in pieces] == ["hl.00", "hl.01", "hl.02", ".json"]
    assert max(path.stat().st_size for path in pieces) <= 100_000
    assert [path.read_bytes() for path in module.join(tmp_path / "pieces", tmp_path / "out")] == [data]
    pieces[1].write_bytes(data[:100_000])
    with pytest.raises(module.PiecesError, match="are damaged"):
        module.join(tmp_path / "pieces", tmp_path / "again")
    pieces[1].unlink()
    with pytest.raises(module.PiecesError, match=r"whl.01 is missing; some-1.0-py3-none-any.whl has 3 pieces"):
        module.join(tmp_path / "pieces", tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.whl"))
    with pytest.raises(module.PiecesError, match="holds no pieces"):
        module.join(tmp_path / "out", tmp_path / "again")


def test_no_cache_holds_the_weights_that_are_gone_through() -> None:
    module = load("machine")
    h200, gigabyte = 60 << 20, 1 << 30
    assert module.rotation_of(h200, 139 * gigabyte) == 512 << 20
    assert module.rotation_of(300 << 20, 139 * gigabyte) == 900 << 20
    assert module.rotation_of(h200, 2 * gigabyte) == gigabyte // 4  # what is free is not used up
    sizes = dataclasses.replace(module.REAL, rotation=module.rotation_of(h200, 139 * gigabyte))
    weight = 4096 * 11008 // 4
    assert sizes.copies(weight) * weight >= 3 * h200
    assert sizes.copies(gigabyte) == 2


def test_settings_of_products_are_restored() -> None:
    module = load("machine")
    settings = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(settings, name) for name in names]
    inside: list[bool] = []

    def fail() -> None:
        with module.exact_products():
            inside.extend(getattr(settings, name) for name in names)
            raise ValueError("a failed check")

    with pytest.raises(ValueError, match="a failed check"):
        fail()
    assert inside == [False] * 3
    assert [getattr(settings, name) for name in names] == before


def test_calls_are_timed_in_turns() -> None:
    machine = object.__new__(load("machine").Machine)  # without the interpreter that a dry run turns on
    machine.dry = True
    calls: list[str] = []
    machine.device = "cpu"
    times = machine.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, graph=False)
    assert calls == ["a", "b", "a", "b"]
    assert set(times) == {"a", "b"}


@pytest.mark.usefixtures("neighbours")
def test_a_failed_finding_takes_no_other_along() -> None:
    module = load("findings")
    found: list[dict[str, Any]] = []

    def fell_back() -> tuple[float, float]:
        warnings.warn(f"{module.FELL_BACK} for some kind: it differs", RuntimeWarning, stacklevel=2)
        return 0.0, 0.0

    def broken() -> tuple[float, float]:
        raise RuntimeError("illegal\naddress")

    def absent() -> tuple[float, float]:
        raise module.NotHere("no graphs")

    findings = {
        "right": lambda: (1e-4, 1e-3),
        "wrong": lambda: (float("nan"), 1e-3),
        "fell back": fell_back,
        "broken": broken,
        "absent": absent,
    }
    module.find(findings.items(), found.append, time.monotonic() + 60, lambda: True)
    assert [entry.get("passed") for entry in found] == [True, False, False, False, None]
    assert found[2]["failure"] == "a CUDA kernel of claq is not used for some kind: it differs"
    assert found[3]["failure"] == "RuntimeError: illegal address"
    assert found[4] == {"what": "absent", "skipped": "no graphs"}
    found.clear()
    module.find(findings.items(), found.append, time.monotonic() - 1, lambda: True)
    assert [entry["skipped"] for entry in found] == ["out of time"] * 5
    found.clear()
    module.find(findings.items(), found.append, time.monotonic() + 60, lambda: False)
    assert found[3]["failure"] == "RuntimeError: illegal address"
    assert found[4] == {"what": "absent", "skipped": "the GPU was lost to a finding before"}


WORK = """
import os, time

def count(number, report):
    for value in range(3):
        report({"number": number, "value": value})
    if number == 1:
        os.abort()
    while number == 2:
        time.sleep(1)
"""


@pytest.mark.usefixtures("neighbours")
def test_a_process_that_dies_or_hangs_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work_of_children.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    in_children, work = import_module("children").in_children, import_module("work_of_children").count
    found: list[dict[str, Any]] = []
    in_children(work, [0, 1], 60, found.append)
    assert [[f["value"] for f in found if f.get("number") == n] for n in (0, 1)] == [[0, 1, 2]] * 2
    assert [f for f in found if "number" not in f] == [
        {"what": "process 2 of 2 did not end: exit status -6", "passed": False, "failure": "exit status -6"}
    ]
    found.clear()
    in_children(work, [2], 20, found.append)
    assert [f["value"] for f in found[:-1]] == [0, 1, 2]
    assert found[-1]["failure"] == "it took longer than 20 s"


@pytest.mark.usefixtures("neighbours")
def test_float32_may_round_as_other_products_do() -> None:
    module = load("layers")
    x, dense = torch.randn(4, 4096), torch.randn(50, 4096).double()
    assert module.bound_of(x.half(), dense) == module.BOUNDS[torch.float16]
    assert module.bound_of(x[:, :1], dense[:, :1]) == module.BOUNDS[torch.float32]
    own = module.share(x @ dense.float().T, x.double() @ dense.T)
    assert module.bound_of(x, dense) == max(module.BOUNDS[torch.float32], 2 * own)


def test_the_backend_is_found_where_claq_is_not_installed() -> None:
    """Entry points are those of installed distributions; on a GPU machine there is only the folder."""
    program = f"""
import importlib.metadata, sys
found = importlib.metadata.entry_points
none = importlib.metadata.EntryPoints(())
importlib.metadata.entry_points = lambda **kinds: none if kinds.get("group") == "torch_dynamo_backends" else found(**kinds)
sys.path[:0] = [{str(ROOT)!r}, {str(FOLDER)!r}]
import torch
assert "claq" not in torch._dynamo.list_backends(exclude_tags=())
import models
models.register_backend()
models.register_backend()
model = torch.nn.Linear(64, 128)
run = torch.compile(model, backend="claq", options={{"calibration": "none", "fallback": "eager"}})
with torch.no_grad():
    print(bool((run(x := torch.ones(2, 64)) != model(x)).any()))
"""
    done = run("-c", program)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr[-3000:]


@pytest.mark.usefixtures("neighbours")
def test_bandwidth_is_a_share_of_the_faster_copy() -> None:
    module = load("run_all")
    rows = [{"bytes": 1000, "graph_us": 10.0}, {"skipped": "out of time"}]
    module.set_shares({"copies": {"beginning": 1e8, "end": 2e8}, "timings": rows})
    assert rows[0]["copy_bandwidth_percent"] == pytest.approx(50)
    assert "copy_bandwidth_percent" not in rows[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.skipif(problem() is not None, reason=str(problem()))
def test_everything_is_gone_through_in_a_dry_run(tmp_path: Path) -> None:
    done = run(str(FOLDER / "run_all.py"), "--dry-run", "--tune", "--minutes", "60", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert len(result["checks"]) == 5
    assert all(check["passed"] for check in result["checks"])
    reached = [finding for finding in result["operators"] if "skipped" not in finding]
    assert len(reached) == 3 * 2 * 2 * 2 + 3 + 2 + 3
    assert all(finding["passed"] for finding in reached)
    left = [finding["skipped"] for finding in result["operators"] if "skipped" in finding]
    assert left == ["a dry run has no CUDA graphs"] * 3
    assert set(result["copies"]) == {"beginning", "end"}
    assert [(row["batch"], row["graph"]) for row in result["models"]] == [
        (1, False),
        (1, True),
        (32, False),
        (32, True),
    ]
    assert all(row["skipped"] == "a dry run has no CUDA graphs" for row in result["models"] if row["graph"])
    assert all(set(row["us"]) == {"eager", "inductor", "claq"} for row in result["models"] if not row["graph"])
    assert {(row["mix"], row["vectors"]) for row in result["kernels"]} >= {("2", 1), ("2+4", 16)}
    assert {row["vectors"] for row in result["timings"] if "vectors" in row} == {1, 16}
    skipped = {row["mix"]: row["skipped"] for row in result["timings"] if "skipped" in row}
    assert skipped["gemlite"] == "a dry run has no GPU"
    assert "int4pack" in skipped
    assert {row["mix"] for row in result["lookups"]} == {"2", "4"}
    assert {row["vectors"] for row in result["tuning"]} == {1, 16, 128}
    assert result["goals"] == []
    page = (tmp_path / "gpu_dry_run.md").read_text()
    assert "32 of 32 operators and models agree" in page
    assert "- not tried: quantized modules in a CUDA graph, MLP: a dry run has no CUDA graphs" in page
    assert "5 of 5 comparisons with the dense weight passed, 0 failed, 0 were not reached" in page
    assert "Fastest tiles for mix 3, M = 128" in page


def test_without_a_gpu_the_reason_is_given() -> None:
    done = run(str(FOLDER / "run_all.py"))
    assert done.returncode == 2
    assert done.stderr.strip() == "no GPU: torch.cuda.is_available() is false (--dry-run needs none)"


@pytest.mark.slow
def test_logits_of_onnx_runtime_are_those_of_pytorch() -> None:
    claq_runtime = pytest.importorskip("claq_runtime")
    program = str(FOLDER / "logits.py")
    done = run(program, "--library", claq_runtime.library_path(), "--provider", "CPUExecutionProvider")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["right"]
    assert found["nodes"] == {name: ["CPUExecutionProvider"] for name in ("ClaqGather", *PRODUCTS)}
    none = run(program, "--library", claq_runtime.library_path(), "--provider", "NoSuchProvider")
    assert "here has no NoSuchProvider" in json.loads(none.stdout)["not tried"]

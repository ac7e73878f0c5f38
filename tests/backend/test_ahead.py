"""Graphs compiled ahead of time: saved by PyTorch, loaded in another process, with weights from claq.safetensors alone."""

from __future__ import annotations

import os
import pickle
import pickletools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backend_models import Net, compiled, data

from claq_export.backend import save_compiled
from claq_export.backend.ahead import AheadGraph
from claq_export.errors import ConfigError, FormatError, ModelError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with quantized weights."""
    run = compiled(Net(), calibration=data())
    run(data(1)[0])
    save_compiled(run, tmp_path / "weights")
    return tmp_path / "weights"


def ahead(model: torch.nn.Module, x: torch.Tensor, **options: object):
    with torch._dynamo.config.patch(enable_aot_compile=True):  # off by default in torch 2.11
        return compiled(model.forward, dynamic=True, **options).aot_compile(((x,), {}))


_LOAD = """
import sys
import torch
from backend_models import Net, data
from claq_export.backend import weights_in
import claq_export.backend.compile, claq_export.compiler
from torch._dynamo import convert_frame

def refuse(*_args, **_kwargs):
    raise AssertionError("nothing is to be traced or quantized")

torch.set_num_threads(int(sys.argv[5]))  # PyTorch guards the number it compiled with
convert_frame.fullgraph_capture = claq_export.backend.dynamo.trace_to_aten = refuse
claq_export.backend.compile.claq = claq_export.compiler.Compilation.quantize = refuse
with open(sys.argv[1], "rb") as file, weights_in(sys.argv[2]):
    forward = torch.compiler.load_compiled_function(file)
model = Net(seed=7)  # other values: all that count come from disk but the biases, which are not quantized
with torch.no_grad():
    for name, value in torch.load(sys.argv[3], weights_only=True).items():
        if name.endswith("bias"):
            model.get_parameter(name).copy_(value)
    results = [forward(model, data(1, rows, seed=9)[0]) for rows in (5, 2, 9)]
torch.save(results, sys.argv[4])
"""


@pytest.mark.parametrize(
    "fallback",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")],
        ),
    ],
)
def test_another_process_runs_it_from_disk(tmp_path: Path, saved: Path, fallback: str) -> None:
    model = Net()
    function = ahead(model, data(1, 5)[0], weights=saved, fallback=fallback)
    expected = [function(model, data(1, rows, seed=9)[0]) for rows in (5, 2, 9)]
    torch.testing.assert_close(expected[0], compiled(Net(), weights=saved)(data(1, 5, seed=9)[0]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], model(data(1, 5, seed=9)[0]), atol=1e-4)
    function.save_compiled_function(str(tmp_path / "forward.graph"))
    moved = saved.rename(tmp_path / "moved")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    arguments = [tmp_path / "forward.graph", moved, tmp_path / "state.pt", tmp_path / "results.pt"]
    arguments.append(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for got, wanted in zip(torch.load(tmp_path / "results.pt", weights_only=True), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_no_weight_is_in_the_file(tmp_path: Path, saved: Path) -> None:
    model, x = Net(), data(1, 5)[0]
    function = ahead(model, x, weights=saved)
    function(model, x)
    path = tmp_path / "forward.graph"
    function.save_compiled_function(str(path))
    content = path.read_bytes()
    for parameter in model.parameters():
        assert parameter.detach().numpy().tobytes()[:64] not in content
    # No storage of a tensor either: PyTorch pickles the guards' stand-ins on the device `meta`.
    names = [argument for code, argument, _ in pickletools.genops(content) if code.name.endswith("UNICODE")]
    assert not any("_rebuild_tensor_v2" in name or "storage" in name.lower() for name in names)


def test_a_graph_observed_and_saved_later(tmp_path: Path) -> None:
    model, x = Net(), data(1)[0]
    function = ahead(model, x, observe=2)
    for batch in data(2):
        function(model, batch)
    assert not torch.equal(function(model, x), model(x))
    with pytest.raises(ModelError, match="save_compiled"):
        function.save_compiled_function(str(tmp_path / "forward.graph"))
    save_compiled(model, tmp_path)
    function.save_compiled_function(str(tmp_path / "forward.graph"))
    with (tmp_path / "forward.graph").open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    assert torch.equal(loaded(model, x), function(model, x))


def test_other_calls_than_it_was_compiled_for_are_refused(saved: Path) -> None:
    model, x = Net(), data(1, 5)[0]
    function = ahead(model, x, weights=saved)
    with pytest.raises(RuntimeError, match="GuardManager check failed"):
        function(model, x.double())


def test_errors_come_as_they_are(saved: Path) -> None:
    with pytest.raises(ConfigError, match="no option 'weigths'"):
        ahead(Net(), data(1)[0], weigths=saved)


def test_damaged_graphs_are_refused() -> None:
    with pytest.raises(FormatError, match="not a graph saved by"):
        AheadGraph.deserialize_compile_artifacts(pickle.dumps("something else"))
    newer = b'{"format": 2}'
    with pytest.raises(FormatError, match="saved in format 2"):
        AheadGraph.deserialize_compile_artifacts(b"claq graph\n" + len(newer).to_bytes(8, "little") + newer)

"""Saving and loading compiled models, releasing weights, and being found by PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from backend_models import Net, compiled, data

import claq_export
from claq_export.backend import claq, save_compiled
from claq_export.backend.checkpoint import load_weights
from claq_export.backend.store import WeightStore
from claq_export.errors import FormatError, ModelError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_round_trip(tmp_path: Path, release: bool) -> None:
    model = Net()
    run = compiled(model, calibration=data(), release_weights=release, accuracy="int8")
    x = data(1, seed=9)[0]
    wanted = run(x)
    save_compiled(run, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claq.json", "claq.safetensors"]
    assert torch.equal(compiled(Net(), weights=tmp_path)(x), wanted)
    loaded = claq_export.load(tmp_path, Net(seed=7))
    torch.testing.assert_close(loaded(x), wanted)
    assert torch.equal(torch.compile(loaded, backend="eager", fullgraph=True)(x), loaded(x))


def test_a_folder_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    x = data(1, seed=9)[0]
    for seed in (0, 1):
        run = compiled(Net(seed=seed), calibration="none")
        wanted = run(x)
        save_compiled(run, tmp_path)
        assert torch.equal(compiled(Net(seed=seed), weights=tmp_path)(x), wanted)


def test_loaded_layers_lie_where_their_weights_do(tmp_path: Path) -> None:
    run = compiled(Net(), calibration="none")
    run(data(1)[0])
    save_compiled(run, tmp_path)
    store = WeightStore("devices")
    named = {device: torch.nn.Parameter(torch.empty(48, 48, device=device), False) for device in ("cpu", "meta")}
    for device, weight in named.items():
        load_weights(tmp_path, {"blocks.0.out.weight": weight}, store)
        entry = store.find(weight)
        assert entry is not None
        assert {tensor.device.type for tensor in entry.layer.tensors().values()} == {device}


def test_ambiguous_names_find_no_weights(tmp_path: Path) -> None:
    model = Net(3)
    run = compiled(model, calibration="none")
    x = data(1)[0]
    run(x)
    save_compiled(model, tmp_path)
    fresh = Net(1)
    with pytest.raises(
        ModelError, match=r"may be that of blocks.0.\w or blocks.1.\w: where layers of one class are compiled"
    ):
        compiled(fresh.blocks[0], weights=tmp_path)(x)  # three blocks have a `q`


def test_layers_compiled_one_by_one_are_all_saved(tmp_path: Path) -> None:
    """Their graph is one, and in it each has the same names."""
    model = Net(3)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=claq, options={"fallback": "eager", "calibration": "none", "progress": False})
    x = data(1, seed=9)[0]
    wanted = model(x)
    save_compiled(model, tmp_path)
    torch.testing.assert_close(claq_export.load(tmp_path, Net(3, seed=7))(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(Net(3, seed=0), weights=tmp_path)(x), wanted)


def test_weights_that_have_changed_are_not_saved(tmp_path: Path) -> None:
    model = Net()
    run = compiled(model, calibration="none")
    x = data(1)[0]
    run(x)
    model.load_state_dict(Net(seed=5).state_dict())
    with pytest.raises(
        ModelError, match=r"blocks.0.\w+.weight was changed after it had been quantized: call the compiled"
    ):
        save_compiled(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wanted = run(x)
    save_compiled(run, tmp_path / "out")
    assert torch.equal(compiled(Net(seed=5), weights=tmp_path / "out")(x), wanted)


def test_nothing_to_save() -> None:
    with pytest.raises(ModelError, match="no weight of this model has been quantized"):
        save_compiled(Net(), "nowhere")


def test_two_settings_cannot_be_saved_as_one(tmp_path: Path) -> None:
    model = Net()
    for bits in (3, 4):
        compiled(model, calibration="none", bits=bits)(data(1)[0])
    with pytest.raises(ModelError, match="2 different sets of options"):
        save_compiled(model, tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        compiled(Net(), weights=tmp_path)(data(1)[0])
    run = compiled(Net(), calibration="none")
    run(data(1)[0])
    save_compiled(run, tmp_path)
    other = Net()
    other.blocks[0].q = torch.nn.Linear(48, 64, bias=False)
    other.blocks[0].v = torch.nn.Linear(48, 64)
    other.blocks[0].out = torch.nn.Linear(64, 48)
    other.blocks[0].k = torch.nn.Linear(48, 32, bias=False)
    with pytest.raises(ModelError, match="is for a weight of shape"):
        compiled(other, weights=tmp_path)(data(1)[0])


_RELEASE = """
import copy, gc, pickle, sys
import torch
from torch import nn
from claq_export.backend import claq, save_compiled
from claq_export.errors import ClaqError

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(24)]).eval()
run = torch.compile(model, backend=claq, options={
    "calibration": "none", "release_weights": True, "fallback": "eager", "progress": False})
x = torch.randn(4, 1024)
with torch.no_grad():
    reference = model(x)
    before = resident()
    first = run(x)
    after = resident()
    for rows in (4, 1, 7):  # recompiles without the weights
        again = run(x[:1].expand(rows, -1))
        assert torch.allclose(again[0], first[0], atol=1e-5), (again - first).abs().max()
assert (first - reference).abs().max() < reference.abs().max()
print(f"{before - after:.1f}")
accesses = (model.state_dict, lambda: model.load_state_dict({}), lambda: model[0](x), lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model))
for access in accesses:
    try:
        access()
    except (ClaqError, RuntimeError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
save_compiled(model, sys.argv[1])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_released_weights_leave_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RELEASE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    freed, saving, loading, reading, copying, pickling = done.stdout.strip().splitlines()
    # 96 MB of float32 become 13 MB at 4 bits; tables of the native kernels and the allocator take their part.
    assert float(freed) > 48
    assert saving.startswith("ModelError the original weights of")
    assert "save_compiled" in saving
    assert loading.startswith("ModelError weights cannot be loaded into")
    assert "storage of size 0" in reading
    assert "neither copied nor pickled" in copying
    assert "neither copied nor pickled" in pickling
    assert (tmp_path / "claq.safetensors").stat().st_size < 16e6


def test_pytorch_finds_the_backend_without_importing_it(tmp_path: Path) -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch_dynamo_backends"]
    information = tmp_path / "found_by_name-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: found-by-name\nVersion: 1\n")
    lines = [f"{name} = {target}" for name, target in entry.items()]
    (information / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines]) + "\n")
    program = """
import sys, torch
assert "claq" in torch._dynamo.list_backends(None)
model = torch.nn.Linear(64, 128).eval().requires_grad_(False)
options = {"calibration": "none", "fallback": "eager", "progress": False}
run = torch.compile(model, backend="claq", options=options)
x = torch.randn(3, 64)
assert not torch.equal(run(x), model(x))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

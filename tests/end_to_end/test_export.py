"""From a model folder to an artifact that plain ONNX Runtime runs: the command line and the Python API."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny_models import sentences
from torch import nn

import claq_export
from claq_export.calibration.progress import ProgressReporter
from claq_export.cli import main
from claq_export.format.checkpoint import load_checkpoint
from claq_export.kernels import use_backend
from claq_export.modules import ClaqEmbedding, ClaqLinear

FILES = {"model.onnx", "claq.safetensors", "claq.json", "config.json", "tokenizer.json"}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(sentences(64)), encoding="utf-8")
    return path


def run_cli(model: Path, out: Path, text: Path, *options: str) -> int:
    return main([str(model), "--out", str(out), "--calibration", str(text), "--samples", "8", "--quiet", *options])


@pytest.fixture(scope="session")
def artifact(tiny_bert: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "model.onnx"
    log = out.parent.parent / "log.jsonl"
    assert run_cli(tiny_bert, out, text, "--bits", "3", "--outliers", "0.01", "--log", str(log)) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    layers = [event for event in events if event["event"] == "layer" and "phase" not in event]
    assert len(layers) == 10  # words and positions, two blocks of q+k+v, attention output, up, down
    assert all(0 < event["error"] < 1 for event in layers)
    return out


def test_plain_onnxruntime_runs_it_at_other_sizes(artifact: Path, tiny_bert: Path) -> None:
    assert {path.name for path in artifact.parent.iterdir()} >= FILES
    assert not list(artifact.parent.glob("*.tmp"))
    session = ort.InferenceSession(str(artifact), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state"]

    from transformers import BertModel

    model = claq_export.load(artifact.parent, BertModel.from_pretrained(tiny_bert, add_pooling_layer=False)).eval()
    assert sum(isinstance(module, ClaqLinear) for module in model.modules()) == 12
    assert sum(isinstance(module, ClaqEmbedding) for module in model.modules()) == 2
    for batch, length in ((1, 1), (3, 17), (2, 64)):
        ids = torch.randint(5, 60, (batch, length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        (got,) = session.run(
            None,
            {
                "input_ids": ids.numpy(),
                "attention_mask": mask.numpy(),
                "token_type_ids": np.zeros((batch, length), np.int64),
            },
        )
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4 * float(expected.abs().max()))


def test_file_is_valid_and_describes_itself(artifact: Path) -> None:
    onnx.checker.check_model(str(artifact), full_check=True)
    model = onnx.load(str(artifact), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["claq.config"])["bits"] == 3
    assert 3 < float(metadata["claq.true_bits"]) < 6  # tables and row pointers weigh much in a model this small
    assert metadata["claq.version"] == claq_export.__version__
    assert len(metadata["claq.source_sha256"]) == 64
    assert str(artifact.parent) not in str(model)
    used = {node.op_type for node in model.graph.node if node.domain == "com.claq"}
    assert used == {"ClaqMatMul", "ClaqMatMulAdd", "ClaqMatMulSplit", "ClaqGather", "ClaqAttention"}
    assert {(function.domain, function.name) for function in model.functions} == {("com.claq", name) for name in used}
    assert sum(node.domain == "com.claq" for node in model.graph.node) == 12


def test_same_input_same_bytes(artifact: Path, tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    options = ("--bits", "3", "--outliers", "0.01", "--no-verify")  # which changes nothing that is written
    assert run_cli(tiny_bert, tmp_path / "model.onnx", text, *options) == 0
    names = {path.name for path in artifact.parent.iterdir()}
    assert {"model.onnx", "claq.safetensors", "claq.json"} < names
    for name in names:
        assert filecmp.cmp(artifact.parent / name, tmp_path / name, shallow=False), name


class Stop(ProgressReporter):
    """Interrupts the run after some layers, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self.after = after
        self.restored = 0

    def layer(self, name: str, **fields: object) -> None:
        super().layer(name, **fields)
        if "phase" in fields:  # a step before the layers are quantized
            return
        self.restored += fields["layer_seconds"] == 0
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


def test_interrupted_run_goes_on_and_ends_the_same(one_block_bert: Path, text: Path, tmp_path: Path) -> None:
    config = claq_export.Config(bits=3.5, calibration=text, samples=6)  # a budget: two walks
    whole, resumed, work = tmp_path / "whole" / "model.onnx", tmp_path / "resumed" / "model.onnx", tmp_path / "work"
    claq_export.export(one_block_bert, out=whole, config=config, verify=False)
    with pytest.raises(KeyboardInterrupt):
        claq_export.export(one_block_bert, out=resumed, config=config, work=work, verify=False, reporter=Stop(3))
    assert not resumed.exists()
    second = Stop(-1)
    claq_export.export(
        one_block_bert, out=resumed, config=config, work=work, verify=False, resume=True, reporter=second
    )
    assert second.restored == 3
    assert not work.exists()
    for path in whole.parent.iterdir():
        assert filecmp.cmp(path, resumed.parent / path.name, shallow=False), path.name


class Narrow(nn.Module):
    """Two layers with a function of the caller between them, whose weights are always the same."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(64, 64), nn.Linear(64, 64), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def export_narrow(
    folder: Path, settings: dict[str, Any] | None = None, reporter: ProgressReporter | None = None, **changes: Any
) -> None:
    batches = [torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    claq_export.export(
        Narrow(changes.get("between", lambda x: x * torch.tensor([1.0, 3.0]).repeat(32).to(x))),
        batches[0],
        folder / "model.onnx",
        claq_export.Config(**({"size": 12_000, "calibration": batches} | (settings or {}))),
        work=folder / "work",
        memory=changes.get("memory"),
        verify=False,
        reporter=reporter,
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the finished layers of a run that was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        export_narrow(folder, reporter=Stop(1))
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"between": torch.tanh}, ".*model's graph"),
        ({"between": lambda x: x * torch.tensor([1.0, 2.0]).repeat(32)}, ".*model's graph"),
        ({"settings": {"dtype": "float16"}}, ".*setting dtype"),
        ({"settings": {"size": 11_000}}, r"setting size \(12000 -> 11000\)"),
        ({"memory": 3_000_000_000}, r".*setting importance \(true -> false\)"),
        ({"revision": "1"}, "revision of the algorithm"),
    ],
    ids=["function", "constant", "dtype", "size", "memory", "revision"],
)
def test_what_layers_depend_on_is_noticed(
    change: dict[str, Any], named: str, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    if "revision" in change:
        monkeypatch.setattr("claq_export.compiler.REVISION", change["revision"])
    before = {path: path.read_bytes() for path in (folder / "work").rglob("*") if path.is_file()}
    assert before
    with pytest.raises(claq_export.errors.OutputError, match=f"changed since that run: {named}"):
        export_narrow(folder, **change)
    assert {path: path.read_bytes() for path in (folder / "work").rglob("*") if path.is_file()} == before


def test_a_run_is_taken_up_after_another_was_refused(interrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    with pytest.raises(claq_export.errors.OutputError, match="changed since that run"):
        export_narrow(folder, between=torch.tanh)
    again = Stop(-1)
    export_narrow(folder, reporter=again)
    assert again.restored == 1


def test_budget_is_met_in_true_bits(one_block_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    options = (
        "--bits",
        "3.5",
        "--sequence-length",
        "16",
        "--floor",
        "*down_proj=3",
        "--report",
        str(tmp_path / "r.html"),
    )
    assert run_cli(one_block_llama, out, text, *options) == 0
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"
    checkpoint = load_checkpoint(tmp_path)
    nbytes = sum(t.numel() * t.element_size() for layer in checkpoint.layers.values() for t in layer.tensors().values())
    weights = sum(layer.in_features * layer.out_features for layer in checkpoint.layers.values())
    assert 8 * nbytes / weights == pytest.approx(3.5, rel=0.01)
    assert all(layer.columns[2] == 0 for name, layer in checkpoint.layers.items() if name.endswith("down_proj"))
    assert "down_proj" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_budget_out_of_reach_names_what_is_possible(
    one_block_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--size", "300kB", "--sequence-length", "16", "--no-cache")
    assert run_cli(one_block_llama, tmp_path / "model.onnx", text, *options) == 2
    assert "cannot be met" in capsys.readouterr().err


def test_preset_has_the_papers_bits(one_block_llama: Path, text: Path, tmp_path: Path) -> None:
    options = ("--preset", "claq-3.12", "--sequence-length", "16", "--no-cache")
    assert run_cli(one_block_llama, tmp_path / "model.onnx", text, *options) == 0
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert float(metadata["claq.nominal_bits"]) == pytest.approx(3.12, abs=0.08)  # 32-column groups of 64 columns


def test_no_calibration_is_said_loudly(
    one_block_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise claq_export.errors.OutputError("stopped before the file")

    monkeypatch.setattr("claq_export.compiler.Compilation.emit", stop)
    assert main([str(one_block_bert), "--out", str(tmp_path / "m.onnx"), "--calibration", "none", "--quiet"]) > 0
    assert "no calibration" in capsys.readouterr().err


def test_calibration_lowers_the_output_error(one_block_bert: Path, text: Path, tmp_path: Path) -> None:
    def error(calibration: str | Path) -> float:
        config = claq_export.Config(bits=2, calibration=calibration, samples=32)
        result = claq_export.export(one_block_bert, out=tmp_path / "m.onnx", config=config)
        assert result.verification is not None
        return result.verification.fidelity["last_hidden_state"].rms

    assert error(text) < error("none")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(96, 256)
        self.down = nn.Linear(256, 96, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


@dataclass(frozen=True)
class Both:
    """A perceptron as a file with the library's checkpoint beside it, and quantized in place, on the same data."""

    folder: Path
    result: claq_export.ExportResult
    quantized: Perceptron
    data: torch.Tensor
    before: torch.Tensor
    """What the model gave for ``data`` before it was quantized."""


def export_and_quantize(folder: Path, accuracy: str | None) -> Both:
    torch.manual_seed(0)
    model = Perceptron().eval()
    data = [torch.randn(16, 96) for _ in range(4)]
    config = claq_export.Config(bits=4, calibration=data, accuracy=accuracy)
    result = claq_export.export(model, (data[0],), folder / "mlp.onnx", config)
    before = model(data[0]).detach()
    quantized = claq_export.quantize(model, (data[0],), config)
    assert quantized is model
    return Both(folder, result, model, data[0], before)


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """In the usual arithmetic, with the unquantized model beside it for its latency."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("claq_export.api.UNQUANTIZED_LIMIT", 1 << 20)
        return export_and_quantize(tmp_path_factory.mktemp("perceptron"), None)


def test_any_module_from_python(perceptron: Both) -> None:
    result, model = perceptron.result, perceptron.quantized
    assert [layer.name for layer in result.layers] == ["up", "down"]
    assert result.verification is not None
    assert result.verification.runs["original"].latency_ms > 0  # the unquantized model was written and timed, too
    session = ort.InferenceSession(str(result.artifact.path), providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: np.zeros((7, 96), np.float32)})[0].shape == (7, 96)

    assert isinstance(model.up, ClaqLinear)
    with torch.no_grad():
        after = model(perceptron.data)
    assert 0 < float((after - perceptron.before).norm() / perceptron.before.norm()) < 0.2
    (onnx_result,) = session.run(None, {session.get_inputs()[0].name: perceptron.data.numpy()})
    np.testing.assert_allclose(onnx_result, after.numpy(), atol=1e-4)


@pytest.mark.parametrize(("accuracy", "in_file", "in_pytorch"), [(None, 4, 0), ("int8", 4, 4), ("fp32", 0, 0)], ids=str)
def test_arithmetic_of_file_and_pytorch(
    accuracy: str | None,
    in_file: int,
    in_pytorch: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both: Both = export_and_quantize(tmp_path, accuracy) if accuracy else request.getfixturevalue("perceptron")
    path, quantized, x = both.result.artifact.path, both.quantized, both.data
    nodes = [node for node in onnx.load(str(path)).graph.node if node.op_type == "ClaqMatMul"]
    assert [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"] == [in_file, in_file]
    loaded = claq_export.load(both.folder, Perceptron())
    assert {one.up.accuracy_level for one in (loaded, quantized)} == {in_pytorch}

    claq_runtime = pytest.importorskip("claq_runtime")
    options = ort.SessionOptions()
    claq_runtime.register(options)
    with torch.no_grad(), use_backend("reference"):
        exact = quantized(x).numpy()

    def deviation() -> float:
        session = ort.InferenceSession(str(path), options)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return float(np.abs(got - exact).max() / np.abs(exact).max())

    assert 1e-4 < deviation() < 0.02 if in_file else deviation() < 1e-5
    monkeypatch.setenv("CLAQ_ACCURACY", "fp32")
    assert deviation() < 1e-5


def test_endless_streams_calibrate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stream = (torch.randn(16, 96) for _ in count())
    config = claq_export.Config(bits=2, calibration=stream, samples=3)
    with pytest.raises(KeyboardInterrupt):  # both layers are quantized then
        claq_export.export(
            Perceptron().eval(), (torch.randn(4, 96),), tmp_path / "mlp.onnx", config, reporter=Stop(2), verify=False
        )


def test_dry_run_says_what_and_why(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_llama), "--dry-run", "--bits", "3", "--exclude", "*down_proj"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj+up_proj" in printed
    assert "embed" in printed
    assert "true bits" in printed
    quantized, left = printed.split("left alone")
    assert "down_proj" not in quantized
    assert "down_proj" in left


@pytest.mark.slow
def test_real_minilm_stays_close(minilm: Path, tmp_path: Path) -> None:
    config = claq_export.Config(bits=4, samples=32)
    result = claq_export.export(minilm, out=tmp_path / "model.onnx", config=config)
    assert len(result.layers) == 25
    assert result.true_bits < 4.4  # 1 % of the vocabulary is exact
    assert result.verification is not None
    runs = {name: run.deviations.get("last_hidden_state") for name, run in result.verification.runs.items()}
    assert runs["stock"].maximum < 1e-4
    if "runtime" in runs:  # in int8
        assert 1e-3 < runs["runtime"].maximum < 0.1
        assert runs["runtime"].cosine > 0.999
    assert result.verification.fidelity["last_hidden_state"].cosine > 0.95

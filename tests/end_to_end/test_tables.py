"""Embeddings and output heads from the command line to every runtime: tied and untied, widths, budgets, PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny_models import sentences
from torch import nn

import claq_export
from claq_export.cli import main
from claq_export.emit.artifact import Artifact
from claq_export.errors import ConfigError
from claq_export.format.checkpoint import load_checkpoint
from claq_export.kernels import use_backend
from claq_export.modules import ClaqEmbedding, ClaqLinear

SHORT = ("--sequence-length", "16", "--samples", "8", "--quiet")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(sentences(64)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tied(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a tied head, 3 bits, the table at 4, with a report."""
    out = tmp_path_factory.mktemp("tied") / "model.onnx"
    options = ("--bits", "3", "--outliers", "0.01", "--report", str(out.parent / "r.html"), "--no-cache", *SHORT)
    assert main([str(tiny_llama), "--out", str(out), "--calibration", str(text), *options]) == 0
    return out


@pytest.fixture
def untranslated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that write no graph, for tests of what is planned and quantized: everything else of an export runs."""

    def emit_onnx(graph: object, example: object, out: Path, **_: object) -> Artifact:
        out.write_bytes(b"")
        return Artifact(path=out, files=(out,), bytes=0, inputs=(), outputs=(), layers=())

    monkeypatch.setattr("claq_export.emit.exporter.emit_onnx", emit_onnx)


def claq_nodes(path: Path) -> list[onnx.NodeProto]:
    model = onnx.load(str(path), load_external_data=False)
    return [node for node in model.graph.node if node.domain == "com.claq"]


def test_a_tied_table_is_stored_once(tied: Path) -> None:
    gather, *linears, head = claq_nodes(tied)
    assert (gather.op_type, head.op_type) == ("ClaqGather", "ClaqMatMul")
    assert list(gather.input[1:9]) == list(head.input[1:9])
    assert head.name == f"{gather.name}#2"
    assert {node.op_type for node in linears} == {"ClaqMatMulSplit", "ClaqMatMulAdd", "ClaqMatMulSwiGLU"}
    model = onnx.load(str(tied), load_external_data=False)
    assert not [tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [127, 64]]
    assert {function.name for function in model.functions} == {node.op_type for node in (gather, *linears, head)}
    checkpoint = load_checkpoint(tied.parent)
    (name,) = checkpoint.tied
    assert {name, *checkpoint.tied[name]} == {"lm_head", "model.embed_tokens"}
    assert checkpoint.layers[name].columns == (64, 0, 0)
    assert all(layer.columns[0] == 0 for other, layer in checkpoint.layers.items() if other != name)


def test_the_layers_of_file_and_folder_are_the_same(tied: Path) -> None:
    from claq_export.evaluation.layers import artifact_layers

    in_file = {entry.name: entry for entry in artifact_layers(tied)}
    in_folder = {entry.name: entry for entry in artifact_layers(tied.parent)}
    assert in_file.keys() == in_folder.keys()
    for name, entry in in_file.items():
        assert entry.parts == in_folder[name].parts
        assert torch.equal(entry.layer.codes, in_folder[name].layer.codes)


def test_pytorch_and_both_runtimes_agree(tied: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    model = claq_export.load(tied.parent, LlamaForCausalLM.from_pretrained(tiny_llama)).eval()
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, ClaqEmbedding)
    assert isinstance(head, ClaqLinear)
    assert embedding.codes.data_ptr() == head.codes.data_ptr()
    assert torch.equal(embedding(torch.arange(127)), head.layer.dequantize())

    ids = torch.randint(5, 127, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), use_backend("reference"):
        expected = model(**inputs).logits.numpy()
    claq_runtime = pytest.importorskip("claq_runtime")
    options = ort.SessionOptions()
    claq_runtime.register(options)
    monkeypatch.setenv("CLAQ_ACCURACY", "fp32")
    for session in (ort.InferenceSession(str(tied)), ort.InferenceSession(str(tied), options)):
        names = [value.name for value in session.get_inputs()]
        given = {**inputs, "position_ids": torch.arange(9).expand(2, -1)}
        (logits,) = session.run(None, {name: given[name].numpy() for name in names})
        np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.abs(expected).max()))
    # Rows are written after the cast of a model, not before.
    assert embedding.half()(ids).dtype == torch.float16
    assert embedding.codes.dtype == torch.uint32


def test_what_is_printed_and_reported(
    tied: Path, tiny_llama: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "output head and embedding" in (tied.parent / "r.html").read_text(encoding="utf-8")
    assert main([str(tiny_llama), "--dry-run", "--bits", "2", "--quiet"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "(output head and embedding)" in line]
    assert "64 / 0 / 0" in row
    assert main([str(tiny_bert), "--dry-run", "--embedding-bits", "3", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "embeddings.word_embeddings (embedding)" in printed
    assert "0 / 64 / 0" in printed
    assert main([str(tiny_bert), "--dry-run", "--embedding-bits", "none", "--quiet"]) == 0
    assert "embeddings are left at full precision" in " ".join(capsys.readouterr().out.split())


class Language(nn.Module):
    """An odd vocabulary and width, head and embedding apart."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(301, 45, padding_idx=3)
        self.body = nn.Linear(45, 45)
        self.head = nn.Linear(45, 301)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.embed(ids))))


IDS = torch.randint(0, 301, (4, 12), generator=torch.Generator().manual_seed(1))


def test_untied_widths_and_odd_sizes(tmp_path: Path) -> None:
    config = claq_export.Config(
        bits=2, embedding_bits=3, head_bits=4, exact_tokens=0.0, calibration=[IDS], accuracy="fp32"
    )
    result = claq_export.export(Language().eval(), (IDS,), tmp_path / "m.onnx", config)
    assert [(layer.name, layer.role, layer.nominal_bits) for layer in result.layers] == [
        ("embed", "embedding", 3),
        ("body", "linear", 2),
        ("head", "head", 4),
    ]
    assert result.verification is not None
    assert all(
        run.deviations == {} or run.deviations["output"].maximum < 1e-4 for run in result.verification.runs.values()
    )
    model = claq_export.load(tmp_path, Language())
    rows = model.embed(IDS).detach()
    original = Language().embed(IDS).detach()
    assert 0 < float((rows - original).norm() / original.norm()) < 0.25
    metadata = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(metadata["claq.config"])["embedding_bits"] == 3


@pytest.mark.parametrize(
    ("options", "names", "widths"),
    [
        ({}, ["embed", "body"], [4, 2]),
        ({"head_bits": 3}, ["embed", "body"], [3, 2]),
        ({"embedding_bits": 3}, ["embed", "body"], [3, 2]),
        ({"embedding_bits": 2, "head_bits": 3}, ["embed", "body"], [3, 2]),
        ({"embedding_bits": 0}, ["body"], [2]),
        ({"head_bits": 0}, ["body"], [2]),
    ],
)
def test_widths_of_a_tied_table(options: dict[str, int], names: list[str], widths: list[int]) -> None:
    config = claq_export.Config(bits=2, calibration=[IDS], **options)
    model = claq_export.quantize(Language(tie=True).eval(), (IDS,), config)
    parts = [model.embed, model.body] if "embed" in names else [model.body]
    assert all(isinstance(part, (ClaqLinear, ClaqEmbedding)) for part in parts)
    assert [int(part.layer.column_bits()[0]) for part in parts] == widths
    assert isinstance(model.embed, ClaqEmbedding) == isinstance(model.head, ClaqLinear) == ("embed" in names)
    if "embed" in names:
        assert model.embed.codes is model.head.codes


@pytest.mark.usefixtures("untranslated")
@pytest.mark.parametrize(
    ("bits", "tie", "exact"), [(2.9, False, 0.0), (2.9, True, 0.0), (3.9, False, 0.01), (3.9, True, 0.01)]
)
def test_tables_count_in_a_budget(tmp_path: Path, bits: float, tie: bool, exact: float) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Embedding(700, 96), nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 96), nn.Linear(96, 700))
    if tie:
        wide[4].weight = wide[0].weight
    ids = torch.randint(0, 700, (4, 32))
    config = claq_export.Config(bits=bits, exact_tokens=exact, calibration=[ids])
    result = claq_export.export(wide.eval(), (ids,), tmp_path / "m.onnx", config, verify=False)
    assert result.true_bits == pytest.approx(bits, rel=0.01)
    tables = [layer for layer in result.layers if layer.role != "linear"]
    assert len(tables) == (1 if tie else 2)
    # An option gives the least width of a table's columns: what it takes, others go without.
    asked = claq_export.Config(
        bits=bits, exact_tokens=exact, calibration=[ids], embedding_bits=3, head_bits=None if tie else 4
    )
    if not tie and bits < 3:
        with pytest.raises(ConfigError, match=r"cannot be met.*--head-bits"):
            claq_export.export(wide, (ids,), tmp_path / "m.onnx", asked, verify=False)
        return
    result = claq_export.export(wide, (ids,), tmp_path / "m.onnx", asked, verify=False)
    assert result.true_bits == pytest.approx(bits, rel=0.01)
    widths = {layer.role: layer.nominal_bits for layer in result.layers if layer.role != "linear"}
    least = {"head": 3} if tie else {"embedding": 3, "head": 4}
    assert widths.keys() == least.keys()
    assert all(widths[role] >= least[role] for role in least)


@pytest.mark.usefixtures("untranslated")
@pytest.mark.parametrize("importance", [True, False])
def test_tables_get_bits_by_what_their_errors_cost(tmp_path: Path, importance: bool) -> None:
    """Of two tables alike the one that reaches the output at a hundredth gets the narrow columns."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Embedding(700, 96), nn.Embedding(700, 96)
            self.out = nn.Linear(96, 96)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.loud(ids) + 0.01 * self.quiet(ids))

    torch.manual_seed(0)
    ids = torch.randint(0, 700, (4, 64))
    config = claq_export.Config(bits=3.2, exact_tokens=0.0, calibration=[ids], importance=importance)
    result = claq_export.export(Two().eval(), (ids,), tmp_path / "m.onnx", config, verify=False)
    loud, quiet = (next(layer for layer in result.layers if layer.name == name) for name in ("loud", "quiet"))
    if importance:
        assert loud.true_bits > quiet.true_bits + 1.5
    else:
        assert loud.true_bits == pytest.approx(quiet.true_bits, rel=0.05)


@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_heads_count_by_use(tie: bool) -> None:
    """Tokens of the calibration data are closer in a tied table; in one that is only looked up if that is asked for."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (8, 64))

    def error(**options: object) -> tuple[float, float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(700, 96), nn.Linear(96, 96), nn.Linear(96, 700, bias=False)).eval()
        with torch.no_grad():
            model[0].weight[:40] = model[0].weight[:40].abs()  # distributed otherwise than rows that are not used
        if tie:
            model[2].weight = model[0].weight
        original = model[0].weight.detach().clone()
        config = claq_export.Config(bits=2, embedding_bits=2, exact_tokens=0.0, calibration=[ids], **options)  # type: ignore[arg-type]
        claq_export.quantize(model, (ids,), config)
        lost = (model[0](torch.arange(700)) - original).square().mean(1)
        return float(lost[:40].mean()), float(lost[40:].mean())

    alike, default, asked = (
        error(algorithm={"frequency_power": 0.0}),
        error(),
        error(algorithm={"frequency_power": 0.5}),
    )
    assert asked[0] < 0.9 * alike[0]
    assert asked[1] > alike[1]
    assert default == (asked if tie else alike)


def test_a_budget_narrows_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4000, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    ids = torch.randint(0, 4000, (4, 32))
    config = claq_export.Config(bits=2.5, exact_tokens=0.0, calibration=[ids])
    result = claq_export.export(model, (ids,), tmp_path / "m.onnx", config, verify=False)
    assert result.true_bits <= 2.5 * 1.01
    assert [layer.nominal_bits < 2.6 for layer in result.layers if layer.role == "embedding"] == [True]
    with pytest.raises(ConfigError, match=r"cannot be met.*--embedding-bits, --head-bits, --exact-tokens 0"):
        claq_export.export(
            model, (ids,), tmp_path / "m.onnx", claq_export.Config(bits=2.5, embedding_bits=4, calibration=[ids])
        )


@pytest.mark.parametrize("value", [1, 5, True, "none"])
def test_widths_are_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="embedding_bits must be one of"):
        claq_export.Config(embedding_bits=value)  # type: ignore[arg-type]


@pytest.mark.usefixtures("untranslated")
def test_presets_leave_tables_alone_unless_asked(tmp_path: Path) -> None:
    for options, expected in (({}, ["body"]), ({"embedding_bits": 4, "head_bits": 4}, ["embed", "body", "head"])):
        config = claq_export.Config(preset="claq-4", calibration=[IDS], **options)  # type: ignore[arg-type]
        result = claq_export.export(Language().eval(), (IDS,), tmp_path / "m.onnx", config, verify=False)
        assert [layer.name for layer in result.layers] == expected


def test_the_walk_sees_quantized_rows() -> None:
    """Layers after an embedding are calibrated on its quantized rows, not on the original ones."""
    from claq_export.algorithm import Hessian, LayerSettings, quantize_layer

    config = claq_export.Config(bits=2, embedding_bits=2, calibration=[IDS], samples=1)
    original = Language().eval()
    model = claq_export.quantize(Language().eval(), (IDS,), config)
    hessian = Hessian(45, token_clip=config.token_clip)
    hessian.add(model.embed(IDS).reshape(-1, 45))
    expected = quantize_layer(original.body.weight.detach(), hessian, LayerSettings(bits=2))
    assert torch.equal(expected.layer.dequantize(), model.body.layer.dequantize())

"""The accuracy guard: limits, exit status, the table of layers, and artifacts that do not belong to the model."""

import json
import math

import onnx
import pytest
import torch
from tiny_models import save_tiny_bert, save_tiny_llama, sentences

from claq_export import Config, export
from claq_export.cli import main
from claq_export.errors import ConfigError, FormatError
from claq_export.evaluation.guard import Check, guard
from claq_export.evaluation.layers import artifact_layers, layer_errors
from claq_export.evaluation.models import TorchModel


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences(60, seed=4)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny Llama and its 2-bit artifact."""
    folder = tmp_path_factory.mktemp("decoder")
    source = save_tiny_llama(folder / "model")
    config = Config(bits=2, calibration=sentences(40), samples=8, sequence_length=32)
    export(source, out=folder / "out" / "model.onnx", config=config, verify=False)
    return source, folder / "out"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    source = save_tiny_bert(folder / "model")
    config = Config(bits=2, calibration=sentences(40), samples=8, sequence_length=32)
    export(source, out=folder / "out" / "model.onnx", config=config, verify=False)
    return source, folder / "out"


def test_exit_status_follows_the_limit(decoder, text, capsys):
    source, artifact = decoder
    command = ["verify", str(artifact / "model.onnx"), "--against", str(source), "--text", str(text), "--context", "32"]
    assert main([*command, "--max-kl", "10"]) == 0
    capsys.readouterr()
    assert main([*command, "--max-kl", "0", "--json"]) == 8
    output = capsys.readouterr()
    assert "kl_mean is" in output.err
    assert "at most 0 is allowed" in output.err
    found = json.loads(output.out)
    assert not found["passed"]
    assert found["checks"][0]["value"] == found["measures"]["kl_mean"] > 0
    worst = [layer["output_error"] for layer in found["layers"]]
    assert worst == sorted(worst, reverse=True)
    assert {"layers.0.self_attn.q_proj+k_proj+v_proj", "layers.1.mlp.down_proj"} <= {
        layer["name"].removeprefix("model.") for layer in found["layers"]
    }


def test_layer_errors_agree_with_the_weights_by_hand(decoder):
    from claq_export.capture import load_pretrained

    source, artifact = decoder
    model, _, _ = load_pretrained(source)
    tokens = torch.randint(5, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    found = {
        e.name: e
        for e in layer_errors(artifact / "model.onnx", model.model, lambda: TorchModel(model.model).logits(tokens))
    }
    layers = {entry.name: entry for entry in artifact_layers(artifact / "model.onnx")}
    inputs = {}
    module = model.model.get_submodule("model.layers.0.self_attn.k_proj")
    handle = module.register_forward_hook(lambda _, args, __: inputs.update(x=args[0].detach().reshape(-1, 64)))
    TorchModel(model.model).logits(tokens)
    handle.remove()
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    attention = model.model.get_submodule("model.layers.0.self_attn")
    weight = torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]).detach()
    difference = layers[name].layer.dequantize() - weight
    assert found[name].weight_error == pytest.approx(float(difference.square().sum() / weight.square().sum()), rel=1e-4)
    lost = (inputs["x"] @ difference.T).square().sum() / (inputs["x"] @ weight.T).square().sum()
    assert found[name].output_error == pytest.approx(float(lost), rel=1e-4)


def test_both_forms_of_an_artifact_measure_alike(decoder, text):
    source, artifact = decoder
    options = {"context": 32, "windows": 4, "library": "none"}
    from_onnx = guard(artifact / "model.onnx", source, text, {"max_kl": 9.0}, **options)
    torch_only = artifact.parent / "torch-only"
    torch_only.mkdir()
    for file in artifact.iterdir():
        if not file.name.startswith("model.onnx"):
            (torch_only / file.name).write_bytes(file.read_bytes())
    from_torch = guard(torch_only, source, text, {"max_kl": 9.0}, **options)
    assert from_onnx.measures["kl_mean"] == pytest.approx(from_torch.measures["kl_mean"], rel=1e-2)
    assert [e.name for e in from_onnx.layers] == [e.name for e in from_torch.layers]


def test_encoders_are_measured_by_cosine(encoder, text, capsys):
    source, artifact = encoder
    command = ["verify", str(artifact), "--against", str(source), "--text", str(text)]
    assert main([*command, "--min-cosine", "0.3"]) == 0
    assert main([*command, "--min-cosine", "0.99999", "--no-layers"]) == 8
    assert "cosine_mean" in capsys.readouterr().err
    assert main([*command, "--max-kl", "1"]) == 2
    assert "--min-cosine" in capsys.readouterr().err


def test_a_limit_is_needed_and_must_be_known(decoder, text):
    source, artifact = decoder
    with pytest.raises(ConfigError, match="--max-kl"):
        guard(artifact, source, text, {})
    with pytest.raises(ConfigError, match="max_kld"):
        guard(artifact, source, text, {"max_kld": 1.0})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_holds_no_limit(value):
    assert not Check("max_kl", "kl_mean", 1.0, value).passed
    assert not Check("min_top1", "top1_agreement", 0.0, value).passed


def test_an_artifact_of_another_model_is_named(decoder, encoder, text):
    other_source, _ = encoder
    _, artifact = decoder
    from claq_export.capture import load_pretrained

    model, _, _ = load_pretrained(other_source)
    with pytest.raises(FormatError, match="does not have in that size"):
        layer_errors(artifact / "model.onnx", model.model, lambda: None)


def test_external_data_outside_the_folder_is_refused_before_anything_runs(decoder, text, tmp_path):
    source, artifact = decoder
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.data"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FormatError, match="outside"):
        guard(tmp_path / "model.onnx", source, text, {"max_kl": 1.0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, data: data.unlink(), "cannot be read: No such file"),
        (lambda folder, data: data.write_bytes(data.read_bytes()[:1000]), "is truncated: initializer"),
        (lambda folder, data: (folder / "model.onnx").write_bytes(b""), "is not an ONNX model: it has no graph"),
        (lambda folder, data: (folder / "model.onnx").write_bytes(b"\xff" * 99), "is not an ONNX model"),
    ],
    ids=["no-data", "short-data", "empty", "garbage"],
)
def test_a_damaged_artifact_has_its_own_exit_status(decoder, text, tmp_path, capsys, damage, message):
    source, artifact = decoder
    onnx.save(
        onnx.load(artifact / "model.onnx"), tmp_path / "model.onnx", save_as_external_data=True, location="model.data"
    )
    damage(tmp_path, tmp_path / "model.data")
    options = ["verify", str(tmp_path / "model.onnx"), "--against", str(source), "--text", str(text), "--max-kl", "1"]
    assert main(options) == 6
    assert message in capsys.readouterr().err

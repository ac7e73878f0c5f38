"""The accuracy guard: limits, exit status, the table of layers, and artifacts that do not belong to the model."""

import json
import math
from types import SimpleNamespace

import onnx
import pytest
import torch
from tiny_models import save_tiny_bert, save_tiny_llama, save_tokenizer, sentences

from claq_export import Config, export
from claq_export.cli import main
from claq_export.errors import ConfigError, FormatError
from claq_export.evaluation.guard import Check, GuardReport, _logits_quality, guard
from claq_export.evaluation.layers import LayerError, artifact_layers, layer_errors
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


def test_a_classifier_that_returns_nan_holds_no_limit():
    """``argmax`` of NaN is 0, which the original says of every sentence."""

    class Classifier:
        def __init__(self, *logits):
            self.row = torch.tensor(logits)

        def __call__(self, input_ids, attention_mask, return_dict=True):
            return SimpleNamespace(logits=self.row.repeat(len(input_ids), 1))

    def tokenizer(texts, **_):
        ones = torch.ones(len(texts), 4, dtype=torch.int64)
        return {"input_ids": ones, "attention_mask": ones}

    def measured(candidate, *logits):
        original = SimpleNamespace(model=Classifier(*logits), max_sequence=64)
        return _logits_quality(SimpleNamespace(module=candidate), original, tokenizer, ["a"] * 3)

    found = measured(Classifier(math.nan, math.nan), 2.0, -2.0)
    assert not Check("min_top1", "top1_agreement", 0.5, found["top1_agreement"]).passed
    assert not Check("max_kl", "kl_mean", 9.0, found["kl_mean"]).passed
    masked = measured(Classifier(2.0, -math.inf), 2.0, -math.inf)
    assert (masked["kl_mean"], masked["top1_agreement"]) == (0.0, 1.0)


def test_layers_of_a_mixture_of_experts_are_compared(text, tmp_path, capsys):
    from transformers import MixtralConfig, MixtralForCausalLM

    source = tmp_path / "model"
    source.mkdir()
    config = MixtralConfig(
        vocab_size=save_tokenizer(source),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(source)
    artifact = tmp_path / "out" / "model.onnx"
    export(source, out=artifact, config=Config(bits=4, calibration="none"), verify=False)
    layers = {e.name: e for e in artifact_layers(artifact)}
    expert = next(name for name in layers if name.endswith("down_proj.1"))
    experts = model.state_dict()[expert.removesuffix(".1")]
    report = guard(artifact, source, text, {"max_kl": 9.0}, context=16, windows=1)
    found = {e.name: e.weight_error for e in report.layers}
    lost = (layers[expert].layer.dequantize() - experts[1]).square().sum() / experts[1].square().sum()
    assert found[expert] == pytest.approx(float(lost), rel=1e-4)
    assert max(found.values()) < 0.1
    torch_only = tmp_path / "torch-only"
    torch_only.mkdir()
    for name in ("claq.safetensors", "claq.json"):
        (torch_only / name).write_bytes((artifact.parent / name).read_bytes())
    assert {e.name: e.weight_error for e in layer_errors(torch_only, model, lambda: None)} == pytest.approx(found)
    fewer = MixtralForCausalLM(MixtralConfig(**{**config.to_diff_dict(), "num_local_experts": 1}))
    with pytest.raises(FormatError, match=r"_proj\.1', which the model compared with does not have in that size"):
        layer_errors(artifact, fewer, lambda: None)


class Square(torch.nn.Module):
    """A square weight that its shape does not show to be transposed, beside a linear that is not."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
        self.projection = torch.nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x):
        return torch.tanh(self.linear(x)) @ self.projection


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = Square().eval(), tmp_path_factory.mktemp("square")
    config = Config(bits=4, calibration="none")
    export(model, (torch.randn(4, 32),), out=folder / "model.onnx", config=config, verify=False)
    return model, folder


@pytest.mark.parametrize("form", ["model.onnx", "."])
def test_square_weights_are_compared_as_they_are_stored(square, form):
    model, folder = square
    errors = {e.name: e.weight_error for e in layer_errors(folder / form, model, lambda: None)}
    assert set(errors) == {"linear", "projection"}
    assert max(errors.values()) < 0.05


@pytest.mark.parametrize("text", ["{", "3", '["a", 1]'])
def test_metadata_of_transposed_layers_is_validated(square, tmp_path, text):
    model, folder = square
    for data in folder.glob("model.onnx?*"):
        (tmp_path / data.name).write_bytes(data.read_bytes())
    file = onnx.load(folder / "model.onnx", load_external_data=False)
    next(entry for entry in file.metadata_props if entry.key == "claq.transposed").value = text
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(FormatError, match=r"metadata 'claq\.transposed'"):
        layer_errors(tmp_path / "model.onnx", model, lambda: None)


def test_an_encoder_is_given_no_more_tokens_than_it_takes(encoder, tmp_path):
    source, artifact = encoder
    text = tmp_path / "long.txt"
    text.write_text("people of the country " * 40 + "\nthe of and\n", encoding="utf-8")
    report = guard(artifact / "model.onnx", source, text, {"min_cosine": -1.0}, layers=False)
    assert report.passed


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


@pytest.fixture
def report_of_nan(monkeypatch):
    """``verify`` finds an artifact whose logits are NaN."""
    check = Check("max_kl", "kl_mean", 1.0, math.nan)
    layer = LayerError("layers[0].[/b]", 4, 4, 4.0, math.inf, math.nan)
    measures = {"kl_mean": math.nan, "perplexity": math.inf, "windows": 2.0}
    report = GuardReport("o/[draft]/m.onnx", "m[/i]", "text-generation", measures, (check,), (layer,))
    monkeypatch.setattr("claq_export.evaluation.guard_command.guard", lambda *_, **__: report)
    return ["verify", "o", "--against", "m", "--text", "t", "--max-kl", "1"]


def test_measures_that_are_no_numbers_break_the_limit(report_of_nan, capsys):
    assert main(report_of_nan) == 8
    output = capsys.readouterr()
    assert "kl_mean is nan" in output.err
    assert all(word in output.out for word in ("nan", "inf", "broken"))
    # Names and paths are no markup.
    assert "o/[draft]/m.onnx against m[/i]" in output.out
    assert "layers[0].[/b]" in output.out


def test_measures_that_are_no_numbers_are_strings_in_json(report_of_nan, capsys):
    assert main([*report_of_nan, "--json"]) == 8
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert "Infinity" not in text
    found = json.loads(text)
    assert found["measures"] == {"kl_mean": "nan", "perplexity": "inf", "windows": 2.0}
    assert found["checks"][0]["value"] == "nan"
    assert (found["layers"][0]["weight_error"], found["layers"][0]["output_error"]) == ("inf", "nan")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-kl", "nan"),
        ("--min-top1", "inf"),
        ("--windows", "-1"),
        ("--context", "0"),
        ("--worst", "-1"),
        ("--threads", "-2"),
    ],
)
def test_options_out_of_range(option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "o", "--against", "m", "--text", "t", "--max-kl", "1", option, value])
    assert exit_.value.code == 2
    assert f"argument {option}: {value} is not" in capsys.readouterr().err


def test_settings_out_of_range(decoder, text):
    source, artifact = decoder
    with pytest.raises(ConfigError, match="limit max_kl must be a finite number, got nan"):
        guard(artifact, source, text, {"max_kl": math.nan})
    with pytest.raises(ConfigError, match="windows must be a positive number or None, got -1"):
        guard(artifact, source, text, {"max_kl": 1.0}, windows=-1)
    with pytest.raises(ConfigError, match="threads"):
        guard(artifact / "model.onnx", source, text, {"max_kl": 1.0}, threads=-2)
    with pytest.raises(ConfigError, match="--context 65: the model takes at most 64 tokens"):
        guard(artifact, source, text, {"max_kl": 1.0}, context=65)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_a_folder_without_onnx_file_is_of_the_task_of_the_export(kind, text, tmp_path):
    """The last one is a classifier, exported as an encoder."""
    import transformers

    source = save_tiny_bert(tmp_path / "model")
    if kind != "BertModel":
        model = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(source))
        model.save_pretrained(source)
    else:
        transformers.BertForSequenceClassification.from_pretrained(source).save_pretrained(source)
    task = "feature-extraction" if kind == "BertModel" else None
    config = Config(bits=4, calibration="none")
    export(source, out=tmp_path / "out" / "model.onnx", config=config, task=task, verify=False)
    for path in (tmp_path / "out").glob("model.onnx*"):
        path.unlink()
    limits = {"min_cosine": 0.9} if task else {"max_kl": 1.0}
    report = guard(tmp_path / "out", source, text, limits, windows=2, layers=False)
    assert report.passed
    assert report.measures.get("cosine_mean", 1.0) > 0.9

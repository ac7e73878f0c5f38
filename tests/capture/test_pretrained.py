"""Hugging Face folders: tasks, inputs and outputs, agreement with transformers, and all ways to be damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from claq_export.capture import CapturedModel, TaskModel, capture_module, capture_pretrained, load_pretrained
from claq_export.capture.tasks import canonical_task, infer_task
from claq_export.errors import ModelError
from claq_export.inputs import check_sizes


def random_inputs(captured: CapturedModel, batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 3 :] = 0
    return captured.inputs_from_tokens(tokens, mask)


SIZES = [(1, 1), (1, 9), (2, 8), (5, 33)]


@pytest.mark.parametrize("which", ["tiny_bert", "tiny_llama"])
def test_numbers_are_those_of_transformers(which, request):
    folder = request.getfixturevalue(which)
    captured = capture_pretrained(folder)
    kind = transformers.AutoModel if which == "tiny_bert" else transformers.AutoModelForCausalLM
    reference = kind.from_pretrained(folder).eval()
    if which == "tiny_bert":
        assert captured.task == "feature-extraction"
        assert captured.input_names == ("input_ids", "attention_mask", "token_type_ids")
        assert captured.output_names == ("last_hidden_state",)
    else:
        assert captured.task == "text-generation"
        assert captured.input_names == ("input_ids", "attention_mask", "position_ids")
        assert captured.output_names == ("logits",)
    assert captured.tokenizer is not None
    assert captured.max_sequence == 64
    assert len(captured.source.sha256) == 64
    assert captured.source.path == str(folder)
    state = {name for name, _ in (*reference.named_parameters(remove_duplicate=False), *reference.named_buffers())}
    fetched = {str(node.target) for node in captured.graph_module.graph.nodes if node.op == "get_attr"}
    assert not [name for name in fetched - state if not name.startswith("lifted_tensor")]
    for batch, length in SIZES:
        inputs = random_inputs(captured, batch, length, 60)
        with torch.no_grad():
            expected = getattr(reference(**inputs), captured.output_names[0])
        torch.testing.assert_close(captured.run(inputs)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:# The axis name")
def test_emission_of_an_unmodified_capture_runs_at_other_sizes(tiny_llama, tmp_path):
    """What the emission stage relies on: torch.onnx.export of the graph keeps both axes dynamic."""
    onnxruntime = pytest.importorskip("onnxruntime")
    captured = capture_pretrained(tiny_llama)
    program = torch.onnx.export(
        captured.graph_module,
        kwargs=captured.example_inputs,
        dynamo=True,
        dynamic_shapes=captured.dynamic_shapes,
        input_names=list(captured.input_names),
        output_names=list(captured.output_names),
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "sequence"]] * 3
    for batch, length in SIZES:
        inputs = random_inputs(captured, batch, length, 99)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), captured.run(inputs)[0], rtol=0, atol=1e-4)


def small(kind: str, **more: object) -> dict[str, object]:
    return {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        **more,
    }


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "BertForMaskedLM": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**small("bert"))),
        "fill-mask",
        ("input_ids", "attention_mask", "token_type_ids"),
    ),
    "RobertaForSequenceClassification": (
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**small("roberta", type_vocab_size=1, pad_token_id=1))
        ),
        "text-classification",
        ("input_ids", "attention_mask"),
    ),
    "T5EncoderModel": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        ),
        "feature-extraction",
        ("input_ids", "attention_mask"),
    ),
    "OPTForCausalLM": (
        lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**small("opt", ffn_dim=48, word_embed_proj_dim=16))),
        "text-generation",
        ("input_ids", "attention_mask"),
    ),
    "GPT2LMHeadModel": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        "text-generation",
        ("input_ids", "attention_mask", "position_ids"),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_from_its_folder(name, tmp_path):
    make, task, inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    original = make().eval()
    original.save_pretrained(tmp_path)
    model, tokenizer, found = load_pretrained(tmp_path)
    assert (found, tokenizer, model.input_names) == (task, None, inputs)
    captured = capture_module(model)
    assert captured.dynamic_axes == {name: {0: "batch", 1: "sequence"} for name in inputs}
    for batch, length in [(1, 1), (3, 17)]:
        named = model.example_inputs(batch, length)
        with torch.no_grad():
            expected = model(*named.values())
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(captured.run(named)[0], expected, rtol=0, atol=1e-6)


def test_dtype(tiny_bert):
    model, _, _ = load_pretrained(tiny_bert, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_task_forced_and_by_alias(tiny_llama):
    model, _, task = load_pretrained(tiny_llama, task="causal-lm")
    assert task == "text-generation"
    assert model.output_names == ("logits",)
    base, _, task = load_pretrained(tiny_llama, task="feature-extraction")
    assert (task, base.output_names) == ("feature-extraction", ("last_hidden_state",))


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("DistilBertForSequenceClassification", "text-classification"),
    ],
)
def test_task_of_architecture(architecture, task):
    assert infer_task([architecture]).name == task


def test_ragged_tokens_are_padded(tiny_bert):
    captured = capture_module(TaskModel(transformers.AutoModel.from_pretrained(tiny_bert), "feature-extraction"))
    inputs = captured.inputs_from_tokens([[5, 6, 7], [8]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    alone = captured.run(captured.inputs_from_tokens([[8]]))[0][0, 0]
    torch.testing.assert_close(captured.run(inputs)[0][1, 0], alone, rtol=0, atol=1e-5)


# --- folders that cannot be used


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = []
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2]), 1):
        path = folder / f"model-{index:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, path.name))
        files.append(path)
    (folder / "model.safetensors").unlink()
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    return files


def test_shards_are_read(folder, tiny_bert):
    shard(folder)
    sharded, whole = load_pretrained(folder)[0], load_pretrained(tiny_bert)[0]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)
    assert sharded.source.sha256 != whole.source.sha256


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config.json is missing"


def config_no_json(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")
    return r"config.json cannot be read as JSON"


def config_list(folder):
    (folder / "config.json").write_text("[]", encoding="utf-8")
    return r"config.json must hold a JSON object, found list"


def config_half_a_character(folder):
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"bert"', '"\\ud800"', 1), encoding="utf-8")
    return r"config.json cannot be read as JSON: half of a surrogate pair"


def generation_config_no_json(folder):
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    return r"generation_config.json cannot be read as JSON"


def unknown_architecture(folder):
    edit_config(folder, model_type="bertt")
    return r"unknown architecture 'bertt' .*transformers \S+ knows \d+ .*near: bert"


def no_architecture(folder):
    edit_config(folder, model_type=None)
    return r"has no model_type"


def architecture_without_task(folder):
    edit_config(folder, architectures=["BertForQuestionAnswering"])
    return r"BertForQuestionAnswering belongs to no task claq knows \(feature-extraction, .*--task"


def no_architectures(folder):
    edit_config(folder, architectures=None)
    return r"names no architecture, so the task is unknown; choose it with --task"


def already_quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    return r"already quantized \(gptq\)"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"has no weights: expected model.safetensors"


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return r"pytorch_model.bin is a pickle"


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model.safetensors is truncated: its header promises \d+ bytes, the file has \d+"


def truncated_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    return r"is truncated: the header alone takes"


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return r"is truncated: 0 bytes"


def too_long(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    return r"is damaged: its header promises"


def absurd_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    return r"is no safetensors file: its header would be"


def header_no_json(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"abcd")
    return r"is no safetensors file: its header cannot be read"


def missing_shard(folder):
    shard(folder)[1].unlink()
    return r"1 of 2 weight files are missing from .*: model-00002-of-00002.safetensors"


def truncated_shard(folder):
    path = shard(folder)[1]
    path.write_bytes(path.read_bytes()[:-4])
    return r"model-00002-of-00002.safetensors is truncated"


def tensor_in_wrong_shard(folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    name = "encoder.layer.0.output.dense.weight"
    index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
    path.write_text(json.dumps(index), encoding="utf-8")
    return r"lacks tensor 'encoder.layer.0.output.dense.weight', which model.safetensors.index.json places there"


def missing_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight"))
    return r"lacks 1 weights that BertModel needs for feature-extraction: encoder.layer.1.output.dense.weight"


def wrong_shape(folder):
    def change(tensors):
        tensors["encoder.layer.1.output.dense.weight"] = tensors["encoder.layer.1.output.dense.weight"][:, :-1].clone()

    edit_weights(folder, change)
    return r"asks for encoder.layer.1.output.dense.weight of shape \[64, 160\], the file holds \[64, 159\]"


def not_a_number(folder):
    def change(tensors):
        tensors["encoder.layer.0.attention.self.key.weight"][3, 5] = torch.nan

    edit_weights(folder, change)
    return r"NaN or infinite weights in encoder.layer.0.attention.self.key.weight"


def infinite(folder):
    def change(tensors):
        tensors["embeddings.LayerNorm.bias"][0] = torch.inf

    edit_weights(folder, change)
    return r"NaN or infinite weights in embeddings.LayerNorm.bias"


DAMAGES = [
    no_config,
    config_no_json,
    config_list,
    config_half_a_character,
    generation_config_no_json,
    unknown_architecture,
    no_architecture,
    architecture_without_task,
    no_architectures,
    already_quantized,
    no_weights,
    only_pickle,
    truncated,
    truncated_header,
    empty_file,
    too_long,
    absurd_header,
    header_no_json,
    missing_shard,
    truncated_shard,
    tensor_in_wrong_shard,
    missing_tensor,
    wrong_shape,
    not_a_number,
    infinite,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_refused_by_name(folder, damage):
    message = damage(folder)
    with pytest.raises(ModelError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": -1},
            r"config.json: num_hidden_layers is -1, expected a whole number from 1 to 1000; .* tensors",
        ),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 10**400}, r"num_hidden_layers is a number beyond 64 bits"),
        ({"num_hidden_layers": "12"}, r"num_hidden_layers is '12'"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True"),
        ({"head_dim": -8}, r"head_dim is -8, expected a whole number from 0 to"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5"),
        ({"num_attention_heads": -1}, r"num_attention_heads is -1, expected a whole number from 1 to"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0"),
        ({"hidden_size": -64}, r"hidden_size is -64"),
        ({"hidden_size": 1 << 20}, r"of shape \[.*1048576.*\], the file holds"),
        ({"vocab_size": 10**12}, r"vocab_size is 1000000000000"),
        ({"vocab_size": 1 << 24}, r"word_embeddings.weight of shape \[16777216, 64\], the file holds"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings is 0"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps is NaN"),
        ({"vision_config": {"hidden_size": [64, -1]}}, r"vision_config.hidden_size is -1"),
        ({"num_hidden_layers": 400}, r"describes a model of \d+ parameters; its files hold \d+"),
    ],
    ids=str,
)
@pytest.mark.parametrize("lazy", [False, True])
def test_sizes_that_cannot_be_are_named_before_anything_is_made(folder, changes, message, lazy):
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_pretrained(folder, lazy=lazy)


def test_sizes_of_models_in_use_are_accepted():
    """The defaults of transformers' own configurations, nested ones included."""
    for kind in (
        "bert",
        "albert",
        "t5",
        "gpt2",
        "llama",
        "mixtral",
        "gemma3",
        "qwen2_moe",
        "mamba2",
        "clip",
        "vit",
        "swin",
    ):
        check_sizes(AutoConfig.for_model(kind).to_dict(), 1, kind, ModelError)
    # What some others of the 800 or so have.
    for config in (
        {"head_dim": 0},
        {"shared_intermediate_size": 0},
        {"max_position_embeddings": 1200.0},
        {"n_inner": None},
    ):
        check_sizes(config, 1, "config.json", ModelError)


def test_checkpoint_without_the_head_of_the_task(folder):
    with pytest.raises(ModelError, match=r"lacks \d+ weights that BertForSequenceClassification needs .*classifier"):
        load_pretrained(folder, task="text-classification")


def test_missing_pooler_is_no_harm_and_not_random(folder):
    assert not any("pooler" in name for name in load_file(folder / "model.safetensors"))
    model, _, task = load_pretrained(folder)
    assert task == "feature-extraction"
    assert all(not parameter.any() for name, parameter in model.named_parameters() if "pooler" in name)


def test_task_that_the_architecture_does_not_have(tiny_llama):
    with pytest.raises(ModelError, match="no fill-mask model for architecture 'llama'"):
        load_pretrained(tiny_llama, task="fill-mask")


def test_unknown_task(tiny_bert):
    with pytest.raises(ModelError, match=r"unknown task 'translate'; known tasks: feature-extraction, text-class"):
        load_pretrained(tiny_bert, task="translate")
    with pytest.raises(ModelError, match="unknown task ''"):
        canonical_task("")


def test_paths_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match=r"model folder .*/absent does not exist"):
        load_pretrained(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file; expected a folder"):
        load_pretrained(tmp_path / "model.bin")


def test_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match=r"claq-tests/absent is no folder here, and the Hugging Face hub does not give"
    ):
        load_pretrained("claq-tests/absent")


# --- where the files are


@pytest.fixture
def hub_id(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A hub id and its snapshot folder, in a cache of the hub's layout: files are links into the folder of blobs."""
    repository = tmp_path / "hub" / "models--claq-tests--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_bert, repository / "blobs")
    (repository / "blobs" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "claq-tests/tiny", snapshot


def test_the_source_of_a_hub_id_is_its_folder_in_the_cache(hub_id):
    name, snapshot = hub_id
    model, tokenizer, _ = load_pretrained(name)
    assert (model.source.path, model.source.folder) == (name, snapshot)
    assert tokenizer is not None


def test_chat_templates_are_fetched_from_the_hub(monkeypatch):
    def offline(name, allow_patterns):
        raise OSError(f"asked for {allow_patterns}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"asked for .*\*\.jinja"):
        load_pretrained("claq-tests/tiny")


def test_what_lies_beside_a_model_goes_along_from_the_hub_and_from_home(hub_id, tiny_bert, tmp_path, monkeypatch):
    from claq_export import Config, export

    monkeypatch.setenv("HOME", str(tiny_bert.parent))
    for model, more in ((hub_id[0], {"chat_template.jinja"}), (f"~/{tiny_bert.name}", set())):
        out = tmp_path / Path(model).name / "model.onnx"
        export(model, out=out, config=Config(calibration="none"), verify=False)
        found = {path.name for path in out.parent.iterdir()}
        assert found >= {"config.json", "tokenizer.json", "tokenizer_config.json", *more}
        assert json.loads((out.parent / "config.json").read_text())["quantization_config"]["quant_method"] == "claq"


def test_a_tokenizer_of_special_tokens_alone_is_none(folder, caplog):
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    assert (folder / "tokenizer_config.json").is_file()
    assert load_pretrained(folder)[1] is None
    assert any(str(folder) in entry.message and "vocabulary" in entry.message for entry in caplog.records)


def test_an_interruption_that_another_error_tells_of_is_one(folder, monkeypatch):
    def interrupted(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'BertModel'") from error

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pretrained(folder)

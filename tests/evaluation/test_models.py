"""The same windows through PyTorch and ONNX Runtime give the same numbers; what cannot be opened is named."""

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_models import save_tiny_bert, save_tokenizer

from claq_export import Config, export
from claq_export.errors import ConfigError, FormatError, ModelError
from claq_export.evaluation import (
    OnnxModel,
    TorchModel,
    language_quality,
    open_model,
    open_tokenizer,
    runtime_library,
    sequence_limit,
)
from claq_export.evaluation.command import TASKS, add_eval_command

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"


def bigram_onnx(path, table, *, past=False, inputs=("input_ids", "attention_mask", "position_ids")):
    """An ONNX language model whose logits are rows of a table; the mask and positions are read but change nothing."""
    vocabulary = table.shape[0]
    nodes = [helper.make_node("Gather", ["table", inputs[0]], ["picked"])]
    last = "picked"
    for name in inputs[1:]:
        nodes += [
            helper.make_node("Sub", [name, name], [f"{name}_zero"]),
            helper.make_node("Cast", [f"{name}_zero"], [f"{name}_float"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", [f"{name}_float", "two"], [f"{name}_wide"]),
            helper.make_node("Add", [last, f"{name}_wide"], [f"after_{name}"]),
        ]
        last = f"after_{name}"
    graph_inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in inputs]
    if past:
        shape = ["batch", 2, "past", 3]
        graph_inputs.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, shape))
        nodes += [
            helper.make_node("ReduceSum", ["past_key_values.0.key"], ["sum"], keepdims=0),
            helper.make_node("Add", [last, "sum"], ["after_past"]),
        ]
        last = "after_past"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "bigram",
        graph_inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])],
        [numpy_helper.from_array(table.numpy(), "table"), helper.make_tensor("two", TensorProto.INT64, [1], [2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def table():
    return torch.randn(19, 19, generator=torch.Generator().manual_seed(0))


class Lookup(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens):
        return (self.table[tokens],)


@pytest.mark.parametrize("past", [False, True])
def test_onnx_and_torch_give_the_same_quality(tmp_path, table, past):
    windows = torch.randint(0, 19, (2, 30), generator=torch.Generator().manual_seed(1))
    file = bigram_onnx(tmp_path / "m.onnx", table, past=past)
    quality = language_quality(open_model(file, causal=True), windows, TorchModel(Lookup(table)))
    assert quality.kl_mean == pytest.approx(0, abs=1e-7)
    assert quality.perplexity == pytest.approx(quality.reference_perplexity, rel=1e-6)


def test_a_single_input_of_any_name_is_the_tokens(tmp_path, table):
    file = bigram_onnx(tmp_path / "m.onnx", table, inputs=("tokens",))
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(OnnxModel(file).logits(tokens), table[tokens])


def test_inputs_that_text_cannot_fill_are_named(tmp_path, table):
    file = bigram_onnx(tmp_path / "m.onnx", table, inputs=("input_ids", "pixels"))
    with pytest.raises(ModelError, match="'pixels'"):
        OnnxModel(file).logits(torch.tensor([[1]]))
    with pytest.raises(ModelError, match="no input 'input_ids'"):
        OnnxModel(bigram_onnx(tmp_path / "n.onnx", table, inputs=("tokens", "pixels")))


def test_missing_and_broken_models_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.onnx' does not exist"):
        open_model(tmp_path / "nothing.onnx", causal=True)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"cannot load .*broken\.onnx"):
        open_model(tmp_path / "broken.onnx", causal=True)
    with pytest.raises(ModelError, match="cannot load"):
        open_model(tmp_path, causal=True)
    with pytest.raises(ModelError, match="no tokenizer found"):
        open_tokenizer(tmp_path, None)
    with pytest.raises(ConfigError, match="runtime library"):
        runtime_library(tmp_path / "lib.so")
    assert runtime_library("none") is None


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs shared/data/stories260k beside the checkout")
def test_perplexity_of_a_real_model_against_transformers_own_loss():
    model = open_model(STORIES, causal=True)
    # What the model itself tells, greedily: text it must find likely.
    tokens = [1]
    for _ in range(63):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    windows = torch.tensor(tokens).reshape(2, 32)
    quality = language_quality(model, windows, model)
    losses = [model.module(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert quality.negative_log_likelihood == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert quality.kl_max == 0.0
    assert 1 < quality.perplexity < 10
    shuffled = windows.flatten()[torch.randperm(64, generator=torch.Generator().manual_seed(0))].reshape(2, 32)
    assert language_quality(model, shuffled).perplexity > 10 * quality.perplexity


@pytest.fixture
def parser():
    import argparse

    main = argparse.ArgumentParser()
    add_eval_command(main.add_subparsers())
    return main


def test_command_measures_a_folder_and_prints_json(tmp_path, parser, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {"<unk>": 0} | {chr(c): c - 96 for c in range(97, 123)}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=27,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 3, encoding="utf-8")
    (tmp_path / "l.jsonl").write_text('{"text": "ab cd"}\n{"text": "ef gh"}\n', encoding="utf-8")
    folder, text = str(tmp_path / "model"), str(tmp_path / "text.txt")

    arguments = parser.parse_args(["eval", folder, "--text", text, "--context", "16", "--reference", folder, "--json"])
    assert arguments.run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["windows"], answer["predicted"], answer["kl_mean"], answer["top1_agreement"]) == (4, 60, 0.0, 1.0)
    assert 20 < answer["perplexity"] < 36  # untrained: about the vocabulary's size

    arguments = parser.parse_args(["eval", folder, "--task", "lambada", "--text", str(tmp_path / "l.jsonl"), "--quiet"])
    assert arguments.run(arguments) == 0
    table = capsys.readouterr().out
    assert "accuracy" in table
    assert "passages" in table


@pytest.mark.parametrize("task", [t for t in TASKS if t != "harness"])
def test_command_asks_for_the_task_data(tmp_path, parser, task):
    arguments = parser.parse_args(["eval", "m", "--task", task, "--reference", "m"])
    with pytest.raises(ConfigError, match="--text FILE"):
        arguments.run(arguments)


@pytest.mark.parametrize("task", ["kl", "embedding"])
def test_command_asks_for_the_reference(parser, task):
    arguments = parser.parse_args(["eval", "m", "--task", task, "--text", "t"])
    with pytest.raises(ConfigError, match="--reference"):
        arguments.run(arguments)


# --- what would give a wrong number, or a traceback


def one_output_onnx(path, name, width=8, rank=3):
    """A model of tokens whose one output ``[batch, sequence, width]`` (or ``[batch, width]``) has a name."""
    table = torch.randn(127, width, generator=torch.Generator().manual_seed(0)).numpy()
    nodes = [helper.make_node("Gather", ["table", "input_ids"], [name if rank == 3 else "rows"])]
    if rank == 2:
        nodes.append(helper.make_node("ReduceMax", ["rows", "one"], [name], keepdims=0))
    shape = ["batch", "sequence", width] if rank == 3 else ["batch", width]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(table, "table"), helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


TOKENS = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize("name", ["last_hidden_state", "sentence_embedding"])
def test_hidden_states_are_no_logits(tmp_path, name):
    model = OnnxModel(one_output_onnx(tmp_path / "m.onnx", name))
    with pytest.raises(ModelError, match=f"has no output 'logits'; its outputs are {name}$"):
        model.logits(TOKENS)


def test_logits_are_no_hidden_states(tmp_path):
    model = OnnxModel(one_output_onnx(tmp_path / "m.onnx", "logits"))
    with pytest.raises(ModelError, match="has no output 'last_hidden_state' or"):
        model.hidden(TOKENS, torch.ones_like(TOKENS))
    assert model.logits(TOKENS).shape == (1, 3, 8)


def test_a_row_of_classes_is_not_a_row_a_token(tmp_path):
    model = OnnxModel(one_output_onnx(tmp_path / "m.onnx", "logits", rank=2))
    with pytest.raises(ModelError, match=r"shape \[1, 8\] for tokens of shape \[1, 3\]"):
        model.logits(TOKENS)
    assert model.padded_logits(TOKENS, torch.ones_like(TOKENS)).shape == (1, 8)


def test_a_single_output_of_a_module_has_any_name(tmp_path):
    model = OnnxModel(one_output_onnx(tmp_path / "m.onnx", "output"))
    assert torch.equal(model.logits(TOKENS), model.hidden(TOKENS, torch.ones_like(TOKENS)))


def test_tokens_that_the_model_does_not_know_are_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot run .*m\.onnx"):
        OnnxModel(one_output_onnx(tmp_path / "m.onnx", "logits")).logits(torch.tensor([[500]]))


def test_threads_are_not_negative(tmp_path, parser, capsys):
    with pytest.raises(ConfigError, match="threads"):
        OnnxModel(one_output_onnx(tmp_path / "m.onnx", "logits"), threads=-2)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["eval", "m", "--threads", "-2"])
    assert exit_.value.code == 2
    assert "-2 is not a whole number, 0 or more" in capsys.readouterr().err


def test_weights_that_a_folder_lacks_are_not_random(tiny_bert):
    with pytest.raises(ModelError, match=r"lacks \d+ weights that BertLMHeadModel needs .* saved from BertModel"):
        open_model(tiny_bert, causal=True)
    with pytest.raises(ModelError, match=r"BertForSequenceClassification needs for text-classification: .*classifier"):
        open_model(tiny_bert, causal=False, task="text-classification")
    # The pooler, which the checkpoint lacks too, comes after what an encoder is asked for.
    hidden = [open_model(tiny_bert, causal=False).hidden(TOKENS, torch.ones_like(TOKENS)) for _ in range(2)]
    assert torch.equal(*hidden)


def test_a_folder_that_transformers_saved_quantized_has_its_weights(decoder_artifact, tmp_path):
    from transformers import AutoModelForCausalLM

    import claq_export.integrations.transformers  # noqa: F401

    AutoModelForCausalLM.from_pretrained(decoder_artifact).save_pretrained(tmp_path)
    assert not (tmp_path / "claq.safetensors").exists()
    with torch.no_grad():
        found, wanted = (open_model(folder, causal=True).logits(TOKENS) for folder in (tmp_path, decoder_artifact))
    torch.testing.assert_close(found, wanted)


def test_a_truncated_artifact_is_damaged(decoder_artifact, tmp_path):
    for path in decoder_artifact.iterdir():
        if not path.name.startswith("model.onnx"):
            (tmp_path / path.name).write_bytes(path.read_bytes()[: 3000 if path.suffix == ".safetensors" else None])
    with pytest.raises(FormatError, match=r"claq\.safetensors is truncated"):
        open_model(tmp_path, causal=True)


def test_a_tokenizer_that_was_named_is_not_replaced(tiny_llama, tmp_path, parser):
    text = tmp_path / "text.txt"
    text.write_text("the people of the country " * 20, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    arguments = parser.parse_args(
        ["eval", str(tiny_llama), "--text", str(text), "--context", "16", "--tokenizer", str(tmp_path / "empty")]
    )
    with pytest.raises(ModelError, match=r"the tokenizer in .*empty cannot be loaded"):
        arguments.run(arguments)
    assert len(open_tokenizer(tmp_path / "empty", tiny_llama)) == len(open_tokenizer(chosen=tiny_llama)) > 100


def test_a_configuration_alone_is_no_tokenizer(tiny_bert, tmp_path):
    """Of which transformers 5 makes a tokenizer that knows special tokens alone, so that every word is unknown."""
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"no tokenizer found; .*cannot be loaded"):
        open_tokenizer(tmp_path)
    assert len(open_tokenizer(tmp_path, tiny_bert)) > 100


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_a_string_in_json(parser, capsys, monkeypatch):
    values = {"perplexity": math.nan, "kl": {"mean": math.inf, "all": [-math.inf, 1.5]}, "windows": 3}
    monkeypatch.setattr("claq_export.evaluation.command.measure", lambda _: values)
    arguments = parser.parse_args(["eval", "m", "--json"])
    assert arguments.run(arguments) == 0
    found = strict_json(capsys.readouterr().out)
    assert (found["perplexity"], found["kl"]["mean"], found["kl"]["all"]) == ("nan", "inf", ["-inf", 1.5])
    assert found["windows"] == 3


def test_a_path_is_printed_as_it_is(parser, capsys, monkeypatch):
    monkeypatch.setattr("claq_export.evaluation.command.measure", lambda _: {"[i]perplexity": 1.5})
    path = f"o/y[draft]/[/b]:smile:{'/long' * 40}.onnx"
    arguments = parser.parse_args(["eval", path])
    assert arguments.run(arguments) == 0
    shown = capsys.readouterr().out
    assert f"perplexity: {path}\n" in shown
    assert "[i]perplexity" in shown


# --- what a model takes


def test_a_model_takes_what_its_configuration_says(tiny_llama, decoder_artifact, tmp_path, table):
    models = [open_model(folder, causal=True) for folder in (tiny_llama, decoder_artifact / "model.onnx")]
    assert [model.max_sequence for model in models] == [64, 64]
    assert sequence_limit(*models) == 64
    unknown = OnnxModel(bigram_onnx(tmp_path / "m.onnx", table))
    assert unknown.max_sequence is None
    assert sequence_limit(None, unknown, TorchModel(Lookup(table))) is None
    assert sequence_limit(unknown, models[0]) == 64


def test_a_file_of_an_encoder_takes_what_is_left_after_the_padding_index(tmp_path, table):
    file = bigram_onnx(tmp_path / "m.onnx", table)
    settings = {"model_type": "roberta", "max_position_embeddings": 20, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert OnnxModel(file).max_sequence == 18
    settings = {"model_type": "bert", "max_position_embeddings": 20, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert OnnxModel(file).max_sequence == 20
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        _ = OnnxModel(file).max_sequence


def test_windows_are_what_the_model_takes(tiny_gpt2, tmp_path, parser, capsys):
    text = tmp_path / "text.txt"
    text.write_text("people of the country " * 40, encoding="utf-8")
    passages = tmp_path / "l.jsonl"
    passages.write_text(json.dumps({"text": "people of the country " * 20 + "by"}), encoding="utf-8")
    command = ["eval", str(tiny_gpt2), "--json"]
    arguments = parser.parse_args([*command, "--text", str(text)])
    assert arguments.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 32
    arguments = parser.parse_args([*command, "--task", "lambada", "--text", str(passages)])
    assert arguments.run(arguments) == 0
    arguments = parser.parse_args([*command, "--text", str(text), "--context", "33"])
    with pytest.raises(ConfigError, match="--context 33: the model takes at most 32 tokens"):
        arguments.run(arguments)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """A GPT-2 whose table of positions has 32 rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=save_tokenizer(folder), **sizes, **special)).save_pretrained(folder)
    return folder


# --- models that see what they would have to predict


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A BERT with the head of a masked language model, and its artifact."""
    from transformers import AutoConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked")
    source = save_tiny_bert(folder / "model")
    BertForMaskedLM(AutoConfig.from_pretrained(source)).save_pretrained(source)
    export(source, out=folder / "out" / "model.onnx", config=Config(bits=4, calibration="none"), verify=False)
    return source, folder / "out"


@pytest.mark.parametrize("task", ["perplexity", "kl", "lambada", "harness"])
@pytest.mark.parametrize("form", ["folder", "onnx", "claq"])
def test_a_masked_language_model_has_no_perplexity(masked, task, form, tmp_path, parser):
    source, artifact = masked
    (tmp_path / "text").write_text("people of the country " * 40, encoding="utf-8")
    model = {"folder": source, "onnx": artifact / "model.onnx", "claq": artifact}[form]
    arguments = parser.parse_args(
        ["eval", str(model), "--task", task, "--text", str(tmp_path / "text"), "--reference", str(source)]
    )
    with pytest.raises(ModelError, match="is a masked language model"):
        arguments.run(arguments)


def test_a_file_of_a_masked_language_model_is_known_by_its_task_or_its_configuration(masked, tmp_path):
    _, artifact = masked
    for path in artifact.glob("model.onnx*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="is a masked language model"):
        open_model(tmp_path / "model.onnx", causal=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    open_model(tmp_path / "model.onnx", causal=True)
    (tmp_path / "config.json").write_bytes((artifact / "config.json").read_bytes())
    with pytest.raises(ModelError, match="is a masked language model"):
        open_model(tmp_path / "model.onnx", causal=True)


def test_a_decoder_of_an_encoder_s_architecture_is_measured(masked, tmp_path):
    from transformers import AutoConfig, BertLMHeadModel

    config = AutoConfig.from_pretrained(masked[0], is_decoder=True)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    assert open_model(tmp_path, causal=True).logits(TOKENS).shape[:2] == TOKENS.shape

"""The same windows through PyTorch and ONNX Runtime give the same numbers; what cannot be opened is named."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from claq_export.errors import ConfigError, ModelError
from claq_export.evaluation import OnnxModel, TorchModel, language_quality, open_model, open_tokenizer, runtime_library
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

"""Encoder-decoders as three graphs: they generate what the model generates, and what cannot be captured is refused."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from claq_export.cached_seq2seq import check_parts, greedy_tokens, seq2seq_inputs
from claq_export.capture import CapturedModel, TaskModel, capture_module, capture_parts
from claq_export.capture.tasks import infer_task, seq2seq_task
from claq_export.errors import CaptureError, ModelError, VerificationError

VOCABULARY = 60
SIDES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.5,
}
BART_SIZES = {**SIDES, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
T5_SIZES = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1}


def t5() -> Any:
    config = transformers.T5Config(**T5_SIZES, num_heads=4, decoder_start_token_id=0, initializer_factor=2.0)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART_SIZES, **TOKENS, forced_eos_token_id=None)
    )


def marian() -> Any:
    tokens = {"pad_token_id": 59, "eos_token_id": 0, "decoder_start_token_id": 59, "forced_eos_token_id": None}
    return transformers.MarianMTModel(transformers.MarianConfig(**BART_SIZES, **tokens))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        **SIDES,
        **TOKENS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def captured_with_parts(model: Any, task: str) -> CapturedModel:
    task_model = TaskModel(model.eval(), task)
    captured = capture_module(task_model, dynamic_shapes=task_model.dynamic_axes)
    captured.file_graphs = capture_parts(task_model)
    return captured


@pytest.mark.parametrize("make", [t5, bart, marian])
def test_generates_as_the_model_does(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    captured = captured_with_parts(model, "text2text-generation")
    tokens = torch.randint(3, 58, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    tokens[mask == 0] = captured.pad_token_id
    with torch.no_grad():
        wanted = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=1)
    found = greedy_tokens(captured, {"input_ids": tokens, "attention_mask": mask}, 10)
    for row, want in zip(found, wanted, strict=True):
        assert row.tolist() == want[: len(row)].tolist()
        assert len(row) == 10 or int(want[len(row)]) in captured.end_token_ids
    start = torch.full((3, 1), captured.start_token_id)
    logits = captured.run({"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": start})[0]
    assert not torch.allclose(logits[0], logits[1], rtol=0.01)  # what was read matters
    assert check_parts(captured, captured.file_graphs, seq2seq_inputs(captured)) < 1e-4


def test_whisper_generates_as_the_model_does() -> None:
    torch.manual_seed(0)
    model = whisper()
    captured = captured_with_parts(model, "automatic-speech-recognition")
    assert captured.max_sequence == 20
    encoder, first, later = captured.file_graphs
    assert (encoder.part, first.part, later.part) == ("encoder", "decoder", "decoder_with_past")
    assert encoder.input_names == ("input_features",)
    assert first.input_names == ("input_ids", "encoder_hidden_states")
    names = [later.file_names[name] for name in later.input_names]
    assert names[:5] == ["input_ids", *(f"past_key_values.0.{kind}" for kind in _STATE)]
    assert [first.file_names[name] for name in first.output_names[1:5]] == [f"present.0.{kind}" for kind in _STATE]
    assert [later.file_names[name] for name in later.output_names] == [
        "logits",
        *(f"present.{layer}.decoder.{kind}" for layer in range(1) for kind in ("key", "value")),
    ]
    spectrum = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    found = greedy_tokens(captured, {"input_features": spectrum}, 8)
    for row, features in zip(found, spectrum, strict=True):
        tokens = torch.tensor([[2]])
        for wanted in row[1:]:
            with torch.no_grad():
                logits = model(input_features=features[None], decoder_input_ids=tokens).logits
            assert int(logits[0, -1].argmax()) == int(wanted)
            tokens = torch.cat([tokens, wanted[None, None]], 1)
    assert check_parts(captured, captured.file_graphs, seq2seq_inputs(captured)) < 1e-4


_STATE = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def test_parts_that_deviate_are_refused() -> None:
    torch.manual_seed(0)
    captured = captured_with_parts(bart(), "text2text-generation")
    steps = seq2seq_inputs(captured)
    *others, later = captured.file_graphs
    wrong = replace(later, graph_module=copy.deepcopy(later.graph_module))
    with torch.no_grad():
        wrong.graph_module.get_parameter("model.decoder.layers.0.fc1.bias").add_(1.0)
    with pytest.raises(VerificationError, match="the graph with cache deviates from the one without by"):
        check_parts(captured, (*others, wrong), steps)


def test_a_cache_for_single_tokens_alone_is_refused() -> None:
    config = transformers.ProphetNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        decoder_start_token_id=0,
    )
    model = TaskModel(transformers.ProphetNetForConditionalGeneration(config).eval(), "text2text-generation")
    with pytest.raises(CaptureError, match=re.escape("without a cache it may be captured (--no-cache)")):
        capture_parts(model)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "text2text-generation"),
        (transformers.MarianConfig(architectures=["MarianMTModel"]), "text2text-generation"),
        (transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "automatic-speech-recognition"),
        (transformers.T5Config(architectures=["T5EncoderModel"]), None),
        (transformers.BartConfig(architectures=["BartForSequenceClassification"]), None),
        (transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]), None),
        (transformers.LlamaConfig(architectures=["LlamaForCausalLM"]), None),
    ],
    ids=["t5", "marian", "whisper", "t5 encoder", "bart classifier", "llava", "llama"],
)
def test_the_task_is_known_by_the_architecture(config: Any, task: str | None) -> None:
    found = seq2seq_task(config)
    assert (found.name if found else None) == task


def test_an_architecture_of_text_and_images_has_no_task() -> None:
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration belongs to no task claq knows"):
        infer_task(["LlavaForConditionalGeneration"])


def test_other_speech_models_are_named() -> None:
    config = transformers.Speech2TextConfig(**SIDES)
    model = TaskModel(transformers.Speech2TextForConditionalGeneration(config), "automatic-speech-recognition")
    with pytest.raises(ModelError, match="claq knows the input of Whisper alone, this is 'speech_to_text'"):
        model.example_inputs()

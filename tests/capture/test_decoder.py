"""Decoders with a cache whose configuration is that of an encoder, or of an encoder and a decoder."""

from __future__ import annotations

import torch
import transformers

from claq_export.cached import check_cache, decoding_inputs
from claq_export.capture import TaskModel, capture_decoder, capture_module

SIZES = {"vocab_size": 60, "max_position_embeddings": 32}
ENCODER = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def test_token_types_are_left_to_the_model() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODER, is_decoder=True)
    model = TaskModel(transformers.BertLMHeadModel(config).eval(), "text-generation")
    assert "token_type_ids" in model.input_names
    cached = capture_decoder(model)
    assert cached.input_names[:4] == ("input_ids", "attention_mask", "position_ids", "past_key_values_0_key")
    whole = capture_module(model, dynamic_shapes=model.dynamic_axes)
    assert check_cache(whole, cached, decoding_inputs(cached)) < 1e-4


def test_positions_counted_from_a_padding_index_are_left_to_the_model() -> None:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**ENCODER, type_vocab_size=1, is_decoder=True)
    original = transformers.RobertaForCausalLM(config).eval()
    model = TaskModel(original, "text-generation")
    cached = capture_decoder(model)
    assert cached.input_names[:3] == ("input_ids", "attention_mask", "past_key_values_0_key")
    whole = capture_module(model, dynamic_shapes=model.dynamic_axes)
    assert check_cache(whole, cached, decoding_inputs(cached)) < 1e-4
    tokens = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        logits = whole.graph_module(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        assert torch.allclose(logits[0] if isinstance(logits, tuple) else logits, original(tokens).logits, atol=1e-5)


def test_layers_of_an_encoder_have_no_cache() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        **SIZES,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    cached = capture_decoder(TaskModel(transformers.BartForCausalLM(config).eval(), "text-generation"))
    assert [name for name in cached.output_names if name.startswith("present")] == [
        f"present_{layer}_{part}" for layer in range(2) for part in ("key", "value")
    ]


def test_layers_that_read_keys_and_values_of_earlier_ones_have_no_cache() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **SIZES,
        vocab_size_per_layer_input=60,
        hidden_size=32,
        hidden_size_per_layer_input=4,
        intermediate_size=48,
        num_hidden_layers=2,
        num_kv_shared_layers=1,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        laurel_rank=4,
    )
    model = TaskModel(transformers.Gemma3nForCausalLM(config).eval(), "text-generation")
    cached = capture_decoder(model)
    assert cached.output_names == ("logits", "present_0_key", "present_0_value")
    whole = capture_module(model, dynamic_shapes=model.dynamic_axes)
    assert check_cache(whole, cached, decoding_inputs(cached)) < 1e-4

"""One small model of each family of architectures that claq is tried on: random weights at sizes that take seconds.

Models come from the configuration classes of transformers. ``linears`` is what the passes must find: the number of
linear layers that are planned or left with a reason, and how their names end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from claq_export.capture import CapturedModel, TaskModel, capture_module

VOCABULARY = 96
_TEXT = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64}
_ENCODER = {**_TEXT, "intermediate_size": 160, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: as people call it.
        kind: ``decoder``, ``encoder``, ``encoder-decoder``, ``vision`` or ``mixture of experts``.
        make: a model with random weights.
        linears: number of linear layers in it.
        endings: how their names end.
        task: of a text model, or None.
        example: inputs of a model without task, by name.
        outputs: fields of its output.
        axes: of a model without task: input -> {axis: name}.
        transformers: first major version that it is captured with.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    linears: int
    endings: frozenset[str]
    task: str | None = None
    example: Callable[[], dict[str, torch.Tensor]] | None = None
    outputs: tuple[str, ...] = ("logits",)
    axes: Mapping[str, Mapping[int, str]] | None = None
    transformers: int = 4


class Fields(nn.Module):
    """A transformers model that returns some fields of its output, without cache."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        settings: dict[str, Any] = {"use_cache": False} if "decoder_input_ids" in inputs else {}
        result = self.model(**inputs, **settings, return_dict=True)
        return tuple(getattr(result, name) for name in self.outputs)


def capture(family: Family, seed: int = 0) -> tuple[CapturedModel, nn.Module]:
    """A model of the family, captured, and the module whose numbers the graph must give."""
    torch.manual_seed(seed)
    model = family.make().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):  # zero after initialization: then nothing would show that one is lost
                nn.init.normal_(value, std=0.05)
    if family.task is not None:
        wrapped: nn.Module = TaskModel(model, family.task)
        axes: Any = {name: {0: "batch", 1: "sequence"} for name in wrapped.input_names}
        return capture_module(wrapped, dynamic_shapes=axes), wrapped
    assert family.example is not None
    assert family.axes is not None
    wrapped = Fields(model, family.outputs).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = capture_module(wrapped, family.example(), family.axes, output_names=family.outputs)
    return captured, wrapped


def samples(family: Family, captured: CapturedModel) -> list[dict[str, torch.Tensor]]:
    """Inputs of several sizes: the example and, for text models, one token, and a longer padded batch."""
    if family.task is None:
        grown = {
            name: torch.cat([value, value[:1]]) if 0 in captured.dynamic_axes[name] else value
            for name, value in captured.example_inputs.items()
        }
        return [dict(captured.example_inputs), grown]
    mask = torch.ones(3, 21, dtype=torch.int64)
    mask[-1, 15:] = 0
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (3, 21), generator=generator)
    return [
        captured.inputs_from_tokens(tokens[:1, :1]),
        captured.inputs_from_tokens(tokens.where(mask.bool(), captured.pad_token_id), mask),
    ]


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _build(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings))


_LLAMA = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"})
_BERT = frozenset({"query", "key", "value", "dense"})
_SEQ2SEQ = {0: "batch", 1: "sequence"}
_DECODED = {0: "batch", 1: "decoder_sequence"}


def _decoder(name: str, kind: str, config: str, linears: int, endings: Any, **settings: Any) -> Family:
    make = _build(kind, config, **settings)
    return Family(name, "decoder", make, linears, frozenset(endings), "text-generation")


def _encoder(name: str, kind: str, config: str, linears: int, endings: Any, task: str, **settings: Any) -> Family:
    return Family(name, "encoder", _build(kind, config, **settings), linears, frozenset(endings), task)


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


_SLIDING = {"sliding_window": 8, "head_dim": 16}
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_CLIP_TEXT = {**_ENCODER, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}

FAMILIES = (
    _decoder("Llama", "LlamaForCausalLM", "LlamaConfig", 8, _LLAMA, **_DECODER),
    _decoder("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", 8, _LLAMA, **_DECODER),
    _decoder("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", 8, _LLAMA, **_DECODER, head_dim=16),
    _decoder(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        15,
        _LLAMA,
        **{**_DECODER, **_SLIDING, "num_hidden_layers": 2},
        layer_types=["sliding_attention", "full_attention"],
    ),
    _decoder("Mistral", "MistralForCausalLM", "MistralConfig", 8, _LLAMA, **_DECODER, **_SLIDING),
    _decoder(
        "Phi-3",
        "Phi3ForCausalLM",
        "Phi3Config",
        5,
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"},
        **_DECODER,
    ),
    _decoder(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        5,
        {"c_attn", "c_proj", "c_fc", "lm_head"},
        **_SMALL,
        n_positions=64,
        n_embd=64,
        n_layer=1,
        n_head=4,
    ),
    _decoder(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        7,
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "lm_head"},
        **_without(_DECODER, "num_key_value_heads", "intermediate_size"),
        ffn_dim=160,
        word_embed_proj_dim=64,
    ),
    _decoder(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        5,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out", "lm_head"},
        **_without(_DECODER, "num_key_value_heads"),
    ),
    _decoder(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        5,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"},
        **_SMALL,
        **_without(_TEXT, "vocab_size"),
        alibi=False,
    ),
    _decoder(
        "Bloom",
        "BloomForCausalLM",
        "BloomConfig",
        5,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"},
        **_SMALL,
        hidden_size=64,
        n_layer=1,
        n_head=4,
    ),
    _encoder("BERT", "BertForMaskedLM", "BertConfig", 8, {*_BERT, "decoder"}, "fill-mask", **_ENCODER),
    _encoder(
        "DistilBERT",
        "DistilBertModel",
        "DistilBertConfig",
        6,
        {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
        "feature-extraction",
        vocab_size=VOCABULARY,
        dim=64,
        n_layers=1,
        n_heads=4,
        hidden_dim=160,
        max_position_embeddings=64,
    ),
    _encoder(
        "RoBERTa",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        8,
        {*_BERT, "out_proj"},
        "text-classification",
        **_ENCODER,
        pad_token_id=1,
    ),
    _encoder("MPNet", "MPNetModel", "MPNetConfig", 6, {"q", "k", "v", "o", "dense"}, "feature-extraction", **_ENCODER),
    _encoder(
        "XLM-R", "XLMRobertaModel", "XLMRobertaConfig", 6, _BERT, "feature-extraction", **_ENCODER, pad_token_id=1
    ),
    Family(
        "T5",
        "encoder-decoder",
        _build(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=160,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        17,
        frozenset({"q", "k", "v", "o", "wi", "wo", "lm_head"}),
        example=lambda: {
            "input_ids": _tokens(2, 7),
            "attention_mask": torch.ones(2, 7, dtype=torch.int64),
            "decoder_input_ids": _tokens(2, 5),
        },
        axes={"input_ids": _SEQ2SEQ, "attention_mask": _SEQ2SEQ, "decoder_input_ids": _DECODED},
    ),
    Family(
        "Whisper",
        "encoder-decoder",
        _build(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=160,
            decoder_ffn_dim=160,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        17,
        frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "proj_out"}),
        example=lambda: {"input_features": _values(2, 16, 40), "decoder_input_ids": _tokens(2, 5)},
        axes={"input_features": {0: "batch"}, "decoder_input_ids": _DECODED},
    ),
    Family(
        "ViT",
        "vision",
        _build("ViTForImageClassification", "ViTConfig", **_IMAGE, num_labels=12),
        7,
        frozenset(),
        example=lambda: {"pixel_values": _values(2, 3, 32, 32)},
        axes={"pixel_values": {0: "batch"}},
    ),
    Family(
        "DeiT",
        "vision",
        _build("DeiTForImageClassification", "DeiTConfig", **_IMAGE, num_labels=12),
        7,
        frozenset(),
        example=lambda: {"pixel_values": _values(2, 3, 32, 32)},
        axes={"pixel_values": {0: "batch"}},
    ),
    Family(
        "CLIP",
        "vision",
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=_CLIP_TEXT, vision_config=_IMAGE, projection_dim=48)
        ),
        14,
        frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection", "visual_projection"}),
        example=lambda: {
            "input_ids": _tokens(2, 7),
            "pixel_values": _values(3, 3, 32, 32),
            "attention_mask": torch.ones(2, 7, dtype=torch.int64),
        },
        outputs=("logits_per_image", "text_embeds", "image_embeds"),
        axes={"input_ids": _SEQ2SEQ, "pixel_values": {0: "images"}, "attention_mask": _SEQ2SEQ},
    ),
    Family(
        "Mixtral",
        "mixture of experts",
        _build("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
        14,
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate", "lm_head", *"0123"}),
        "text-generation",
        transformers=5,
    ),
    Family(
        "Qwen3-MoE",
        "mixture of experts",
        _build(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **_DECODER,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
        ),
        14,
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate", "lm_head", *"0123"}),
        "text-generation",
        transformers=5,
    ),
)

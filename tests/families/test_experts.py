"""Mixtures of experts: every expert is found, quantized, emitted, and loaded again as a linear of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from artifacts import quantized_artifact

import claq_export
from claq_export.capture import TaskModel, capture_module
from claq_export.errors import CaptureError
from claq_export.modules import ClaqLinear

SIZES = {
    "vocab_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAJOR = int(transformers.__version__.split(".")[0])
needs_exchangeable_experts = pytest.mark.skipif(MAJOR < 5, reason="transformers 4 loops over the experts that were hit")


def mixtral(**changes) -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    return transformers.MixtralForCausalLM(config).eval()


def batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": positions}


def experts(names: list[str]) -> set[str]:
    return {name.partition("experts.")[2] for name in names if "experts." in name}


ALL = {f"{kind}.{index}" for kind in ("gate_up_proj", "down_proj") for index in range(4)}


@needs_exchangeable_experts
def test_every_expert_of_a_mixture_is_a_linear(tmp_path: Path) -> None:
    captured = capture_module(TaskModel(mixtral(), "text-generation"))
    # Three tokens: some experts see none, and are quantized without a Hessian. One token leaves two without work.
    settings = claq_export.Config(bits=4, calibration=[batch(torch.tensor([[5, 6, 7]]))])
    samples = [batch(torch.tensor([[3]])), batch(torch.randint(0, 96, (3, 7)))]
    compilation, _ = quantized_artifact(captured, tmp_path / "model.onnx", samples, settings)
    assert experts(list(compilation.sites)) == ALL


@needs_exchangeable_experts
def test_quantized_experts_are_saved_and_loaded(tmp_path: Path) -> None:
    from claq_export.integrations.transformers import mark_quantized

    model = mixtral()
    example = {**batch(torch.randint(0, 96, (2, 9))), "use_cache": False}
    mark_quantized(claq_export.quantize(model, example, claq_export.Config(bits=4, calibration="none")))
    mixture = model.model.layers[0].mlp.experts
    assert isinstance(mixture.down_proj[3], ClaqLinear)
    assert not any(value.dim() == 3 for value in model.parameters())
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for tokens in (torch.tensor([[3]]), torch.randint(0, 96, (3, 7))):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    original = mixtral()(tokens).logits
    assert 0 < (loaded(tokens).logits - original).norm() < 0.5 * original.norm()


@needs_exchangeable_experts
def test_the_loop_is_the_models_own_arithmetic_and_goes_after_capture() -> None:
    model = mixtral()
    tokens = torch.randint(0, 96, (2, 9))
    before = model.config._experts_implementation
    captured = capture_module(TaskModel(model, "text-generation"))
    assert model.config._experts_implementation == before
    torch.testing.assert_close(captured.run(batch(tokens))[0], model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 lets the arithmetic of experts be exchanged")
def test_transformers_4_says_why_not() -> None:
    with pytest.raises(CaptureError, match=r"control flow depends on tensor values at modeling_mixtral\.py"):
        capture_module(TaskModel(mixtral(), "text-generation"))

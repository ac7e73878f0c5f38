"""Whole transformers models through the planning passes: the same numbers at other sizes, and the linears one expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from claq_export.capture import TaskModel, capture_module, capture_pretrained
from claq_export.passes import PassContext, planning_pipeline

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"
SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), "text-generation"


def opt():
    config = transformers.OPTConfig(**SMALL, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64)
    return transformers.OPTForCausalLM(config), "text-generation"


def t5_encoder():
    config = transformers.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config), "feature-extraction"


def albert():
    config = transformers.AlbertConfig(**SMALL, hidden_size=64, embedding_size=32, intermediate_size=128)
    return transformers.AlbertModel(config), "feature-extraction"


# model -> (what linears' names end with, tables and heads, weights left alone); in models this small positions count as large
EXPECTED = {
    gpt2: (
        {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
        {"lm_head": "head", "transformer.wpe": "embedding"},
        {},
    ),
    opt: (
        {"self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"},
        {"lm_head": "head", "model.decoder.embed_positions": "embedding"},
        {},
    ),
    t5_encoder: (
        {"SelfAttention.q+k+v", "SelfAttention.o", "DenseReluDense.wi", "DenseReluDense.wo"},
        {"embed_tokens": "embedding"},
        {"relative_attention_bias": "small table"},
    ),
}


def same_numbers(captured, model, vocabulary, atol):
    for batch, length in [(1, 1), (1, 7), (3, 5), (2, 33)]:
        tokens = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(tokens)
        mask[-1, length - length // 4 :] = 0
        inputs = captured.inputs_from_tokens(tokens, mask)
        with torch.no_grad():
            expected = model(*inputs.values())
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(captured.run(inputs)[0], expected, rtol=1e-4, atol=atol)


def planned(captured):
    context = PassContext(task=captured.task, aliases=captured.aliases)
    planning_pipeline().run(captured.graph_module, context)
    return context.plan


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_architecture(make):
    torch.manual_seed(0)
    model = TaskModel(*make())
    captured = capture_module(model)
    plan = planned(captured)
    same_numbers(captured, model, 99, 1e-5)
    kinds, tables, left = EXPECTED[make]
    linears = [site for site in plan if site.role == "linear"]
    assert len(linears) == 8
    for site in linears:
        assert any(site.name.endswith(kind) for kind in kinds), site.name
    assert {site.name.removeprefix("encoder."): site.role for site in plan if site not in linears} == tables
    for name, reason in left.items():
        assert any(entry.name.endswith(name) and entry.reason.startswith(reason) for entry in plan.skipped), name
    if make is gpt2:
        assert all(site.transposed for site in linears)
        assert not [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.aten.addmm.default]


def test_layers_shared_across_depth_are_one_site_each():
    torch.manual_seed(0)
    model = TaskModel(*albert())
    captured = capture_module(model)
    plan = planned(captured)
    same_numbers(captured, model, 99, 1e-5)
    linears = [site for site in plan if site.role == "linear"]
    shared = [site for site in linears if len(site.nodes) == 2]
    assert len(shared) == len(linears) - 1 == 6
    assert len({source for site in shared for source in site.inputs}) < 2 * len(shared)


def test_stories260k():
    if not (STORIES / "config.json").is_file():
        pytest.skip("stories260K is not at hand (../shared/data/stories260k)")
    captured = capture_pretrained(STORIES)
    plan = planned(captured)
    model = TaskModel(transformers.AutoModelForCausalLM.from_pretrained(STORIES), "text-generation")
    same_numbers(captured, model, 512, 1e-4)
    assert len(plan) == 1 + 5 * 4
    tied, first = plan.sites[:2]
    assert (tied.role, len(tied.nodes), len(tied.lookups), tied.out_features) == ("head", 1, 1, 512)
    assert first.name == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert plan.skipped == []


def test_minilm(minilm):
    captured = capture_pretrained(minilm)
    plan = planned(captured)
    linears = [site for site in plan if site.role == "linear"]
    assert len(linears) == 6 * 4
    assert sum(site.in_features * site.out_features for site in linears) == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    (table,) = [site for site in plan if site.role == "embedding"]
    assert (table.name, table.out_features, table.in_features) == ("embeddings.word_embeddings", 30522, 384)
    assert [entry.reason.split(",")[0] for entry in plan.skipped] == ["small table"] * 2
    model = TaskModel(transformers.AutoModel.from_pretrained(minilm), "feature-extraction")
    same_numbers(captured, model, 30000, 1e-4)

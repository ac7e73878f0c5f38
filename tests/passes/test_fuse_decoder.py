"""RMS normalization, rotary positions and cached attention: found where they are, left alone with a reason elsewhere."""

from __future__ import annotations

import operator

import pytest
import torch
from tiny_decoders import GATED, SIZES, captured_decoder
from torch import fx, nn

from claq_export.capture import capture_module
from claq_export.capture.graph import is_check
from claq_export.kernels import decoder_ops
from claq_export.passes import (
    AdditiveMasks,
    CanonicalizeLinears,
    FuseRmsNorm,
    FuseRotary,
    LastLogits,
    PassContext,
    Pipeline,
    RemoveNoops,
    decoder_pipeline,
    takes_buffers,
)
from claq_export.passes.additive_masks import set_attention_mask


def traced(module: nn.Module, *example: torch.Tensor) -> fx.GraphModule:
    dim = torch.export.Dim.AUTO
    shapes = tuple({0: dim, 1: dim} for _ in example)
    graph = torch.export.export(module, example, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):
        if is_check(node):
            graph.graph.erase_node(node)
    return graph


def notes_of(records: list) -> str:
    return "\n".join(note for record in records for note in record.notes)


class Norm(nn.Module):
    def __init__(self, axis: int = -1, weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6)) if weight else None
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        y = wide * torch.rsqrt(wide.pow(2).mean(self.axis, keepdim=True) + 1e-5)
        return y + 1 if self.weight is None else self.weight * y.to(x.dtype)


def test_rms_norm() -> None:
    x = torch.randn(2, 3, 6)
    module = Norm()
    graph = traced(module, x)
    Pipeline([RemoveNoops(), FuseRmsNorm()]).run(graph, PassContext())
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [decoder_ops.rms_norm]
    torch.testing.assert_close(graph(x), module(x))


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Norm(axis=1), "not over the last axis"), (Norm(weight=False), "no weight is multiplied")],
    ids=["other axis", "no weight"],
)
def test_rms_norm_left_alone(module: Norm, reason: str) -> None:
    x = torch.randn(2, 3, 6)
    graph = traced(module, x)
    records = Pipeline([RemoveNoops(), FuseRmsNorm()]).run(graph, PassContext())
    assert reason in notes_of(records)
    torch.testing.assert_close(graph(x), module(x))


class Interleaved(nn.Module):
    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        table = torch.cat([angle, angle], -1).unsqueeze(1)
        swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * table.cos() + swapped * table.sin()


def test_interleaved_rotation_is_left_alone() -> None:
    x, angle = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 4)
    graph = traced(Interleaved(), x, angle)
    records = Pipeline([FuseRotary()]).run(graph, PassContext())
    assert "not joined" in notes_of(records)
    torch.testing.assert_close(graph(x, angle), Interleaved()(x, angle))


def families() -> list:
    from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, MistralConfig, Qwen3Config

    return [
        pytest.param(MistralConfig(**GATED, sliding_window=3), 5, 4, 2, id="sliding window"),
        pytest.param(Qwen3Config(**GATED, head_dim=16), 9, 4, 2, id="normalized heads"),
        pytest.param(Gemma3TextConfig(**GATED, head_dim=8, sliding_window=3), 13, 4, 2, id="weight plus one"),
        pytest.param(GPTNeoXConfig(**SIZES, intermediate_size=48), 0, 4, 2, id="part of the heads turned"),
        pytest.param(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64), 0, 0, 2, id="Conv1D"),
    ]


@pytest.mark.parametrize("functional", [False, True], ids=["as traced", "functionalized"])
@pytest.mark.parametrize(("config", "norms", "rotations", "attentions"), families())
def test_families(
    config: object, norms: int, rotations: int, attentions: int, functional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MistralConfig

    if functional:  # as a graph with operators in place is, such as transformers 4 has
        monkeypatch.setattr("claq_export.capture.module.writes_in_place", lambda _: True)
    captured = captured_decoder(config)
    prefill = {
        name: tensor[:, :, :0] if tensor.dim() == 4 else tensor[:, -3:]
        for name, tensor in captured.example_inputs.items()
    }
    samples = [captured.example_inputs, prefill]
    before = [captured.run(inputs) for inputs in samples]
    context = PassContext(task="text-generation")
    Pipeline([AdditiveMasks(), RemoveNoops()]).run(captured.graph_module, context)
    decoder_pipeline().run(captured.graph_module, context)
    targets = [node.target for node in captured.graph_module.graph.nodes]
    found = [targets.count(op) for op in (decoder_ops.rms_norm, decoder_ops.rotary, decoder_ops.cached_attention)]
    assert found == [norms, rotations, attentions]
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets
    # Nothing but attention depends on the length of the cache, which may be a buffer's.
    assert takes_buffers(captured.graph_module.graph)
    if isinstance(config, MistralConfig):
        # Projections write heads last, rotation and attention read them so: nothing is turned or reshaped between them.
        # (Before the first normalization stand the angles, which some versions of transformers transpose.)
        turned = {torch.ops.aten.unflatten.int, torch.ops.aten.flatten.using_ints, torch.ops.aten.transpose.int}
        assert not turned.intersection(targets[targets.index(decoder_ops.rms_norm) :])
    for inputs, expected in zip(samples, before, strict=True):
        for have, want in zip(captured.run(inputs), expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_mask_of_one_number_for_all_tokens_is_left_alone() -> None:
    from transformers import LlamaConfig

    captured = captured_decoder(LlamaConfig(**GATED))
    graph = captured.graph_module.graph
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with graph.inserting_before(node):
                mask = graph.call_function(torch.ops.aten.zeros.default, ([1, 1, 1, 1],))
            mask.meta["val"] = torch.zeros(1, 1, 1, 1)
            set_attention_mask(node, mask)
    records = decoder_pipeline().run(captured.graph_module, PassContext(task="text-generation"))
    assert "its mask has one number for all tokens" in notes_of(records)
    assert not takes_buffers(graph)


def test_cache_that_others_read_too_is_left_alone() -> None:
    from transformers import LlamaConfig

    captured = captured_decoder(LlamaConfig(**GATED))
    graph = captured.graph_module.graph
    joined = next(node for node in graph.nodes if node.target is torch.ops.aten.cat.default and node.args[1] == -2)
    attention = next(node for node in graph.nodes if node.target is torch.ops.aten.scaled_dot_product_attention.default)
    with graph.inserting_before(attention):
        total = graph.call_function(torch.ops.aten.sum.default, (joined,))
    with graph.inserting_after(attention):
        changed = graph.call_function(operator.add, (attention, total))
    attention.replace_all_uses_with(changed)
    changed.args = (attention, total)
    changed.meta["val"] = attention.meta["val"]
    captured.graph_module.recompile()
    context = PassContext(task="text-generation")
    before = captured.run(captured.example_inputs)
    Pipeline([AdditiveMasks(), RemoveNoops()]).run(captured.graph_module, context)
    records = decoder_pipeline().run(captured.graph_module, context)
    assert "the longer cache is read by" in notes_of(records)
    for have, want in zip(captured.run(captured.example_inputs), before, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def last_logits_configs() -> list:
    from transformers import Gemma2Config, LlamaConfig

    return [
        pytest.param(LlamaConfig(**GATED, tie_word_embeddings=True), id="tied"),
        pytest.param(Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=30.0), id="soft cap"),
    ]


@pytest.mark.parametrize("config", last_logits_configs())
def test_logits_of_the_last_token_alone(config: object) -> None:
    captured = captured_decoder(config)
    logits, *cache = captured.run(captured.example_inputs)
    records = Pipeline([CanonicalizeLinears(), LastLogits()]).run(captured.graph_module, PassContext())
    assert records[-1].modified
    found, *same = captured.run(captured.example_inputs)
    torch.testing.assert_close(found, logits[:, -1:], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, same, cache))


def test_logits_that_no_linear_makes_stay_whole() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.head(x)
            return y * y

    graph = traced(Doubled(), torch.randn(2, 3, 6))
    (record,) = Pipeline([LastLogits()]).run(graph, PassContext())
    assert not record.modified
    assert "more than a function of one value" in record.notes[0]


class MaskedAttention(nn.Module):
    def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_additive_masks_have_the_dtype_of_the_query() -> None:
    q = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.tensor([[True, False, True]]).expand(2, 1, 3, 3).clone()
    captured = capture_module(MaskedAttention(), (q, mask))
    (wanted,) = captured.run({"q": q, "mask": mask})
    Pipeline([AdditiveMasks()]).run(captured.graph_module, PassContext())
    seen = []

    class Masks(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.ops.aten.scaled_dot_product_attention.default:
                seen.append((args[3] if len(args) > 3 else kwargs["attn_mask"]).dtype)
            return super().call_function(target, args, kwargs)

    found = Masks(captured.graph_module).run(q, mask)
    assert seen == [torch.float16]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_float16_row_that_may_see_nothing_sees_everything_in_any_arithmetic(scale: float) -> None:
    q = scale * torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, True]])[None, None]
    captured = capture_module(MaskedAttention(), (q, mask))
    Pipeline([AdditiveMasks()]).run(captured.graph_module, PassContext())
    (found,) = captured.run({"q": q, "mask": mask})
    wide = q.float()
    wanted = MaskedAttention()(wide, mask | torch.tensor([True, False, False])[:, None])
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=4e-3 * scale)

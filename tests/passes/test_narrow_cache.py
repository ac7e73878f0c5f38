"""A cache in float16 beside float32 arithmetic: what reads and makes it, fused or not."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import GATED, captured_decoder
from torch import fx

from claq_export.capture import PAST_INPUTS, CapturedModel
from claq_export.kernels import decoder_ops
from claq_export.passes import AdditiveMasks, NarrowCache, PassContext, Pipeline, decoder_pipeline, takes_buffers

CONTEXT = PassContext(task="text-generation")
TO = torch.ops.aten._to_copy.default


def llama(fused: bool) -> CapturedModel:
    from transformers import LlamaConfig

    captured = captured_decoder(LlamaConfig(**GATED))
    Pipeline([AdditiveMasks()]).run(captured.graph_module, CONTEXT)
    if fused:
        decoder_pipeline().run(captured.graph_module, CONTEXT)
    return captured


def narrow(captured: CapturedModel) -> dict[str, torch.Tensor]:
    """Run the pass; returns the example with a cache in float16."""
    (record,) = Pipeline([NarrowCache(torch.float16)]).run(captured.graph_module, CONTEXT)
    assert record.modified
    return {n: v.half() if n.startswith(PAST_INPUTS) else v for n, v in captured.example_inputs.items()}


def casts(graph: fx.Graph) -> int:
    return sum(node.target is TO and node.kwargs["dtype"] in (torch.float16, torch.float32) for node in graph.nodes)


@pytest.mark.parametrize("fused", [True, False])
def test_the_cache_is_narrow_and_all_else_stays(fused: bool) -> None:
    captured = llama(fused)
    graph = captured.graph_module.graph
    before = casts(graph)
    exact_inputs = dict(captured.example_inputs)
    logits, *cache = captured.run(exact_inputs)
    narrowed = narrow(captured)
    found, *longer = captured.run(narrowed)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits, rtol=5e-3, atol=5e-3)
    assert not torch.equal(found, logits)
    past = next(v for n, v in narrowed.items() if n.startswith(PAST_INPUTS)).shape[2]
    for have, want in zip(longer, cache, strict=True):
        assert have.dtype == torch.float16
        torch.testing.assert_close(have.float(), want, rtol=2e-3, atol=2e-3)
        assert torch.equal(have[:, :, :past], want[:, :, :past].half())
    # Attention to a cache needs no casts, what spells it out needs one a key or value on either side.
    assert casts(graph) - before == (0 if fused else 2 * len(cache))
    assert takes_buffers(graph) == fused
    types = {node.meta["val"].dtype for node in graph.nodes if str(node.target).startswith(PAST_INPUTS)}
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert types == {node.meta["val"].dtype for node in output.args[0][1:]} == {torch.float16}


def test_new_tokens_count_as_they_will_when_they_are_cached() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 8 * heads, generator=generator) for heads in (4, 2, 2))
    past = torch.randn(2, 2, 5, 8, generator=generator).half()
    mask = torch.zeros(3, 8)
    y, keys, values = decoder_ops.cached_attention(query, key, value, mask, past, past, 4, 2, 0.3)
    rounded = decoder_ops.cached_attention(
        query, key.half().float(), value.half().float(), mask, past.float(), past.float(), 4, 2, 0.3
    )
    assert torch.equal(y, rounded[0])
    assert keys.dtype == values.dtype == torch.float16
    assert torch.equal(keys.float(), rounded[1])


def test_layers_that_attend_to_the_longer_cache_of_others_read_it_in_float32() -> None:
    captured = llama(fused=True)
    graph = captured.graph_module.graph
    attention = next(node for node in graph.nodes if node.target is decoder_ops.cached_attention)
    key = next(node for node in attention.users if node.args[1] == 1)
    logits = next(node for node in graph.nodes if node.op == "output").args[0][0]
    with graph.inserting_before(logits):
        total = graph.call_function(torch.ops.aten.sum.default, (key,))
        total.meta["val"] = torch.empty(())
    with graph.inserting_after(logits):
        moved = graph.call_function(torch.ops.aten.add.Tensor, (logits, total))
        moved.meta["val"] = logits.meta["val"]
    logits.replace_all_uses_with(moved)
    moved.args = (logits, total)
    captured.graph_module.recompile()
    wanted = captured.run(captured.example_inputs)[0]
    found, *longer = captured.run(narrow(captured))
    assert {value.dtype for value in longer} == {torch.float16}
    assert total.args[0].target is TO
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-2)


def test_attention_to_one_input_and_one_computed_past_is_cast() -> None:
    """Both parts of a cache have one type."""
    captured = llama(fused=True)
    graph = captured.graph_module.graph
    attention = next(node for node in graph.nodes if node.target is decoder_ops.cached_attention)
    past = attention.args[4]
    with graph.inserting_before(attention):
        same = graph.call_function(torch.ops.aten.neg.default, (past,))
        same.meta["val"] = past.meta["val"]
    attention.update_arg(4, same)
    captured.graph_module.recompile()
    wanted = captured.run(captured.example_inputs)
    found = captured.run(narrow(captured))
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have.float(), want, rtol=1e-2, atol=1e-2)
    assert attention.args[4].args[0].target is TO
    assert attention.args[5].target is TO


def test_a_graph_without_a_cache_is_left_alone() -> None:
    graph = fx.symbolic_trace(torch.nn.Linear(3, 3))
    (record,) = Pipeline([NarrowCache(torch.float16)]).run(graph, CONTEXT)
    assert not record.modified
    assert record.notes == ("there is no cache",)

"""Attention of encoders: one operator where heads come last before and after it, left alone with a reason elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from claq_export.capture import CapturedModel, capture_module
from claq_export.kernels import decoder_ops
from claq_export.passes import AdditiveMasks, FuseUncachedAttention, PassContext, Pipeline

_aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., torch.Tensor], first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 72)
        self.attend = attend
        self.first = first

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.linear(x).chunk(3, -1))
        heads = self.attend(query, key, value, mask)
        return heads if self.first else heads.transpose(1, 2).flatten(2)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


FOUND: dict[str, Callable[..., torch.Tensor]] = {
    "a mask": plain,
    "no mask": lambda query, key, value, _: functional.scaled_dot_product_attention(query, key, value),
    "a scale": lambda query, key, value, mask: functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.7
    ),
    "copies": lambda query, key, value, mask: functional.scaled_dot_product_attention(
        query.contiguous(), key.contiguous(), value, attn_mask=mask
    ),
    "other values": lambda query, key, value, mask: functional.scaled_dot_product_attention(
        query, value, key, attn_mask=mask
    ),
}
LEFT: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "causal": (
        lambda query, key, value, _: functional.scaled_dot_product_attention(query, key, value, is_causal=True),
        "a causal mask of its own",
    ),
    "computed keys": (
        lambda query, key, value, mask: functional.scaled_dot_product_attention(query, key * 2, value, attn_mask=mask),
        "not heads last values",
    ),
}


def fused(module: nn.Module, dtype: torch.dtype, mask: torch.Tensor) -> tuple[fx.GraphModule, list, dict]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = {"x": x, "mask": mask}
    captured = capture_module(module.to(dtype).eval(), (x, mask))
    wanted = captured.run(inputs)
    records = Pipeline([AdditiveMasks(), FuseUncachedAttention()]).run(captured.graph_module, PassContext())
    torch.testing.assert_close(captured.run(inputs), wanted)
    return captured.graph_module, records, inputs


def mask_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    allowed[..., 0] = True
    return allowed if kind == "bool" else torch.randn(2, 1, 5, 5, generator=generator)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, kind: str) -> None:
    gm, records, _ = fused(Attention(FOUND[name]), torch.float32, mask_of(kind))
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(decoder_ops.attention) == 1
    assert "1 attentions" in records[-1].notes
    # Nothing is turned any more.
    assert _aten.transpose.int not in targets
    assert _aten.scaled_dot_product_attention.default not in targets


def test_a_result_that_is_read_heads_first_is_turned_back() -> None:
    gm, _, _ = fused(Attention(plain, first=True), torch.float32, mask_of("float"))
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(decoder_ops.attention) == targets.count(_aten.transpose.int) == 1


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    attend, reason = LEFT[name]
    gm, records, _ = fused(Attention(attend), torch.float32, mask_of("float"))
    assert decoder_ops.attention not in [node.target for node in gm.graph.nodes]
    assert reason in records[-1].notes[0]


def test_sixteen_bits_are_left_to_the_runtime() -> None:
    gm, records, _ = fused(Attention(plain), torch.float16, mask_of("bool"))
    assert decoder_ops.attention not in [node.target for node in gm.graph.nodes]
    assert "computes in torch.float16" in records[-1].notes[0]


class Windows(nn.Module):
    """Attention among four tokens each, as vision models have it; ``split`` says where the sequence is divided."""

    def __init__(self, split: str, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 72)
        self.split = split
        self.bias = nn.Parameter(torch.randn(1, 3, 4, 4)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        if self.split == "before":
            x = x.view(-1, 4, 16)
        parts = self.linear(x).chunk(3, -1)
        query, key, value = (part.reshape(-1, 4, 3, 8).transpose(1, 2) for part in parts)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.bias).transpose(1, 2)
        return found.flatten(2).view(batch, length, 24) if self.split == "twice" else found.reshape(batch, length, 24)


def captured_and_fused(module: nn.Module, *example: torch.Tensor) -> tuple[CapturedModel, list[str]]:
    """The graph after the pass, which must give what it gave before it, and what the pass notes."""
    captured = capture_module(module.eval(), example)
    inputs = dict(zip(captured.input_names, example, strict=True))
    wanted = captured.run(inputs)
    records = Pipeline([AdditiveMasks(), FuseUncachedAttention()]).run(captured.graph_module, PassContext())
    torch.testing.assert_close(captured.run(inputs), wanted)
    return captured, list(records[-1].notes)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("split", ["before", "after", "twice"])
def test_windows_stay_windows(split: str, bias: bool) -> None:
    _, notes = captured_and_fused(Windows(split, bias), torch.randn(2, 8, 16))
    assert "1 attentions" in notes


class Latents(nn.Module):
    """Learned queries, or learned keys and values, that every row of a batch shares."""

    def __init__(self, queries: bool) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, 3, 24))
        self.queries = queries

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learned, given = (value.unflatten(-1, (3, 8)).transpose(1, 2) for value in (self.learned, x))
        query, key = (learned, given) if self.queries else (given, learned)
        return functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("queries", [False, True], ids=["keys", "queries"])
def test_what_is_broadcast_over_a_batch_is_left(queries: bool) -> None:
    captured, notes = captured_and_fused(Latents(queries), torch.randn(2, 5, 24))
    assert decoder_ops.attention not in [node.target for node in captured.graph_module.graph.nodes]
    assert "of several batches" in notes[0]


def test_a_scale_without_a_root_is_left() -> None:
    attend = Attention(lambda q, k, v, _: functional.scaled_dot_product_attention(q, k, v, scale=-0.5))
    _, notes = captured_and_fused(attend, torch.randn(2, 5, 16), torch.zeros(1))
    assert "its scale is not positive" in notes[0]

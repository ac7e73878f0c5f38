"""Attention of encoders: one operator where heads come last before and after it, left alone with a reason elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from claq_export.capture import capture_module
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

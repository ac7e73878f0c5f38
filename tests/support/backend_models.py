"""Small models for the torch.compile backend, and calling it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from claq_export.backend import claq
from claq_export.backend.store import STORES, Stack, WeightStore

FEATURES = 48


class Block(nn.Module):
    """Three siblings that read one value, mixed and projected; biases on two of them."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.q = nn.Linear(features, features)
        self.k = nn.Linear(features, 32, bias=False)
        self.v = nn.Linear(features, features)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.k(x)).mean(-1, keepdim=True)
        return x + self.out(torch.tanh(self.q(x)) * self.v(x) * gate)


class Net(nn.Module):
    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def data(batches: int = 3, rows: int = 40, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator)
    return [torch.randn(rows, FEATURES, generator=generator) @ mixing / 7 for _ in range(batches)]


def compiled(model: Any, fullgraph: bool = True, dynamic: bool | None = None, **options: Any) -> Any:
    """The model through the backend, run operator by operator unless told otherwise."""
    torch._dynamo.reset()
    options = {"fallback": "eager", "progress": False, **options}
    return torch.compile(model, backend=claq, fullgraph=fullgraph, dynamic=dynamic, options=options)


def store_of(model: nn.Module) -> WeightStore:
    """The only store that knows parameters of the model."""
    own = {id(parameter) for parameter in model.parameters()}
    (store,) = [s for s in STORES.values() if any(id(weight) in own for weight, _ in s.entries())]
    return store


def stacks_of(model: nn.Module) -> dict[str, Stack | None]:
    """Parameter name -> what stands for it."""
    store = store_of(model)
    found = {name: store.find(parameter) for name, parameter in model.named_parameters()}
    return {name: entry.stack for name, entry in found.items() if entry is not None}

"""Small models as users run them: compiled by ``torch.compile(backend="claq")``, quantized in place, in CUDA graphs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from findings import Finding, NotHere
from layers import share
from machine import Machine, reason_of
from torch import nn
from torch.nn import functional

from claq_export import Config, quantize

COMPILED_BOUND = 2e-2
"""Largest difference of a compiled model to the same quantized modules in eager mode, as a share of the largest output,
in float16: Inductor rounds between operators elsewhere than eager code."""

OBSERVED_BOUND = 0.25
"""The same of a model at 4 bits to the model before it was quantized: what 4 bits cost a random model, not a broken kernel."""

NO_GRAPHS = "a dry run has no CUDA graphs"


def register_backend() -> None:
    """Let PyTorch find ``backend="claq"`` where claq-export is not installed but lies in this folder."""
    if "claq" not in torch._dynamo.list_backends(exclude_tags=()):
        from claq_export.backend import claq  # not before a dry run has turned the interpreter on

        torch._dynamo.register_backend(claq, name="claq")


class Block(nn.Module):
    """A transformer's block: attention and an MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, width]`` to the same."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(*heads.chunk(3, 1), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def _block(machine: Machine, width: int) -> tuple[Block, torch.dtype]:
    dtype = torch.float32 if machine.dry else torch.float16  # the CPU kernels' own, or the GPU's
    return Block(width, 4 if machine.dry else 16).eval().to(machine.device, dtype).requires_grad_(False), dtype


def models(machine: Machine) -> Iterator[Finding]:
    """A block and its MLP: compiled at two batch sizes without a graph break, and captured in a CUDA graph; a table of tokens
    that is observed before it is quantized.

    First a capture whose only calls before were on zeros, which say nothing of a kernel but have to load it.
    """
    register_backend()
    block, dtype = _block(machine, width := 32 if machine.dry else 512)
    inputs = [torch.randn(batch, 5, width, device=machine.device, dtype=dtype) for batch in (2, 3)]
    zeros = torch.zeros_like(inputs[0])
    yield "quantized modules in a CUDA graph, MLP, after zeros", partial(_replayed, machine, block.mlp, zeros)
    yield "torch.compile(backend='claq'), tokens, two calls observed", partial(_observed, machine, dtype)
    for name, model in {"MLP": block.mlp, "attention and MLP": block}.items():
        yield f"torch.compile(backend='claq'), {name}, two batch sizes", partial(_compiled, model, inputs)
        yield f"quantized modules in a CUDA graph, {name}", partial(_replayed, machine, model, inputs[0])


def _in_place(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return quantize(copy.deepcopy(model), (x,), Config(calibration="none"))


def _compiled(model: nn.Module, inputs: list[torch.Tensor]) -> tuple[float, float]:
    torch.compiler.reset()
    expected = _in_place(model, inputs[0])
    run = torch.compile(model, backend="claq", fullgraph=True, dynamic=True, options={"calibration": "none"})
    with torch.no_grad():
        return max(share(run(x), expected(x)) for x in inputs), COMPILED_BOUND


@torch.no_grad()
def _observed(machine: Machine, dtype: torch.dtype) -> tuple[float, float]:
    torch.compiler.reset()
    model = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 512))
    model = model.eval().to(machine.device, dtype)
    tokens = torch.arange(512, device=machine.device).reshape(4, 128)
    expected = model(tokens)
    run = torch.compile(model, backend="claq", options={"observe": 2})
    for _ in range(2):
        run(tokens)
    found = run(tokens)
    if torch.equal(found, expected):
        raise AssertionError("nothing was quantized")
    return share(found, expected), OBSERVED_BOUND


@torch.no_grad()
def _replayed(machine: Machine, model: nn.Module, example: torch.Tensor) -> tuple[float, float]:
    """Difference of a replay to an eager call, with activations that came after the capture."""
    if machine.dry:
        raise NotHere(NO_GRAPHS)
    module, x = _in_place(model, example), example.clone()
    replay = machine.captured(lambda: module(x))
    other = torch.randn_like(x)
    x.copy_(other)
    got = replay()
    return share(got, module(other)), 0.0


@torch.no_grad()
def model_times(machine: Machine, deadline: float, rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append times of one token for 1 and 32 sequences to ``rows``: in 16 bits eager and compiled, and compiled by claq.

    The three take turns. The weights in 16 bits, 100 MB, are read in between, so that no L2 cache keeps the quantized ones.
    """
    register_backend()
    torch.compiler.reset()
    block, dtype = _block(machine, width := 32 if machine.dry else 2048)
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "eager": block,
        "inductor": torch.compile(block),
        "claq": torch.compile(block, backend="claq", options={"calibration": "none"}),
    }
    for batch in (1, 32):
        x = torch.randn(batch, 1, width, device=machine.device, dtype=dtype)
        for graph in (False, True):
            row: dict[str, Any] = {"batch": batch, "graph": graph}
            if machine.dry and graph:
                row["skipped"] = NO_GRAPHS
            elif time.monotonic() > deadline:
                row["skipped"] = "out of time"
            else:
                row |= _times(machine, {name: partial(run, x) for name, run in runs.items()}, graph)
            rows.append(row)
            print(row, flush=True)
            save()


def _times(machine: Machine, calls: dict[str, Callable[[], object]], graph: bool) -> dict[str, Any]:
    ready: dict[str, Callable[[], object]] = {}
    failures = {}
    for name, call in calls.items():
        try:
            call()  # compiles, and quantizes
            ready[name] = machine.captured(call) if graph else call
        except Exception as failure:  # of CUDA, Triton, Dynamo or Inductor
            failures[name] = reason_of(failure)
    return {
        "us": {name: 1e6 * found for name, found in machine.interleaved(ready, graph).items()},
        "failures": failures,
    }

"""Walks a BERT encoder layer by layer: what each group of linears sees, with all groups before it quantized already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .common import Group

Visit = Callable[[Group, list[torch.Tensor]], None]


def groups_of(block: nn.Module, number: int) -> dict[str, Group]:
    """The four groups of an encoder layer, in order of execution."""
    attention = block.attention.self
    heads = {name: getattr(attention, name) for name in ("query", "key", "value")}
    return {
        "qkv": Group(f"{number}.qkv", heads),
        "attention_output": Group(f"{number}.attention_output", {"dense": block.attention.output.dense}),
        "intermediate": Group(f"{number}.intermediate", {"dense": block.intermediate.dense}),
        "output": Group(f"{number}.output", {"dense": block.output.dense}),
    }


@torch.no_grad()
def walk(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], visit: Visit) -> None:
    """Run batches of equally long samples (no padding) through the encoder, every linear once a batch.

    ``visit(group, inputs)`` is called when a group is reached, with its input for each batch ``[B, S, K]``; the
    weights it leaves in the group's linears are those that the rest of the walk runs with.
    """
    states = [model.embeddings(input_ids=batch["input_ids"]) for batch in batches]
    for number, block in enumerate(model.encoder.layer):
        groups = groups_of(block, number)
        visit(groups["qkv"], states)
        heads = [block.attention.self(x, None)[0] for x in states]
        visit(groups["attention_output"], heads)
        states = [block.attention.output(y, x) for y, x in zip(heads, states, strict=True)]
        visit(groups["intermediate"], states)
        hidden = [block.intermediate(x) for x in states]
        visit(groups["output"], hidden)
        states = [block.output(y, x) for y, x in zip(hidden, states, strict=True)]

"""Walks a Llama model block by block: what each group of linears sees, with all groups before it quantized already (or
not)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .common import Group


def groups_of(block: nn.Module, number: int) -> dict[str, Group]:
    """The four groups of a block, in order of execution."""
    a, m = block.self_attn, block.mlp
    shared = a.q_proj.out_features != a.v_proj.out_features
    return {
        "qkv": Group(
            f"{number}.qkv",
            {"q_proj": a.q_proj, "k_proj": a.k_proj, "v_proj": a.v_proj},
            frozen_rows=a.q_proj.out_features + a.k_proj.out_features,
        ),
        "o": Group(f"{number}.o", {"o_proj": a.o_proj}, scale_folds=not shared),
        "gate_up": Group(f"{number}.gate_up", {"gate_proj": m.gate_proj, "up_proj": m.up_proj}),
        "down": Group(f"{number}.down", {"down_proj": m.down_proj}),
    }


@torch.no_grad()
def walk(model: nn.Module, windows: torch.Tensor) -> Iterator[tuple[Group, list[torch.Tensor]]]:
    """Run calibration windows ``[W, S]`` through the blocks, every linear once a window.

    Gives each group when it is reached, with its input for each window ``[1, S, K]``; the weights that the group's
    linears have when the next one is asked for are those that the rest of the walk runs with.
    """
    core = model.model
    states = [core.embed_tokens(window[None]) for window in windows]
    positions = torch.arange(windows.shape[1])[None]
    rotary = core.rotary_emb(states[0], positions)
    for number, block in enumerate(core.layers):
        groups = groups_of(block, number)
        normed = [block.input_layernorm(x) for x in states]
        yield groups["qkv"], normed
        output, block.self_attn.o_proj = block.self_attn.o_proj, nn.Identity()
        heads = [block.self_attn(x, position_embeddings=rotary, attention_mask=None)[0] for x in normed]
        block.self_attn.o_proj = output
        yield groups["o"], heads
        for i, x in enumerate(heads):
            states[i] = states[i] + output(x)
        normed = [block.post_attention_layernorm(x) for x in states]
        yield groups["gate_up"], normed
        mlp = block.mlp
        hidden = [mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
        yield groups["down"], hidden
        for i, x in enumerate(hidden):
            states[i] = states[i] + mlp.down_proj(x)


def squared_gradients(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum over windows of the squared gradient of the next-token loss, by parameter name of the blocks' linears
    (SqueezeLLM's Fisher)."""
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    fisher = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], window[1:]).backward()
        for name, linear in linears.items():
            fisher[name] += linear.weight.grad.square()
            linear.weight.grad = None
    for linear in linears.values():
        linear.weight.requires_grad_(False)
    return fisher

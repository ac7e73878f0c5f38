"""Mixtures of experts of transformers 5: a loop over experts that can be traced, and their weights one by one.

Their modules hold the weights of all experts in one tensor of three axes and leave the arithmetic to an exchangeable
function. Here every expert is visited in turn with the tokens routed to it, none being left out, so that no control flow
depends on the routing: the graph has a linear for each expert, and calibration sees the tokens that the expert sees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

IMPLEMENTATION = "claq"
"""Name under which the loop is registered with transformers."""

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def expert_loop(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' sum for ``hidden_states [tokens, features]``, routed by ``top_k_index`` and weighted ``[tokens, k]``.

    ``self`` is a module of transformers with ``gate_up_proj`` or ``up_proj`` and ``down_proj``: a tensor ``[experts, N, K]``
    (``[experts, K, N]`` where it says ``is_transposed``), or a list of linear modules.
    """
    choices = top_k_index.shape[-1]
    routed = top_k_index.reshape(-1)
    result = hidden_states.new_zeros((routed.shape[0], hidden_states.shape[-1]))
    for expert in range(self.num_experts):
        slots = torch.nonzero(routed == expert).squeeze(-1)
        x = hidden_states.index_select(0, torch.div(slots, choices, rounding_mode="floor"))
        if self.has_gate:
            x = self._apply_gate(_project(self, "gate_up_proj", expert, x))
        else:
            x = self.act_fn(_project(self, "up_proj", expert, x))
        x = _project(self, "down_proj", expert, x)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        result = result.index_put((slots,), x)
    weighted = result * top_k_weights.reshape(-1, 1)
    total = weighted.reshape(-1, choices, hidden_states.shape[-1]).sum(1)
    return total.to(hidden_states.dtype)


def _project(self: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weights = getattr(self, name)
    if isinstance(weights, nn.ModuleList):
        y: torch.Tensor = weights[expert](x)
    elif self.is_transposed:
        y = x @ weights[expert]
    else:
        y = nn.functional.linear(x, weights[expert])
    return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


def use_expert_loop(model: nn.Module) -> None:
    """Let the mixtures of experts in a transformers model run :func:`expert_loop`."""
    register()
    for module in _exchanging(model):
        module.set_experts_implementation(IMPLEMENTATION)


def register() -> bool:
    """Make the loop known to transformers; False where transformers has no exchangeable experts (before 5)."""
    moe = sys.modules.get("transformers.integrations.moe")
    interface = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is None:
        return False
    if IMPLEMENTATION not in interface:
        interface.register(IMPLEMENTATION, expert_loop)
    return True


@contextmanager
def traceable_experts(model: nn.Module) -> Iterator[None]:
    """Inside, the model's mixtures of experts run :func:`expert_loop`; nothing changes for models without any."""
    mixtures = any(map(is_mixture, model.modules()))
    before = [(module, module.get_experts_implementation()) for module in _exchanging(model)] if mixtures else []
    if not before or not register():
        yield
        return
    for module, _ in before:
        module.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        for module, implementation in before:
            module.set_experts_implementation(implementation)


def _exchanging(model: nn.Module) -> list[Any]:
    """The transformers models in ``model``, itself included, that let one choose the arithmetic of experts."""
    return [module for module in model.modules() if hasattr(module, "set_experts_implementation")]


def is_mixture(module: nn.Module) -> bool:
    """Whether a module holds experts whose arithmetic transformers lets one exchange."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "num_experts")


def matrix_of_stack(model: nn.Module, name: str) -> tuple[str, int] | None:
    """For ``a.weight.3``: ``a.weight``, if that is a parameter of three axes, and 3; None if the model has no such matrix."""
    path, _, index = name.rpartition(".")
    if index.isdigit():
        with suppress(AttributeError):
            stack = model.get_parameter(path)
            if stack.dim() == 3 and int(index) < len(stack):
                return path, int(index)
    return None


def split_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Make linear modules of expert weights, so that ``experts.gate_up_proj.3`` is a module as any other.

    Args:
        model: changed in place: a tensor that a name points into becomes a list of modules which share its memory.
        names: of linears; those that point into no expert weights are passed over.
    """
    split = False
    for name in names:
        found = matrix_of_stack(model, name)
        if found is None:
            continue
        owner_path, _, leaf = found[0].rpartition(".")
        owner: Any = model.get_submodule(owner_path)
        if not is_mixture(owner):
            continue
        stacked = owner.get_parameter(leaf).detach()
        experts = [_linear_on(matrix.t() if owner.is_transposed else matrix) for matrix in stacked]
        del owner._parameters[leaf]
        owner.add_module(leaf, nn.ModuleList(experts))
        split = True
    if split:
        use_expert_loop(model)


def join_experts(model: nn.Module) -> None:
    """Undo :func:`split_experts` where all experts of a tensor are plain linears: one tensor, run as transformers does."""
    joined = False
    for owner in model.modules():
        if not is_mixture(owner):
            continue
        for leaf, experts in list(owner.named_children()):
            if leaf not in _PROJECTIONS or not isinstance(experts, nn.ModuleList):
                continue
            weights = [expert.weight.detach() for expert in experts if type(expert) is nn.Linear]
            if len(weights) == len(experts):
                stacked = torch.stack([weight.t() if owner.is_transposed else weight for weight in weights])
                delattr(owner, leaf)
                setattr(owner, leaf, nn.Parameter(stacked, requires_grad=False))
                joined = True
    if joined:
        for module in _exchanging(model):
            module.set_experts_implementation(None)


def _linear_on(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear

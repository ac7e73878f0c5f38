"""Which names of a transformers model's parameters mean one parameter, or will once transformers has tied them."""

from __future__ import annotations

from typing import Any


def other_names(model: Any) -> dict[str, list[str]]:
    """Name of each parameter that has several -> its other ones, in the order of the model.

    Args:
        model: with dense modules. Transformers before 5 has tied them when it asks a quantizer, 5 has a mapping for later.
    """
    leaders: dict[int, str] = {}
    leader_of = {
        name: leaders.setdefault(id(value), name) for name, value in model.named_parameters(remove_duplicate=False)
    }
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in leader_of and source in leader_of:
            joined, into = leader_of[target], leader_of[source]
            leader_of.update({name: into for name, leader in leader_of.items() if leader == joined})
    groups: dict[str, list[str]] = {}
    for name, leader in leader_of.items():
        groups.setdefault(leader, []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in groups.values()
        if len(names) > 1
        for name in names
    }

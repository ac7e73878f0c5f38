"""Autocast regions inside Dynamo's graphs, in force while a graph is traced.

``make_fx`` notes where a graph enters and leaves autocast and does neither, so that the dtypes it finds inside are those
without autocast, and a pass would take ``product.float()`` for nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

_State = tuple[str, bool, torch.dtype]


@contextmanager
def autocast_in_force(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph, to be traced inside the ``with`` block: where it enters autocast, what follows is in fact under it."""
    regions = [node for node in gm.graph.nodes if node.target is _enter_autocast]
    if not regions:
        yield gm
        return
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.target = {_enter_autocast: _enter, _exit_autocast: _leave}.get(node.target, node.target)
    before = [_state(device) for device in {str(node.args[0]) for node in regions}]
    try:
        yield fx.GraphModule(gm, graph)
    finally:
        for state in before:
            _set(*state)


def has_autocast(gm: fx.GraphModule) -> bool:
    """Whether a graph enters autocast."""
    return any(node.target is _enter_autocast for node in gm.graph.nodes)


def _enter(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None) -> tuple[Any, _State]:
    before = _state(device)
    noted = _enter_autocast(device, dtype, enabled, cache)
    _set(device, enabled, dtype or before[2])
    return noted, before


def _leave(entered: tuple[Any, _State]) -> None:
    noted, before = entered
    _set(*before)
    _exit_autocast(noted)


def _state(device: str) -> _State:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _set(device: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)

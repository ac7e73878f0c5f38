"""What this room needs to know of Dynamo's inside: tracing its graph to ATen, and whose parameters the graph reads."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

_STEP = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_TABLES = ("_modules", "_parameters", "_buffers")


def trace_to_aten(gm: fx.GraphModule, functional: bool = False) -> fx.GraphModule:
    """Dynamo's graph as ATen operators in the dialect of ``torch.export``: linears and attention stay whole.

    Sizes are symbols of Dynamo's own shape environment, so that what tracing learns about them becomes its guards.

    Args:
        gm: the graph.
        functional: without in-place operators. What the graph writes into its inputs is not written then: for calibration,
            not for running.
    """
    forward = _functionalized(gm) if functional else gm
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta["example_value"] for node in placeholders]
    found = detect_fake_mode(values)
    shape_env = found.shape_env if found is not None else None
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    with mode:
        # New values: Dynamo's own carry what in-place operators did to them while it traced.
        inputs = [_like(value) for value in values]
    # The mode stays on while operators are traced: one that makes a tensor from sizes alone meets no fake tensor, and
    # would be run and fix the sizes.
    with torch.no_grad(), tracing(TracingContext(mode)), mode:
        if shape_env is None:
            return make_fx(forward, pre_dispatch=True)(*inputs)
        with shape_env.ignore_fresh_unbacked_symbols():
            return make_fx(forward, pre_dispatch=True)(*inputs)


def _functionalized(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function whose trace has a new value where the graph writes into one."""

    def forward(*inputs: Any) -> Any:
        with FunctionalTensorMode(pre_dispatch=True, export=True):
            outputs = gm(*tree_map_only(torch.Tensor, FunctionalTensor.to_functional, inputs))
            return tree_map_only(FunctionalTensor, _present_value, outputs)

    return forward


def _present_value(tensor: FunctionalTensor) -> torch.Tensor:
    torch._sync(tensor)
    value: torch.Tensor = torch._from_functional_tensor(tensor.elem)
    return value


def _like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    new = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    if getattr(value, "item_memo", None) is not None:
        # Dynamo passes a Python float of varying value as a tensor; this is the symbol it stands for.
        new.item_memo = value.item_memo  # type: ignore[attr-defined]
    return new


@dataclass(frozen=True)
class GraphParameters:
    """The parameters among a graph's inputs.

    Attributes:
        names: position of the input -> qualified name below the module whose ``forward`` Dynamo was compiling.
        root: that module, or None where it could not be found or parameters come from several places.
    """

    names: dict[int, str]
    root: weakref.ref[nn.Module] | None


def graph_parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphParameters:
    """Names of the parameters, read from where Dynamo fetches them: ``L['self']._modules['a']._parameters['weight']``."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    scopes = _scopes()
    roots: dict[str, nn.Module | None] = {}
    names: dict[int, str] = {}
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not isinstance(value, nn.Parameter):
            continue
        name = _qualified_name(_source_name(node), scopes, roots)
        names[position] = name if name and name not in names.values() else node.name
    found = {id(root): root for root in roots.values() if root is not None}
    root = next(iter(found.values())) if len(found) == 1 else None
    return GraphParameters(names, weakref.ref(root) if root is not None else None)


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method before torch 2.12


def _scopes() -> dict[str, Any]:
    """Locals and globals of the frame that Dynamo is compiling."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # the backend was called without Dynamo
        return {}
    return {"L": output.local_scope, "G": output.global_scope}


def _qualified_name(source: str, scopes: dict[str, Any], roots: dict[str, nn.Module | None]) -> str:
    """Name of a parameter below the first module on its path; that module is put into ``roots``."""
    steps = list(_STEP.finditer(source))
    words = [next(group for group in step.groups() if group is not None) for step in steps]
    first = 1
    for index, step in enumerate(steps):
        expression = source[: step.end()]
        if expression not in roots:
            roots[expression] = _module_at(expression, scopes)
        if roots[expression] is not None:
            first = index + 1
            break
    return ".".join(word for word in words[first:] if word not in _TABLES)


def _module_at(expression: str, scopes: dict[str, Any]) -> nn.Module | None:
    """What Dynamo's own expression for a value says, if it is a module."""
    if not scopes:
        return None
    try:
        value = eval(expression, {"__builtins__": {}}, scopes)
    except (AttributeError, IndexError, KeyError, NameError, SyntaxError, TypeError):
        return None
    return value if isinstance(value, nn.Module) else None

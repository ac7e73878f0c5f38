"""Captures any ``nn.Module`` as a flat graph of ATen operators with named inputs, outputs and dynamic axes."""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, ConfigError, first_line
from ..experts import traceable_experts
from .captured import CapturedModel, module_source
from .graph import unlift, writes_in_place
from .masks import traceable_masks
from .precision import check_present
from .reasons import explain, user_frame
from .tasks import TaskModel

_log = logging.getLogger(__name__)
_ENLARGED = 2
"""torch.export takes an axis of size 1 for static, so axes meant to be dynamic are traced at this size at least."""


class _Flat(nn.Module):
    """The model as a function from a flat list of tensors to its output tensors; anything else is held constant."""

    def __init__(self, model: nn.Module, arguments: _Arguments) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self.arguments.rebuild(tensors)
        leaves = _tensors_of(self.model(*args, **kwargs))
        return leaves[0] if len(leaves) == 1 else tuple(leaves)


@dataclass
class _Arguments:
    """A call's arguments, split into named tensors and everything else; ``copied`` holds the numbers of the tensors that
    shared memory with one before them."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    positions: list[int]
    names: list[str]
    copied: frozenset[int]

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.leaves[position] for position in self.positions]

    @tensors.setter
    def tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        for position, tensor in zip(self.positions, tensors, strict=True):
            self.leaves[position] = tensor


def capture_module(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> CapturedModel:
    """Capture ``model`` through ``torch.export``.

    The graph is compared with the model on the example and, where axes are dynamic, once more at other sizes.

    Args:
        model: any module; captured in evaluation mode. A :class:`~claq_export.capture.tasks.TaskModel` brings its own
            example, names, task and source.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Tensors (also nested
            in lists, tuples and dicts) become inputs, everything else is held constant.
        dynamic_shapes: argument name -> {axis: name} (or a tuple of such dicts, one an input tensor). A name is a
            string or a ``torch.export.Dim``; it is an error when such an axis cannot be dynamic. None: every axis that
            can be dynamic is.
        input_names: names of the input tensors, in order; default: those of forward's parameters.
        output_names: names of the output tensors, in order; default: the keys of the model's output.

    Raises:
        ConfigError: names or dynamic shapes do not fit the model's inputs and outputs.
        ModelError: a weight has no values.
        CaptureError: the model does not run on the example, or cannot be turned into a graph; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    title = type(model.model).__name__ if isinstance(model, TaskModel) else type(model).__name__
    check_present(model, title)
    if isinstance(model, TaskModel):
        input_names = input_names or model.input_names
        output_names = output_names or model.output_names
        if example_inputs is None:
            example_inputs = model.example_inputs()
        if isinstance(example_inputs, Mapping):
            missing = [name for name in model.input_names if name not in example_inputs]
            if missing:
                raise ConfigError(f"example inputs lack {missing[0]!r}; {title} reads {', '.join(model.input_names)}")
            example_inputs = tuple(example_inputs[name] for name in model.input_names)
    if example_inputs is None:
        raise ConfigError(f"{title} needs example inputs: a tensor, a tuple or a dict of them")

    arguments = _split_arguments(model, example_inputs, title)
    if input_names is not None:
        arguments.names = _checked_names(input_names, len(arguments.positions), "input")
    with _evaluation(model), torch.no_grad(), traceable_experts(model):
        expected = _call(model, arguments, title)
        requested = _requested_axes(arguments, dynamic_shapes)
        given = arguments.tensors
        _enlarge(model, arguments, requested)
        names = _output_names(expected, output_names, arguments.names)
        graph_module, axes = _trace(model, arguments, requested, title)
        enlarged = [tensor is not original for tensor, original in zip(arguments.tensors, given, strict=True)]
        if any(enlarged):
            try:
                _compare_once(model, graph_module, arguments, given, title)
            except CaptureError as error:
                if requested is not None:
                    raise
                # The model does something else at size 1, so the example is taken as it is.
                _log.debug("axes of size 1 stay static: %s", error)
                arguments.tensors = given
                enlarged = []
                graph_module, axes = _trace(model, arguments, requested, title)
    inner = model.model if isinstance(model, TaskModel) else model
    return CapturedModel(
        graph_module=graph_module,
        example_inputs=dict(zip(arguments.names, arguments.tensors, strict=True)),
        given_inputs=_given_inputs(arguments, given, axes) if any(enlarged) else None,
        dynamic_axes=axes,
        output_names=names,
        task=getattr(model, "task", None) if isinstance(model, TaskModel) else None,
        source=(model.source if isinstance(model, TaskModel) else None) or module_source(inner),
        aliases=_aliases(inner),
        pad_token_id=model.pad_token_id if isinstance(model, TaskModel) else 0,
        max_sequence=model.max_sequence if isinstance(model, TaskModel) else None,
        start_token_id=model.start_token_id if isinstance(model, TaskModel) else 0,
        end_token_ids=model.end_token_ids if isinstance(model, TaskModel) else (),
        dtype=next((weight.dtype for weight in inner.parameters() if weight.is_floating_point()), torch.float32),
    )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing printed or logged: a failed trace prints its whole graph, and its reason is raised here anyway."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


def _split_arguments(model: nn.Module, example: Any, title: str) -> _Arguments:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, torch.Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    else:
        raise ConfigError(f"example inputs must be a tensor, a tuple or a dict, got {type(example).__name__}")
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {title}.forward{signature}: {error}") from None

    labels = _argument_labels(signature, bound, len(args))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    paths = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    copied = _copy_shared(leaves, positions)
    if not positions:
        raise ConfigError(f"the example inputs of {title} hold no tensor")
    names = []
    for index in positions:
        group, entry, *rest = [_key(key) for key in paths[index]]
        label = labels[int(entry)] if group == "0" else entry
        names.append(re.sub(r"\W", "_", "_".join([label, *rest])))
    return _Arguments(leaves, spec, positions, names, copied)


def _copy_shared(leaves: list[Any], positions: Sequence[int]) -> frozenset[int]:
    """Copy every tensor that shares memory with one before it; which of them were.

    A tensor that is given for two inputs would be traced as one input, and the other not be read.
    """
    seen: set[int] = set()
    copied = set()
    for number, position in enumerate(positions):
        tensor = leaves[position]
        memory = tensor.untyped_storage().data_ptr() or id(tensor)  # empty tensors have no memory
        if memory in seen:
            leaves[position] = tensor.detach().clone()
            copied.add(number)
        seen.add(memory)
    return frozenset(copied)


def _key(entry: Any) -> str:
    """The dict key, list index or field name of one step of a pytree path, as text."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _argument_labels(signature: inspect.Signature, bound: inspect.BoundArguments, positional: int) -> list[str]:
    labels: list[str] = []
    for name in bound.arguments:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            labels += [f"{name}_{index}" for index in range(len(bound.arguments[name]))]
        elif kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            labels.append(name)
    return labels[:positional]


def _checked_names(names: Sequence[str], count: int, what: str) -> list[str]:
    if len(names) != count:
        raise ConfigError(f"{len(names)} {what} names were given for {count} {what} tensors: {', '.join(names)}")
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"{what} name {name!r} must be letters, digits and underscores")
    if len(set(names)) != len(names):
        raise ConfigError(f"{what} names must differ from one another: {', '.join(names)}")
    return list(names)


def _call(model: nn.Module, arguments: _Arguments, title: str) -> Any:
    args, kwargs = arguments.rebuild(arguments.tensors)
    try:
        return model(*args, **kwargs)
    except Exception as error:  # the model's own code may raise anything; it is reported, not swallowed
        where = user_frame(error)
        raise CaptureError(
            f"{title} fails on the example inputs: {first_line(error)}" + (f" at {where}" if where else "")
        ) from error


def _requested_axes(arguments: _Arguments, dynamic_shapes: Any) -> list[dict[int, Any]] | None:
    """One ``{axis: Dim or name}`` a tensor, or None when every axis may be dynamic."""
    if dynamic_shapes is None:
        return None
    if isinstance(dynamic_shapes, Mapping):
        unknown = [name for name in dynamic_shapes if name not in arguments.names]
        if unknown:
            raise ConfigError(
                f"dynamic shapes name {unknown[0]!r}, which is no input; inputs: {', '.join(arguments.names)}"
            )
        given = [dynamic_shapes.get(name) for name in arguments.names]
    else:
        given = list(dynamic_shapes)
        if len(given) != len(arguments.names):
            raise ConfigError(f"dynamic shapes have {len(given)} entries for {len(arguments.names)} input tensors")
    axes: list[dict[int, Any]] = []
    for name, tensor, entry in zip(arguments.names, arguments.tensors, given, strict=True):
        if isinstance(entry, (tuple, list)):
            entry = dict(enumerate(entry))
        entry = {
            axis: dim for axis, dim in (entry or {}).items() if dim is not None and dim is not torch.export.Dim.STATIC
        }
        for axis in entry:
            if not isinstance(axis, int) or not 0 <= axis < tensor.dim():
                raise ConfigError(f"dynamic shapes name axis {axis} of {name!r}, which has {tensor.dim()} axes")
        axes.append(entry)
    return axes


def _enlarge(model: nn.Module, arguments: _Arguments, requested: list[dict[int, Any]] | None) -> None:
    """Repeat the example along axes of size 1 where the model still runs, since size 1 would be traced as static.

    Where another input is longer along the axis, size 1 may be broadcast to that length: then the model runs at that length
    alone. Only what runs at two further lengths is free to have its own.
    """
    for axis in range(max(tensor.dim() for tensor in arguments.tensors)):
        positions = [
            position
            for index, (position, tensor) in enumerate(zip(arguments.positions, arguments.tensors, strict=True))
            if axis < tensor.dim() and tensor.shape[axis] == 1 and (requested is None or axis in requested[index])
        ]
        if not positions or (axis > 1 and requested is None):
            continue
        before = {position: arguments.leaves[position] for position in positions}
        lengths = {tensor.shape[axis] for tensor in arguments.tensors if axis < tensor.dim()} - {1}
        free = [size for size in range(_ENLARGED, _ENLARGED + len(lengths) + 2) if size not in lengths]
        for size in [_ENLARGED] if requested is not None or not lengths else [free[1], free[0]]:
            for position, tensor in before.items():
                arguments.leaves[position] = tensor.repeat_interleave(size, axis)
            args, kwargs = arguments.rebuild(arguments.tensors)
            try:
                model(*args, **kwargs)
            except Exception as error:  # the model's own code may raise anything: then this axis is not free to grow
                _log.debug("axis %d of size 1 stays static: %s", axis, error)
                for position, tensor in before.items():
                    arguments.leaves[position] = tensor
                break


def _given_inputs(
    arguments: _Arguments, given: Sequence[torch.Tensor], axes: Mapping[str, Mapping[int, str]]
) -> dict[str, torch.Tensor] | None:
    """The example as it was given, by name; None where inputs differ along axes of one name, which the graph says are equal
    (they may where the caller asked for these axes)."""
    sizes: dict[str, int] = {}
    for name, tensor in zip(arguments.names, given, strict=True):
        for axis, label in axes[name].items():
            if sizes.setdefault(label, tensor.shape[axis]) != tensor.shape[axis]:
                return None
    return dict(zip(arguments.names, given, strict=True))


def _tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result, in their order."""
    return [leaf for leaf in pytree.tree_leaves(_opened(result)) if isinstance(leaf, torch.Tensor)]


def _opened(result: Any) -> Any:
    """A result with dicts of fields in the place of dataclasses that pytree does not know."""

    def opened(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return _opened({field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)})

    if not any(dataclasses.is_dataclass(leaf) for leaf in pytree.tree_leaves(result)):
        return result
    return pytree.tree_map(opened, result)


def _output_names(result: Any, given: Sequence[str] | None, input_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(result, Mapping):  # outputs of transformers 4 are mappings whose paths pytree cannot tell
        result = dict(result)
    kind = type(result).__name__
    result = _opened(result)
    entries = [
        (path, leaf) for path, leaf in pytree.tree_flatten_with_path(result)[0] if isinstance(leaf, torch.Tensor)
    ]
    if not entries:
        raise CaptureError(f"the model returns no tensor but a {kind}, in which no tensors are found")
    if given is not None:
        return tuple(_checked_names(given, len(entries), "output"))
    names: list[str] = []
    for index, (path, _) in enumerate(entries):
        keys = [key for key in path if hasattr(key, "key")]
        if keys and len(keys) == len(path):
            name = re.sub(r"\W", "_", "_".join(str(key.key) for key in keys))
        else:
            name = "output" if len(entries) == 1 else f"output_{index}"
        while name in names or name in input_names:
            name += "_out"
        names.append(name)
    return tuple(names)


def _trace(
    model: nn.Module, arguments: _Arguments, requested: list[dict[int, Any]] | None, title: str
) -> tuple[torch.fx.GraphModule, dict[str, dict[int, str]]]:
    """The graph for the arguments, compared with the model, and the names of its dynamic axes."""
    exported = _export(_Flat(model, arguments), arguments, requested, title)
    prefix = "model." + getattr(model, "state_prefix", "")
    graph_module = unlift(exported, prefix, arguments.names)
    axes = _dynamic_axes(exported, arguments, requested)
    _compare(model, graph_module, arguments, axes, exported, title)
    return graph_module, axes


def _export(
    flat: _Flat, arguments: _Arguments, requested: list[dict[int, Any]] | None, title: str
) -> torch.export.ExportedProgram:
    dim = torch.export.Dim
    if requested is None:
        shapes = [
            {axis: dim.AUTO for axis, size in enumerate(tensor.shape) if size > 1} for tensor in arguments.tensors
        ]
    else:
        shapes = [
            {axis: dim.DYNAMIC if isinstance(name, str) else name for axis, name in axes.items()} for axes in requested
        ]
    try:
        with _silenced(), traceable_masks():
            exported = torch.export.export(
                flat, tuple(arguments.tensors), dynamic_shapes=(tuple(shapes),), strict=False
            )
            # Passes and calibration know a value by its node: one that is written into must be another node afterwards.
            # An empty table decomposes nothing.
            return exported.run_decompositions({}) if writes_in_place(exported.graph_module) else exported
    except Exception as error:  # torch.export raises many unrelated types; each is reported as the reason
        raise CaptureError(explain(error, title, arguments.names)) from error


def _dynamic_axes(
    exported: torch.export.ExportedProgram, arguments: _Arguments, requested: list[dict[int, Any]] | None
) -> dict[str, dict[int, str]]:
    """Names of the axes that stayed symbolic: axis 0 is the batch, axis 1 of tokens and of 3-D values the sequence."""
    by_name = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    shapes = [by_name[name].meta["val"].shape for name in exported.graph_signature.user_inputs]
    of_symbol: dict[str, str] = {}
    size_of: dict[str, int] = {}
    axes: dict[str, dict[int, str]] = {}
    for index, (name, tensor, shape) in enumerate(zip(arguments.names, arguments.tensors, shapes, strict=True)):
        axes[name] = {}
        for axis, size in enumerate(shape):
            if str(size).isdigit():  # also a symbol that the trace solved to one number
                continue
            label = None
            if requested is not None:
                wish = requested[index].get(axis)
                label = wish if isinstance(wish, str) else getattr(wish, "__name__", None)
            label = label or of_symbol.get(str(size)) or _axis_name(name, tensor, axis)
            if requested is None and size_of.setdefault(label, tensor.shape[axis]) != tensor.shape[axis]:
                label = f"{name}_dim_{axis}"
            of_symbol.setdefault(str(size), label)
            axes[name][axis] = label
    return axes


def _axis_name(name: str, tensor: torch.Tensor, axis: int) -> str:
    if axis == 0:
        return "batch"
    if axis == 1 and tensor.dim() == (3 if tensor.is_floating_point() else 2):
        return "sequence"
    return f"{name}_dim_{axis}"


def _compare(
    model: nn.Module,
    graph_module: torch.fx.GraphModule,
    arguments: _Arguments,
    axes: dict[str, dict[int, str]],
    exported: torch.export.ExportedProgram,
    title: str,
) -> None:
    """The graph must give the model's numbers on the example and at other sizes of the dynamic axes."""
    _compare_once(model, graph_module, arguments, arguments.tensors, title)
    if isinstance(model, TaskModel) and not model.independent_axes:
        return
    fixed = _axes_at_limit(exported, arguments, axes)
    grown = []
    for number, (name, tensor) in enumerate(zip(arguments.names, arguments.tensors, strict=True)):
        if number in arguments.copied:  # its values in another order, so that it can be told from the one it was
            tensor = tensor.roll(1)
        for axis, label in axes[name].items():
            if label not in fixed:
                tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        grown.append(tensor)
    if all(new is old for new, old in zip(grown, arguments.tensors, strict=True)):
        return
    args, kwargs = arguments.rebuild(grown)
    try:
        model(*args, **kwargs)
    except Exception as error:  # the model's own code may raise anything: these sizes are not valid for it
        _log.debug("%s is compared on the example only, it does not run at other sizes: %s", title, error)
        return
    _compare_once(model, graph_module, arguments, grown, title)


def _axes_at_limit(
    exported: torch.export.ExportedProgram, arguments: _Arguments, axes: dict[str, dict[int, str]]
) -> set[str]:
    """Names of axes that cannot grow by one: those at their limit, and those that are an expression of another axis."""
    limits = {str(symbol): bound.upper for symbol, bound in exported.range_constraints.items()}
    by_name = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    fixed = set()
    for name, tensor, user in zip(
        arguments.names, arguments.tensors, exported.graph_signature.user_inputs, strict=True
    ):
        shape = by_name[user].meta["val"].shape
        for axis, label in axes[name].items():
            symbol = str(shape[axis])
            if symbol not in limits or limits[symbol] <= tensor.shape[axis]:
                fixed.add(label)
    return fixed


def _compare_once(
    model: nn.Module,
    graph_module: torch.fx.GraphModule,
    arguments: _Arguments,
    tensors: Sequence[torch.Tensor],
    title: str,
) -> None:
    args, kwargs = arguments.rebuild(tensors)
    expected = _tensors_of(model(*args, **kwargs))
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(arguments.names, tensors, strict=True))
    try:
        result = graph_module(*tensors)
    except Exception as error:
        raise CaptureError(f"the graph of {title} does not run for {sizes}: {first_line(error)}") from error
    found = [result] if isinstance(result, torch.Tensor) else list(result)
    for want, have in zip(expected, found, strict=True):
        if not _agree(want, have):
            raise CaptureError(
                f"the graph of {title} disagrees with the model for {sizes}: something that depends on sizes or values "
                "was fixed while tracing; give the axes that must be dynamic with dynamic_shapes"
            )


def _agree(want: torch.Tensor, have: torch.Tensor) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(want, have)
    return torch.allclose(have, want, rtol=1e-3, atol=1e-4, equal_nan=True)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """state_dict name -> the other names of the same tensor."""
    names: dict[int, list[str]] = {}
    tensors: list[tuple[str, torch.Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    return {name: tuple(other for other in group if other != name) for group in groups for name in group}

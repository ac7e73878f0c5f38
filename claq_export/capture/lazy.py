"""A Hugging Face model whose weights stay on disk until something needs their values.

The architecture is built without memory for its parameters; each large one becomes a stand-in
(:mod:`claq_export.deferred`) that reads its tensor from the safetensors files, checks it and converts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..deferred import DEFER_FROM, logical_bytes, stand_in
from ..errors import ModelError
from ..inputs import SafetensorsFile


def build_lazily(
    build: Callable[[], nn.Module],
    files: Sequence[Path],
    dtype: torch.dtype,
    may_be_absent: Callable[[str], bool],
) -> nn.Module:
    """Build a transformers model over weights on disk.

    Args:
        build: makes the model from its configuration.
        files: its safetensors files.
        dtype: of floating-point parameters.
        may_be_absent: whether the task does without a parameter of that name; it is zero then.

    Returns:
        the model in evaluation mode; large parameters are stand-ins.

    Raises:
        ModelError: a weight is missing or has another shape; when its values are read: it is NaN or infinite.
    """
    with _parameters_without_memory():
        model = build()
    where = files_by_tensor(files)
    stored = stored_names(model, where)
    absent = sorted(name for name in _wanted(model) if name not in stored and not may_be_absent(name))
    if absent:
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise ModelError(
            f"{files[0].parent} lacks {len(absent)} weights that {type(model).__name__} needs: {', '.join(absent[:4])}"
            f"{more}. With --memory weights are read under the names that the files give them; a model whose weights "
            "transformers renames while it loads needs a run without --memory"
        )
    replaced: dict[int, nn.Parameter] = {}
    for name, owner, leaf, parameter in parameter_slots(model):
        if id(parameter) not in replaced:
            kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
            tensor = _tensor(parameter, kind, stored.get(name), where, name)
            replaced[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        owner._parameters[leaf] = replaced[id(parameter)]
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for leaf, buffer in list(owner._buffers.items()):
            source = stored.get(f"{prefix}{leaf}")
            if buffer is not None and source is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = where[source].read(source).to(buffer.dtype)
    return model.eval()


def parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Name, module, name there and value of every parameter, tied ones under each of their names.

    They may be replaced meanwhile.
    """
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf, parameter


def files_by_tensor(files: Sequence[Path]) -> dict[str, SafetensorsFile]:
    """Name of a tensor -> the file it is in."""
    where: dict[str, SafetensorsFile] = {}
    for path in files:
        file = SafetensorsFile(path, ModelError)
        where.update(dict.fromkeys(file, file))
    return where


class StoredParameter:
    """A parameter as a tensor of a safetensors file gives it, in the parameter's dtype.

    Args:
        file, source: where it is, and its name there.
        dtype: of the parameter.
        name: of the parameter, for messages.
    """

    def __init__(self, file: SafetensorsFile, source: str, dtype: torch.dtype, name: str) -> None:
        self._file, self._source, self._dtype, self._name = file, source, dtype, name

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file says."""
        return self._file.tensors[self._source].shape

    def load(self) -> torch.Tensor:
        """The values.

        Raises:
            ModelError: one is not finite, in the file or in the parameter's dtype; or the file cannot be read.
        """
        return self._values(self.shape, 0)

    def load_matrix(self, index: int) -> torch.Tensor:
        """The values of one matrix of a stack of them; see :meth:`load`."""
        return self._values(self.shape[1:], index)

    def _values(self, shape: tuple[int, ...], index: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=self._dtype)
        flat = values.view(-1)
        for where, piece in self._pieces(index * len(flat), (index + 1) * len(flat)):
            flat[where] = piece
        return values

    def gives(self, parameter: torch.Tensor) -> bool:
        """Whether the file gives these values."""
        if self.shape != tuple(parameter.shape) or not parameter.is_contiguous():
            return False
        flat = parameter.detach().view(-1)
        return all(torch.equal(flat[where], piece) for where, piece in self._pieces())

    def _pieces(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """The values from ``start`` to ``stop`` in the parameter's dtype, and where among them they belong."""
        # Piece by piece, since the values of the file's dtype, and what checks make of them, would double the memory.
        done = 0
        for piece in self._file.pieces(self._source, start, stop):
            values = piece.to(self._dtype)
            checked = values if values.is_floating_point() else piece
            if checked.is_floating_point() and not torch.isfinite(checked).all():
                if not torch.isfinite(piece).all():
                    raise ModelError(f"{self._file.path} has NaN or infinite weights in {self._name}")
                raise ModelError(f"{self._file.path} has weights beyond the range of {self._dtype} in {self._name}")
            yield slice(done, done + len(values)), values
            done += len(values)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that are registered inside have shape and dtype only; buffers are computed as ever."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = type(param)(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _wanted(model: nn.Module) -> list[str]:
    """One name for each parameter (tied ones once)."""
    return [name for name, _ in model.named_parameters()]


def stored_names(model: nn.Module, where: Mapping[str, Any]) -> dict[str, str]:
    """Name in the model -> name in the files: the same, with or without the base model's prefix, or that of a tied
    parameter."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    found: dict[str, str] = {}
    by_identity: dict[int, str] = {}
    entries = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in entries:
        candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        source = next((candidate for candidate in candidates if candidate in where), None)
        if source is not None:
            found[name] = source
            by_identity.setdefault(id(tensor), source)
    for name, tensor in entries:
        if name not in found and id(tensor) in by_identity:
            found[name] = by_identity[id(tensor)]
    return found


def _tensor(
    parameter: nn.Parameter, dtype: torch.dtype, source: str | None, where: Mapping[str, SafetensorsFile], name: str
) -> torch.Tensor:
    if source is None:
        return torch.zeros(parameter.shape, dtype=dtype)
    file, shape = where[source], tuple(parameter.shape)
    if file.tensors[source].shape != shape:
        raise ModelError(
            f"{file.path}: tensor {source!r} has shape {list(file.tensors[source].shape)}, the model needs {list(shape)}"
        )

    stored = StoredParameter(file, source, dtype, name)
    wanted = parameter.to(dtype)  # on the meta device: for its size
    if logical_bytes(wanted) < DEFER_FROM:
        return stored.load()
    return stand_in(shape, dtype, stored.load, stored.load_matrix)

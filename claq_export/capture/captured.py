"""What a capture hands to the rest of the compiler: the graph, its inputs and outputs, and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..deferred import ReadingInterpreter, is_deferred
from ..errors import ConfigError

ENCODER, FIRST_STEP, NEXT_STEP = PARTS = ("encoder", "decoder", "decoder_with_past")
"""Graphs of an encoder-decoder with a cache, by what optimum lets the names of their files begin with."""

CACHED = "-with-past"
"""What optimum adds to the name of a task whose graphs have a cache."""

PAST_INPUTS = "past_key_values"
"""What the names of cached keys and values begin with, as optimum has them."""


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        path: folder, hub id, or qualified class name of a module given in Python.
        sha256: hex digest of its configuration and weights.
        files: the safetensors files of a folder's weights.
        folder: where its files lie on this machine, of a hub id in the hub's cache; None of a module given in Python.
    """

    path: str
    sha256: str
    files: tuple[Path, ...] = ()
    folder: Path | None = None


def module_source(model: nn.Module) -> Source:
    """Source of a module given in Python: its class, and a digest of names, dtypes, shapes and bytes of its state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            _add_tensor(digest, name, tensor)
    kind = type(model)
    return Source(path=f"{kind.__module__}.{kind.__qualname__}", sha256=digest.hexdigest())


def graph_digest(graph_module: torch.fx.GraphModule) -> str:
    """Hex digest of what a graph computes, its parameters left out: operators, their arguments, buffers and constants."""
    digest = hashlib.sha256()
    for node in graph_module.graph.nodes:
        digest.update(f"{node.format_node()}\n".encode())
    for name, tensor in graph_module.named_buffers():
        if not is_deferred(tensor):
            _add_tensor(digest, name, tensor)
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


@dataclass
class CapturedModel:
    """A model as a graph of ATen operators that runs at every size of its dynamic axes.

    ``graph_module(**inputs)`` takes the tensors of ``input_names`` and returns one tensor, or a tuple of tensors in the
    order of ``output_names``. Its parameters are ``get_attr`` nodes under the names they have in the model's
    ``state_dict()`` and share memory with it.

    Attributes:
        graph_module: the graph; passes rewrite it in place.
        example_inputs: input name -> tensor, sizes of dynamic axes at least 2.
        given_inputs: the example as it was given, where ``example_inputs`` repeats it along axes of size 1.
        dynamic_axes: input name -> {axis: name of the axis}; an axis not listed is static.
        output_names: one a tensor returned.
        task: task name (see :mod:`claq_export.capture.tasks`), or None for a module of unknown purpose.
        source: where the model came from.
        aliases: state_dict name -> other state_dict names of the same tensor (tied weights).
        pad_token_id: what pads ragged token lists.
        max_sequence: most tokens a sequence may have, or None if the model sets no limit.
        start_token_id: what an encoder-decoder's output begins after.
        end_token_ids: what ends what is generated.
        tokenizer: the model's tokenizer, if it came with one.
        file_names: input or output -> its name in the emitted file, where that is no identifier.
        dtype: of the model's weights and activations.
        file_graphs: the same model as the graphs that go into files, where they are others: with a key/value cache
            (sharing parameters), in another dtype, or both; of an encoder-decoder with a cache there are several.
        part: of one of several such graphs, what its file's name begins with.
    """

    graph_module: torch.fx.GraphModule
    example_inputs: dict[str, torch.Tensor]
    dynamic_axes: dict[str, dict[int, str]]
    output_names: tuple[str, ...]
    task: str | None
    source: Source
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pad_token_id: int = 0
    max_sequence: int | None = None
    start_token_id: int = 0
    end_token_ids: tuple[int, ...] = ()
    tokenizer: Any = None
    file_names: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    file_graphs: tuple[CapturedModel, ...] = ()
    part: str = ""
    given_inputs: dict[str, torch.Tensor] | None = None

    @property
    def graphs(self) -> list[CapturedModel]:
        """This graph, and the files' where they are others."""
        return [self, *self.file_graphs]

    @property
    def cached(self) -> bool:
        """Whether this is a graph with a key/value cache, or one of several that share one."""
        return (self.task or "").endswith(CACHED)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the keys and values that the graph takes and returns; the graph's own without a cache."""
        cached = (value.dtype for name, value in self.example_inputs.items() if name.startswith(PAST_INPUTS))
        return next(cached, self.dtype)

    @property
    def emitted(self) -> tuple[CapturedModel, ...]:
        """The graphs that go into files."""
        return self.file_graphs or (self,)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the graph's arguments."""
        return tuple(self.example_inputs)

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, str]]:
        """What ``torch.onnx.export(graph_module, kwargs=example_inputs, dynamic_shapes=...)`` takes."""
        return {name: dict(self.dynamic_axes.get(name, {})) for name in self.example_inputs}

    @property
    def export_shapes(self) -> dict[str, dict[int, Any]]:
        """What ``torch.export.export(graph_module, (), kwargs=example_inputs, dynamic_shapes=...)`` takes."""
        dim = torch.export.Dim.DYNAMIC
        return {name: dict.fromkeys(axes, dim) for name, axes in self.dynamic_shapes.items()}

    @property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the example inputs, by the inputs' names in the emitted file."""
        return {self.file_names.get(name, name): tuple(value.shape) for name, value in self.example_inputs.items()}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the graph without gradients; always a tuple, in the order of ``output_names``. Weights that are not in memory
        are read on the way."""
        module = self.graph_module
        with torch.no_grad():
            if any(map(is_deferred, module.parameters())):
                result = ReadingInterpreter(module).run(*(inputs[name] for name in self.input_names))
            else:
                result = module(**inputs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)

    def inputs_from_tokens(
        self, tokens: torch.Tensor | Sequence[Sequence[int]], attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """All inputs of a text model for the given tokens.

        Args:
            tokens: int64 ``[batch, sequence]``, or one list of token ids a document (padded on the right here).
            attention_mask: ``[batch, sequence]``, 1 for tokens and 0 for padding; default: all ones.

        Raises:
            ConfigError: the model does not read tokens, or reads an input that tokens do not determine.
        """
        return text_inputs(self.input_names, tokens, attention_mask, self.pad_token_id)


def text_inputs(
    names: Sequence[str],
    tokens: torch.Tensor | Sequence[Sequence[int]],
    attention_mask: torch.Tensor | None = None,
    pad_token_id: int = 0,
) -> dict[str, torch.Tensor]:
    """The inputs of a text model for tokens.

    Args:
        names: any of ``input_ids``, ``attention_mask``, ``token_type_ids``, ``position_ids``.
        tokens, attention_mask: as :meth:`CapturedModel.inputs_from_tokens` takes them.
        pad_token_id: what pads ragged lists.

    Raises:
        ConfigError: ``names`` has no ``input_ids``, or a name whose value tokens do not determine.
    """
    if "input_ids" not in names:
        raise ConfigError(f"the model does not read tokens: its inputs are {', '.join(names)}; give it tensors instead")
    if not isinstance(tokens, torch.Tensor):
        length = max((len(row) for row in tokens), default=0)
        if length == 0:
            raise ConfigError("there are no tokens to make model inputs from")
        attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens])
        tokens = torch.tensor([list(row) + [pad_token_id] * (length - len(row)) for row in tokens])
    input_ids = tokens.to(torch.int64)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
    known = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(input_ids),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"tokens do not determine the model's input {unknown[0]!r}; give it tensors instead")
    return {name: known[name] for name in names}

"""Causal language models with a key/value cache: prefill and decode as one graph, named as optimum names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CaptureError
from .captured import CACHED, CapturedModel
from .module import capture_module
from .tasks import TaskModel

CACHED_TASK = f"text-generation{CACHED}"
"""Task name of a graph with cache, as optimum has it; the transformers class is that of ``text-generation``."""

SLOT = re.compile(r"^(past_key_values|present)_(\d+)_(?:(decoder|encoder)_)?(key|value)$")
"""Name of a key or value in a graph; of encoder-decoders it tells whose."""

_EXAMPLE = (2, 3, 5)
_PROBES = ((1, 6, 0, False), (3, 4, 0, True), (2, 1, 6, True), (1, 1, 1, False))
"""Batch, new tokens, cached tokens and whether a row is padded on the left: where the graph must agree with the
model."""


class CachedDecoder(TaskModel):
    """A causal language model as a function of tokens and of its cache, all positional tensors.

    Inputs (as the file names them): ``input_ids [batch, sequence]``, ``attention_mask [batch, past + sequence]``,
    ``position_ids`` where the model takes them (token types are left to it: all zeros), then ``past_key_values.N.key`` and
    ``.value [batch, heads, past, head size]`` a layer. Outputs: ``logits [batch, sequence, vocabulary]``, then
    ``present.N.key`` and ``.value [batch, heads, past + sequence, head size]``. The past may have length zero.

    The cache holds every position, also in layers with a sliding window, whose mask leaves out what is outside.

    Raises:
        CaptureError: the model keeps something else between steps (a recurrent state, a compressed cache).
    """

    independent_axes = False  # the mask is as long as past and new tokens together

    def __init__(self, task_model: TaskModel) -> None:
        super().__init__(task_model.model, "text-generation", task_model.source)
        self.task = CACHED_TASK
        self.token_inputs = tuple(name for name in self.input_names if name != "token_type_ids")
        self.cache_shapes = _cache_shapes(task_model)
        # Names of a graph's arguments are identifiers; the dots come back in the file.
        slots = [f"{index}_{part}" for index in range(len(self.cache_shapes)) for part in ("key", "value")]
        self.input_names = (*self.token_inputs, *(f"past_key_values_{slot}" for slot in slots))
        self.output_names = ("logits", *(f"present_{slot}" for slot in slots))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Run the model; tensors in the order of ``input_names``, results in that of ``output_names``."""
        tokens, past = tensors[: len(self.token_inputs)], tensors[len(self.token_inputs) :]
        cache = filled_cache(past)
        result = self.model(
            **dict(zip(self.token_inputs, tokens, strict=True)), past_key_values=cache, use_cache=True, return_dict=True
        )
        state = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *state)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> {axis: name}."""
        axes = {name: {0: "batch", 1: "sequence"} for name in self.token_inputs}
        axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
        past = self.input_names[len(self.token_inputs) :]
        return axes | {name: {0: "batch", 2: "past_sequence"} for name in past}

    def example_inputs(
        self,
        batch: int = _EXAMPLE[0],
        sequence: int = _EXAMPLE[1],
        past: int = _EXAMPLE[2],
        padded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, torch.Tensor]:
        """Fixed pseudo-random tokens and cache; ``padded`` masks the first position of the last row."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, int(self.config.get_text_config().vocab_size), (batch, sequence), generator=generator)
        mask = torch.ones(batch, past + sequence, dtype=torch.int64)
        if padded:
            mask[-1, 0] = 0
        named = {
            "input_ids": tokens,
            "attention_mask": mask,
            # A copy: torch.export remembers the base of a view.
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:].clone(),
        }
        inputs = {name: named[name] for name in self.token_inputs}
        names = iter(self.input_names[len(self.token_inputs) :])
        for shapes in self.cache_shapes:
            for heads, size in shapes:
                inputs[next(names)] = torch.randn(batch, heads, past, size, generator=generator).to(dtype)
        return inputs


def capture_decoder(model: TaskModel) -> CapturedModel:
    """The graph with cache of a model loaded for text generation; it shares the model's parameters.

    The graph is compared with the model at prefill and decode sizes, with and without padding on the left.

    Raises:
        CaptureError: the model's cache is not one key and one value tensor a layer, or the graph cannot be captured.
    """
    decoder = CachedDecoder(model)
    dtype = next(model.model.parameters()).dtype
    captured = capture_module(decoder, decoder.example_inputs(dtype=dtype), decoder.dynamic_axes)
    captured.file_names = names_in_files(captured)
    for batch, sequence, past, padded in _PROBES:
        inputs = decoder.example_inputs(batch, sequence, past, padded, dtype)
        with torch.no_grad():
            expected = decoder(*inputs.values())
        found = captured.run(inputs)
        seen = inputs["attention_mask"][:, past:].bool()
        for name, want, have in zip(captured.output_names, expected, found, strict=True):
            # What a padding token computes is never read.
            want, have = (want[seen], have[seen]) if name == "logits" else (want[:, :, past:], have[:, :, past:])
            if name != "logits":
                want, have = want.transpose(1, 2)[seen], have.transpose(1, 2)[seen]
            if not is_close(have, want):
                raise CaptureError(
                    f"the graph with cache of {type(model.model).__name__} disagrees with the model in {name} for a "
                    f"batch of {batch} with {sequence} new and {past} cached tokens; without cache it can be exported "
                    "(--no-cache)"
                )
    return captured


def names_in_files(captured: CapturedModel) -> dict[str, str]:
    """Input or output -> its name as optimum has it, with dots, which no argument's name can have."""
    found = {}
    for name in (*captured.input_names, *captured.output_names):
        slot = SLOT.match(name)
        found[name] = ".".join(filter(None, slot.groups())) if slot else name
    return found


def is_close(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether a graph's output is that of the model."""
    return want.shape == have.shape and torch.allclose(have, want, rtol=1e-3, atol=1e-4)


def _cache_shapes(task_model: TaskModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """``(heads, size)`` of the key and of the value a layer, seen on a run of the model."""
    model = task_model.model
    title = type(model).__name__
    inputs = task_model.example_inputs(1, 4)
    with torch.no_grad():
        result = model(**inputs, use_cache=True, return_dict=True)
    cache = getattr(result, "past_key_values", None)
    # transformers 4 gives some decoders (BERT) a cache for an encoder too.
    layers = list(getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ())
    while layers and _keeps_nothing(layers[-1]):
        layers.pop()
    if not layers:
        raise CaptureError(f"{title} keeps no cache of keys and values between steps; export it with --no-cache")
    shapes = []
    for index, layer in enumerate(layers):
        pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
        if any(not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 for tensor in pair):
            raise CaptureError(
                f"layer {index} of {title} keeps no keys and values but a {type(layer).__name__}; "
                "export it with --no-cache"
            )
        shapes.append(tuple((int(tensor.shape[1]), int(tensor.shape[3])) for tensor in pair))  # type: ignore[union-attr]
    return shapes  # type: ignore[return-value]


def _keeps_nothing(layer: Any) -> bool:
    """Whether a layer of the cache at its end is none: transformers counts an encoder's layers where there are more of them,
    and the last layers of Gemma 3n and 4 read keys and values of earlier ones."""
    return not getattr(layer, "is_initialized", True) or type(layer).__name__ == "DummyLayer"


def filled_cache(past: Sequence[torch.Tensor]) -> Any:
    """A transformers cache that holds the given keys and values, which updates append to."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = key, value
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        cache.layers.append(layer)
    return cache

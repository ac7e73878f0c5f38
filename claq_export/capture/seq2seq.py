"""Encoder-decoders with a key/value cache: three graphs over one set of parameters, named as optimum names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CaptureError, first_line
from .captured import CACHED, ENCODER, FIRST_STEP, NEXT_STEP, PARTS, CapturedModel
from .decoder import SLOT, filled_cache, is_close, names_in_files
from .module import capture_module
from .precision import inputs_in_dtype
from .tasks import DECODER_TOKENS, TaskModel

_PROBES = ((1, 3, 4, 2), (3, 1, 6, 5), (1, 1, 2, 1))
"""Batch, new tokens, encoded tokens and cached tokens: where the graphs must agree with the model."""


class Seq2SeqPart(TaskModel):
    """One of the three functions that an encoder-decoder generates with, all arguments positional tensors.

    ``encoder``: the model's input (``input_ids`` and ``attention_mask [batch, encoder_sequence]``, or ``input_features``) to
    ``last_hidden_state [batch, encoder_sequence, hidden size]``.

    ``decoder``, the first step: ``encoder_attention_mask`` (of models that read tokens), ``input_ids [batch, sequence]`` and
    ``encoder_hidden_states`` to ``logits [batch, sequence, vocabulary]``, then four tensors a layer:
    ``present.N.decoder.key`` and ``.value [batch, heads, sequence, head size]`` of the tokens, and ``present.N.encoder.key`` and
    ``.value [batch, heads, encoder_sequence, head size]``, which stay the same.

    ``decoder_with_past``, each later step: the mask, ``input_ids`` and the four tensors a layer as ``past_key_values.N...`` to
    ``logits`` and ``present.N.decoder.key`` and ``.value [batch, heads, past + sequence, head size]``.

    Args:
        task_model: the whole model.
        part: which.
        state: heads and head size of the keys and values of each layer, from :func:`cache_shapes`.
    """

    independent_axes = False  # an encoder's mask is as long as what it encoded

    def __init__(self, task_model: TaskModel, part: str, state: Sequence[tuple[int, int]]) -> None:
        super().__init__(task_model.model, task_model.task, task_model.source)
        self.part, self.state = part, tuple(state)
        self._axes_of_whole, self._example_of_whole = task_model.dynamic_axes, task_model.example_inputs
        self.task = task_model.task + CACHED
        mask = ("encoder_attention_mask",) if "attention_mask" in task_model.input_names else ()
        if part == ENCODER:
            self.input_names = tuple(name for name in task_model.input_names if name != DECODER_TOKENS)
            self.output_names = ("last_hidden_state",)
            return
        both, own = ("decoder", "encoder"), ("decoder",)
        if part == FIRST_STEP:
            self.input_names = (*mask, "input_ids", "encoder_hidden_states")
            self.output_names = ("logits", *self._slots("present", both))
        else:
            self.input_names = (*mask, "input_ids", *self._slots("past_key_values", both))
            self.output_names = ("logits", *self._slots("present", own))

    def _slots(self, prefix: str, kinds: Sequence[str]) -> list[str]:
        """Names of graphs' arguments are identifiers; the dots come back in the file."""
        return [
            f"{prefix}_{layer}_{kind}_{tensor}"
            for layer in range(len(self.state))
            for kind in kinds
            for tensor in ("key", "value")
        ]

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the part; tensors in the order of ``input_names``, results in that of ``output_names``."""
        named = dict(zip(self.input_names, tensors, strict=True))
        if self.part == ENCODER:
            encoder: Any = self.model.get_encoder()  # type: ignore[operator]
            return encoder(**named, return_dict=True).last_hidden_state
        past = tensors[len(tensors) - 4 * len(self.state) :] if self.part == NEXT_STEP else ()
        cache = _filled_pair(past)
        hidden = named.get("encoder_hidden_states")
        if hidden is None:
            # Its keys and values are cached: nothing reads more of it than its shape.
            size = int(self.config.get_text_config().hidden_size)
            hidden = past[2].new_zeros(past[2].shape[0], past[2].shape[2], size)
        result = decode(self.model, hidden, named.get("encoder_attention_mask"), named["input_ids"], cache)
        caches = (cache.self_attention_cache, cache.cross_attention_cache)
        kept = caches if self.part == FIRST_STEP else caches[:1]
        state = [
            tensor
            for layers in zip(*(one.layers for one in kept), strict=True)
            for layer in layers
            for tensor in (layer.keys, layer.values)
        ]
        return (result.logits, *state)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> {axis: name}."""
        if self.part == ENCODER:
            return {name: self._axes_of_whole[name] for name in self.input_names}
        axes = {
            "encoder_attention_mask": {0: "batch", 1: "encoder_sequence"},
            "input_ids": {0: "batch", 1: "sequence"},
            "encoder_hidden_states": {0: "batch", 1: "encoder_sequence"},
        }
        lengths = {"decoder": "past_sequence", "encoder": "encoder_sequence"}
        for name in self.input_names:
            if (slot := SLOT.match(name)) is not None:
                axes[name] = {0: "batch", 2: lengths[slot[3]]}
        return {name: axes[name] for name in self.input_names}

    def example_inputs(
        self, batch: int = 2, sequence: int = 3, encoded: int = 6, past: int = 5, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Fixed pseudo-random tokens, states and cache; of tokens that were encoded the last of the last row is padding."""
        if self.part == ENCODER:
            whole = self._example_of_whole(batch, encoded)
            return inputs_in_dtype({name: whole[name] for name in self.input_names}, dtype)
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(batch, encoded, dtype=torch.int64)
        mask[-1, encoded - encoded // 4 :] = 0
        hidden = int(self.config.get_text_config().hidden_size)
        inputs = {
            "encoder_attention_mask": mask,
            "input_ids": torch.randint(0, self._vocabulary(), (batch, sequence), generator=generator),
            "encoder_hidden_states": torch.randn(batch, encoded, hidden, generator=generator).to(dtype),
        }
        for name in self.input_names:
            if (slot := SLOT.match(name)) is not None:
                heads, size = self.state[int(slot[2])]
                length = past if slot[3] == "decoder" else encoded
                inputs[name] = torch.randn(batch, heads, length, size, generator=generator).to(dtype)
        return {name: inputs[name] for name in self.input_names}


def capture_parts(model: TaskModel) -> tuple[CapturedModel, ...]:
    """The three graphs of a model loaded for a sequence-to-sequence task; they share its parameters.

    Each is compared with the model at other sizes.

    Raises:
        CaptureError: the model's cache is not keys and values of its own tokens and of the encoder's, or a graph cannot be
            captured.
    """
    try:
        state = cache_shapes(model)
        dtype = next(model.model.parameters()).dtype
        return tuple(_capture_part(Seq2SeqPart(model, part, state), dtype) for part in PARTS)
    except CaptureError as error:
        raise CaptureError(f"{error}; without a cache it may be captured (--no-cache)") from error


def _capture_part(part: Seq2SeqPart, dtype: torch.dtype) -> CapturedModel:
    captured = capture_module(part, part.example_inputs(dtype=dtype), part.dynamic_axes)
    captured.part = part.part
    captured.file_names = names_in_files(captured)
    for batch, sequence, encoded, past in _PROBES:
        inputs = part.example_inputs(batch, sequence, encoded, past, dtype)
        with torch.no_grad():
            expected = part(*inputs.values())
        found = captured.run(inputs)
        wanted = (expected,) if isinstance(expected, torch.Tensor) else expected
        for name, want, have in zip(captured.output_names, wanted, found, strict=True):
            if not is_close(have, want):
                raise CaptureError(
                    f"the graph of the {part.part} of {type(part.model).__name__} disagrees with the model in {name} for a "
                    f"batch of {batch} with {sequence} new, {encoded} encoded and {past} cached tokens"
                )
    return captured


def decode(
    model: Any,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    tokens: torch.Tensor,
    cache: Any = None,
    *,
    use_cache: bool = True,
) -> Any:
    """A step of the decoder of a transformers model, by its own forward.

    Args:
        model: the encoder-decoder.
        hidden: what was encoded, ``[batch, encoder_sequence, hidden size]``.
        mask: of what was encoded, ``[batch, encoder_sequence]``; None: nothing is padding.
        tokens: int64 ``[batch, sequence]``, those that ``cache`` does not hold.
        cache: of transformers; None: the model makes one if it is to use one.
        use_cache: whether the result has a cache.
    """
    from transformers.modeling_outputs import BaseModelOutput

    encoded = BaseModelOutput(last_hidden_state=hidden)
    encoded.router_logits = None  # mixtures of experts look for them, for a loss
    return model(
        encoder_outputs=encoded,
        attention_mask=mask,
        decoder_input_ids=tokens,
        past_key_values=cache,
        use_cache=use_cache,
        return_dict=True,
    )


def cache_shapes(task_model: TaskModel) -> list[tuple[int, int]]:
    """Heads and head size of each layer's keys and values, seen on a run of the model.

    Raises:
        CaptureError: the model keeps something else between steps.
    """
    title = type(task_model.model).__name__
    inputs = task_model.example_inputs(1, 4)
    encoder = Seq2SeqPart(task_model, ENCODER, ())
    try:
        with torch.no_grad():
            hidden = encoder(*(inputs[name] for name in encoder.input_names))
            result = decode(task_model.model, hidden, inputs.get("attention_mask"), inputs[DECODER_TOKENS], None)
    except Exception as error:  # models refuse a cache in their own ways; each is the reason
        raise CaptureError(f"{title} does not run with a cache: {first_line(error)[:200]}") from error
    cache = getattr(result, "past_key_values", None)
    pair = [getattr(cache, f"{kind}_attention_cache", None) for kind in ("self", "cross")]
    layers = [list(getattr(one, "layers", ())) for one in pair]
    if not layers[0] or len(layers[0]) != len(layers[1]):
        raise CaptureError(f"{title} keeps no cache of keys and values between steps")
    shapes = []
    for index, (own, cross) in enumerate(zip(*layers, strict=True)):
        tensors = [getattr(layer, name, None) for layer in (own, cross) for name in ("keys", "values")]
        sizes = {(int(t.shape[1]), int(t.shape[3])) for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 4}
        if len(sizes) != 1 or any(not isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise CaptureError(f"layer {index} of {title} keeps no keys and values of one size")
        shapes.append(sizes.pop())
    return shapes


def _filled_pair(past: Sequence[torch.Tensor]) -> Any:
    """A transformers cache of an encoder-decoder: keys and values of its tokens, which updates append to, and of the
    encoder's, which stay; four tensors a layer."""
    from transformers.cache_utils import EncoderDecoderCache

    own = [tensor for start in range(0, len(past), 4) for tensor in past[start : start + 2]]
    cross = [tensor for start in range(0, len(past), 4) for tensor in past[start + 2 : start + 4]]
    return EncoderDecoderCache(filled_cache(own), filled_cache(cross))

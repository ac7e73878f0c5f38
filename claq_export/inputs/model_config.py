"""The sizes in a model's ``config.json``, checked before an architecture is built from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from ..errors import ClaqError

SIZE_LIMIT = 1 << 24
"""Largest width, number of heads or vocabulary; the largest vocabularies in use have a quarter of a million tokens."""

POSITIONS_LIMIT = 1 << 31
"""Largest number of positions."""

LAYERS_ALWAYS_ACCEPTED = 1000
"""Layers that may share weights, so that the files hold fewer tensors than there are layers (ALBERT)."""

_LAYERS = re.compile(r"n_layers?|num_(\w+_)?layers|(encoder|decoder)_layers")
_POSITIONS = re.compile(r"max_position_embeddings|n_positions|n_ctx|max_sequence_length")
_SIZES = re.compile(
    r"hidden_size|d_model|n_embd|dim|hidden_dim|d_kv|d_ff|n_inner|ffn_dim|embedding_size|vocab_size|intermediate_size"
    r"|n_heads?|num_heads|num_(\w+_)?attention_heads|num_key_value_heads|image_size|patch_size|num_channels"
)
# Of a part that may be absent, or "to be computed": 0 in some architectures.
_OPTIONAL_SIZES = re.compile(r"head_dim|\w+_hidden_size|\w+_intermediate_size")
# Parts that a model may do without are said to have no layers.
_MUST_HAVE_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}


def check_sizes(config: dict[str, Any], tensors: int, where: str, error: type[ClaqError]) -> None:
    """Check the numbers of a configuration that decide how much is built.

    Known names are looked at, in nested configurations too: a size is a positive whole number (or a list of such, or null for
    the default; 0 where a part may be absent), a model has no more layers than its files hold tensors, and no number is NaN.
    Whether the weights fit is decided by :func:`~claq_export.capture.fit.check_fit`.

    Args:
        config: content of ``config.json``.
        tensors: number of tensors in the model's files.
        where: the file, for messages.
        error: raised when a size cannot be believed.

    Raises:
        error: names the size, its value and what is accepted.
    """
    layers = max(tensors, LAYERS_ALWAYS_ACCEPTED)
    for name, value in _numbers(config):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(value, float) and math.isnan(value):
            raise error(f"{where}: {name[-200:]} is NaN, expected a number")
        if _LAYERS.fullmatch(leaf):
            low, high = int(name in _MUST_HAVE_LAYERS), layers
            reason = f"; the model's files hold {tensors} tensors"
        elif _POSITIONS.fullmatch(leaf):
            low, high, reason = 1, POSITIONS_LIMIT, ""
        elif _SIZES.fullmatch(leaf) or _OPTIONAL_SIZES.fullmatch(leaf):
            low, high, reason = int(_SIZES.fullmatch(leaf) is not None), SIZE_LIMIT, ""
        else:
            continue
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not whole or not low <= value <= high:
            # The conversion of an integer of thousands of digits is itself refused by Python.
            large = isinstance(value, int) and abs(value) >= 1 << 64
            shown = "a number beyond 64 bits" if large else repr(value)[:40]
            raise error(f"{where}: {name[-200:]} is {shown}, expected a whole number from {low} to {high}{reason}")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of nested objects with the object's name before theirs; each member of a list by itself."""
    # Not by recursion: the parser accepts objects nested as deeply as the stack allows.
    waiting = [("", config)]
    while waiting:
        prefix, values = waiting.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}."[-200:], value))
                continue
            for member in value if isinstance(value, list) else [value]:
                if member is not None and not isinstance(member, (dict, list)):
                    yield f"{prefix}{name}", member

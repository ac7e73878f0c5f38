"""Checks of a language model's graph with a key/value cache: inputs of real decoding steps, and agreement with the graph
without cache. Of encoder-decoders: cached_seq2seq.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .capture import PAST_INPUTS, CapturedModel
from .errors import VerificationError
from .kernels import use_backend

TEXTS = (
    "The committee will meet again on Thursday to discuss the budget.",
    "Rain fell all night.",
)
DECODE_STEPS = 3
_AGREEMENT = 1e-3


def decoding_inputs(captured: CapturedModel) -> list[dict[str, torch.Tensor]]:
    """Inputs of a prefill, of a batch padded on the left where there is a tokenizer, and of a few greedy steps after it.

    Args:
        captured: the graph with cache; its own keys and values are those of the next step.
    """
    if captured.tokenizer is not None:
        rows = [captured.tokenizer(text)["input_ids"] for text in TEXTS]
        length = max(len(row) for row in rows)
        tokens = torch.tensor([[captured.pad_token_id] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    else:
        tokens = captured.example_inputs["input_ids"].repeat(1, 3)
        mask = torch.ones_like(tokens)
        mask[-1, :2] = 0
    past = {
        name: tensor[:, :, :0].expand(tokens.shape[0], -1, -1, -1)
        for name, tensor in captured.example_inputs.items()
        if name.startswith(PAST_INPUTS)
    }
    steps = []
    for _ in range(1 + DECODE_STEPS):
        inputs = step_inputs(captured, tokens, mask, past)
        steps.append(inputs)
        logits, *state = captured.run(inputs)
        past = dict(zip(past, state, strict=True))
        tokens = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return steps


def step_inputs(
    captured: CapturedModel, tokens: torch.Tensor, mask: torch.Tensor, past: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All inputs of one step, in order.

    Args:
        tokens: int64 ``[batch, sequence]``, the new ones.
        mask: int64 ``[batch, past + sequence]``.
        past: keys and values by input name.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    named = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past}
    return {name: named[name] for name in captured.input_names}


def check_cache(whole: CapturedModel, cached: CapturedModel, steps: list[dict[str, torch.Tensor]]) -> float:
    """Compare generation with the cache with the graph that sees all tokens at once, both quantized, in exact arithmetic.

    Args:
        whole: the graph without cache.
        cached: the graph with cache, in the dtype of ``whole``.
        steps: from :func:`decoding_inputs`; their tokens and masks are used.

    Returns:
        the largest difference of logits, divided by their largest magnitude.

    Raises:
        VerificationError: it is more than rounding explains.
    """
    # Rounded to int8, activations that differ in their last bit would differ by a 127th.
    with use_backend("reference"):
        error = _difference(whole, cached, steps)
    return agreeing(error)


def agreeing(error: float) -> float:
    """``error`` itself, the largest difference of logits in units of the largest.

    Raises:
        VerificationError: it is more than rounding explains.
    """
    if not error <= _AGREEMENT:
        raise VerificationError(
            f"the graph with cache deviates from the one without by {error:.3g} of the largest logit; "
            f"at most {_AGREEMENT:g} is expected; without a cache it may be exported (--no-cache)"
        )
    return error


def _difference(whole: CapturedModel, cached: CapturedModel, steps: list[dict[str, torch.Tensor]]) -> float:
    tokens = torch.cat([inputs["input_ids"] for inputs in steps], 1)
    mask = steps[-1]["attention_mask"]
    past = {
        name: value.to(cached.example_inputs[name].dtype)
        for name, value in steps[0].items()
        if name.startswith(PAST_INPUTS)
    }
    parts: list[torch.Tensor] = []
    columns: list[int] = []
    length = 0
    for inputs in steps:
        logits, *state = cached.run(step_inputs(cached, inputs["input_ids"], inputs["attention_mask"], past))
        past = dict(zip(past, state, strict=True))
        parts.append(logits)
        length += inputs["input_ids"].shape[1]
        columns += range(length - logits.shape[1], length)
    expected = whole.run(whole.inputs_from_tokens(tokens, mask))[0][:, columns]
    seen = mask[:, columns].bool()
    return relative_difference(torch.cat(parts, 1)[seen], expected[seen])


def relative_difference(have: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, divided by the largest magnitude of ``want``."""
    return float((want - have).abs().max() / want.abs().max().clamp(min=1e-9))

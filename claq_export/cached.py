"""The graph with a key/value cache beside the one that was quantized: the same layers, matched by name, and checks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .capture import CapturedModel
from .errors import CaptureError, VerificationError
from .format.layer import QuantizedLinear
from .passes import (
    AdditiveMasks,
    FuseSiblings,
    LastLogits,
    PassContext,
    Pipeline,
    Plan,
    RemoveUnused,
    ReplaceLinears,
    decoder_pipeline,
)

_TEXTS = (
    "The committee will meet again on Thursday to discuss the budget.",
    "Rain fell all night.",
)
_DECODE_STEPS = 3
_AGREEMENT = 1e-3


def plan_with_cache(
    captured: CapturedModel, plan: Plan, planning: Pipeline, fuse: bool, last_logits: bool = False
) -> Plan:
    """Plan the graph with cache as the graph without was planned, sibling linears not stacked yet.

    Args:
        captured: the graph with cache, rewritten in place.
        plan: of the graph without cache, sibling linears stacked or not.
        planning: the passes that made that plan, but for the stacking.
        fuse: put one operator in the place of many (attention, rotary positions, normalization).
        last_logits: let it return the logits of the last new token alone.

    Raises:
        CaptureError: the two graphs do not have the same layers, or what makes the logits cannot be given one token.
    """
    context = PassContext(task="text-generation", aliases=captured.aliases)
    Pipeline([AdditiveMasks()]).run(captured.graph_module, context)
    planning.run(captured.graph_module, context)
    assert context.plan is not None
    _check_same(_parts_of(plan), _parts_of(context.plan))
    if last_logits:
        (record,) = Pipeline([LastLogits()]).run(captured.graph_module, context)
        if not record.modified:
            raise CaptureError(
                f"the last token's logits cannot be had alone: {record.notes[0]}; leave --last-logits out"
            )
    if fuse:
        decoder_pipeline().run(captured.graph_module, context)
    return context.plan


def lower_with_cache(
    captured: CapturedModel, plan: Plan, layers: Mapping[str, QuantizedLinear], accuracy_level: int
) -> None:
    """Put quantized layers, single or stacked, into the graph with cache, whose own plan is ``plan``.

    Raises:
        CaptureError: the linears that are stacked are not those of the graph without cache.
    """
    context = PassContext(task="text-generation", aliases=captured.aliases, plan=plan)
    if layers.keys() != {site.name for site in plan.sites}:
        Pipeline([FuseSiblings(weights=False)]).run(captured.graph_module, context)
    sizes = {site.name: site.out_features for site in plan.sites}
    _check_same({name: layer.out_features for name, layer in layers.items()}, sizes)
    Pipeline([ReplaceLinears(layers, accuracy_level), RemoveUnused()]).run(captured.graph_module, context)


def _parts_of(plan: Plan) -> dict[str, int]:
    return {name: rows for site in plan.sites for name, rows in site.parts}


def _check_same(wanted: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Layer names and rows of the graphs without and with cache."""
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        raise CaptureError(
            f"the graphs with and without cache differ in layer {different[0]!r} ({len(different)} in all); "
            "the model can be exported without cache (--no-cache)"
        )


def decoding_inputs(captured: CapturedModel) -> list[dict[str, torch.Tensor]]:
    """Inputs of a prefill, of a batch padded on the left where there is a tokenizer, and of a few greedy steps after it.

    Args:
        captured: the graph with cache; its own keys and values are those of the next step.
    """
    if captured.tokenizer is not None:
        rows = [captured.tokenizer(text)["input_ids"] for text in _TEXTS]
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
        if name.startswith("past_key_values")
    }
    steps = []
    for _ in range(1 + _DECODE_STEPS):
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
    """Compare generation with the cache with the graph that sees all tokens at once, both quantized.

    Args:
        whole: the graph without cache.
        cached: the graph with cache.
        steps: from :func:`decoding_inputs`; their tokens and masks are used.

    Returns:
        the largest difference of logits, divided by their largest magnitude.

    Raises:
        VerificationError: it is more than rounding explains.
    """
    tokens = torch.cat([inputs["input_ids"] for inputs in steps], 1)
    mask = steps[-1]["attention_mask"]
    past = {name: value for name, value in steps[0].items() if name.startswith("past_key_values")}
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
    want, have = expected[seen], torch.cat(parts, 1)[seen]
    error = float((want - have).abs().max() / want.abs().max().clamp(min=1e-9))
    if not error <= _AGREEMENT:
        raise VerificationError(
            f"the graph with cache deviates from the one without by {error:.3g} of the largest logit; "
            f"at most {_AGREEMENT:g} is expected"
        )
    return error

"""Graph passes: they find a captured graph's linears, choose which to quantize, and put the quantized ones in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..format.layer import QuantizedLinear
from .additive_masks import AdditiveMasks
from .base import ContractError, Pass, PassContext, PassResult
from .canonicalize_linears import CanonicalizeLinears
from .count_cached_tokens import CountCachedTokens, takes_buffers
from .fuse_attention import FuseAttention
from .fuse_epilogues import FuseEpilogues
from .fuse_gelu import FuseGelu
from .fuse_rms_norm import FuseRmsNorm
from .fuse_rotary import FuseRotary
from .fuse_siblings import FuseSiblings
from .fuse_uncached_attention import FuseUncachedAttention
from .last_logits import LastLogits
from .narrow_cache import NarrowCache
from .pipeline import PassRecord, Pipeline
from .plan import LinearSite, Plan, PlanRow, Skipped
from .remove_noops import RemoveNoops
from .remove_unused import RemoveUnused
from .replace_linears import ReplaceLinears
from .select_linears import SelectLinears, four_bit_bytes

__all__ = [
    "AdditiveMasks",
    "CanonicalizeLinears",
    "ContractError",
    "CountCachedTokens",
    "FuseAttention",
    "FuseEpilogues",
    "FuseGelu",
    "FuseRmsNorm",
    "FuseRotary",
    "FuseSiblings",
    "FuseUncachedAttention",
    "LastLogits",
    "LinearSite",
    "NarrowCache",
    "Pass",
    "PassContext",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "Plan",
    "PlanRow",
    "RemoveNoops",
    "RemoveUnused",
    "ReplaceLinears",
    "SelectLinears",
    "Skipped",
    "decoder_pipeline",
    "fusing_pipeline",
    "lowering_pipeline",
    "planning_pipeline",
    "takes_buffers",
]


def decoder_pipeline() -> Pipeline:
    """The passes that put one operator in the place of many in a decoder with a cache."""
    return Pipeline([FuseRmsNorm(), FuseRotary(), FuseAttention(), CountCachedTokens(), RemoveUnused()])


def lowering_pipeline(layers: Mapping[str, QuantizedLinear], accuracy_level: int, for_file: bool = True) -> Pipeline:
    """The passes that put quantized layers into a graph.

    Args:
        layers: quantized layers by name.
        accuracy_level: of all.
        for_file: the graph goes into a file, so its masks become numbers to add.
    """
    masks: list[Pass] = [AdditiveMasks()] if for_file else []
    return Pipeline([ReplaceLinears(layers, accuracy_level), *masks, RemoveUnused()])


def fusing_pipeline() -> Pipeline:
    """The passes after :func:`lowering_pipeline` that let operators of a file's graph do what is around them."""
    return Pipeline([FuseEpilogues(), FuseUncachedAttention(), RemoveUnused()])


def planning_pipeline(
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    predicted_bytes: Callable[[int, int], int] = four_bit_bytes,
    fuse_siblings: bool = True,
    embeddings: bool = True,
    heads: bool = True,
    weight_bytes: int | None = None,
    dump_dir: Path | None = None,
) -> Pipeline:
    """The passes from a captured graph to a plan in the context; arguments as :class:`SelectLinears`'s."""
    passes: list[Pass] = [
        RemoveNoops(),
        FuseGelu(),
        CanonicalizeLinears(),
        RemoveUnused(),
        SelectLinears(include, exclude, predicted_bytes, embeddings=embeddings, heads=heads, weight_bytes=weight_bytes),
    ]
    if fuse_siblings:
        passes.append(FuseSiblings())
    return Pipeline(passes, dump_dir)

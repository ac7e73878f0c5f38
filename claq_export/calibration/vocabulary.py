"""How often calibration data use each row of a vocabulary, and which rows are stored exactly for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..algorithm.exact_rows import most_frequent
from ..algorithm.settings import LayerSettings
from ..passes import LinearSite
from .data import Batch
from .padding import real_rows, real_tokens


def token_frequency(
    graph_module: fx.GraphModule, sites: Sequence[LinearSite], batches: Sequence[Batch]
) -> dict[int, torch.Tensor]:
    """How often each row of a vocabulary is looked up in the calibration data, by the size of the vocabulary.

    Only tables whose indices are an input of the model count (not positions), and no padding. A head that is not tied has the
    vocabulary of the embedding, so the size is key enough.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    found: dict[int, torch.Tensor] = {}
    for site in sites:
        for node in site.lookups:
            source = node.args[1]
            if source not in placeholders or not batches:
                continue
            name = list(batches[0])[placeholders.index(source)]
            counts = found.setdefault(site.out_features, torch.zeros(site.out_features, dtype=torch.int64))
            for batch in batches:
                indices, real = batch[name].flatten(), real_rows((*batch[name].shape, 1), real_tokens(batch))
                looked_up = indices if real is None else indices[real]
                counted = torch.bincount(looked_up.remainder(site.out_features), minlength=site.out_features)
                counts += counted.cpu()  # what a compiled model was called with may lie on its GPU
    return found


def exact_rows(
    sites: Sequence[LinearSite], frequency: Mapping[int, torch.Tensor], settings: Mapping[str, LayerSettings]
) -> dict[str, torch.Tensor]:
    """Row numbers that will be stored exactly, by the name of the site; only sites that have some.

    Args:
        sites: what is to be quantized.
        frequency: of each row by size of the vocabulary (:func:`token_frequency`).
        settings: of tables and heads by name.
    """
    found = {}
    for site in sites:
        share = settings[site.name].exact_rows if site.name in settings else 0.0
        if share and site.out_features in frequency:
            found[site.name] = most_frequent(frequency[site.out_features], share)
    return found

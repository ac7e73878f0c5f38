"""Every family: captured, its linears found, quantized; graph and some files agree with the module on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, Family, capture, samples

from claq_export import Config
from claq_export.calibration.progress import ProgressReporter
from claq_export.compiler import Compilation
from claq_export.modules import replace_linears
from claq_export.verify import verify_artifact

MAJOR = int(transformers.__version__.split(".")[0])
SETTINGS = Config(bits=4, calibration="none", accuracy="fp32")
# What differs in operators: sliding windows, relative positions and cross-attention, convolutions and two towers.
EMITTED = ("Gemma 3", "T5", "CLIP")


def families() -> list:
    return [
        pytest.param(
            family,
            id=family.name,
            marks=pytest.mark.skipif(
                family.transformers > MAJOR, reason=f"is captured since transformers {family.transformers}"
            ),
        )
        for family in FAMILIES
    ]


@pytest.mark.parametrize("family", families())
def test_linears_are_found_and_quantized(family: Family, tmp_path: Path) -> None:
    captured, module = capture(family)
    compilation = Compilation(captured, SETTINGS, ProgressReporter(quiet=True))
    inputs = samples(family, captured)
    with torch.no_grad():
        for one in inputs:
            expected = module(*one.values()) if family.task else module(**one)
            found = captured.run(one)
            for a, b in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    found_names = linear_names(compilation)
    assert len(found_names) == family.linears, found_names
    if family.endings:
        assert {name.rpartition(".")[2] for name in found_names} <= family.endings

    compilation.quantize()
    layers = {name: done.layer for name, done in compilation.sites.items()}
    inner = module.model if family.task else module
    replace_linears(
        inner,
        layers,
        parts={name: done.site.parts for name, done in compilation.sites.items()},
        transposed=compilation.transposed,
    )
    with torch.no_grad():
        for one in inputs:
            expected = module(*one.values()) if family.task else module(**one)
            for a, b in zip(captured.run(one), expected if isinstance(expected, tuple) else [expected], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if family.name in EMITTED:
        compilation.emit(tmp_path / "model.onnx")
        verify_artifact(tmp_path / "model.onnx", captured.graph_module, inputs, rounds=0)  # raises where they disagree


def linear_names(compilation: Compilation) -> list[str]:
    """The linears that are planned, or left alone for their size or because they are a classifier's head."""
    planned = [name for site in compilation.plan.sites if site.out_features for name, _ in site.parts]
    small = [entry.name for entry in compilation.plan.skipped if entry.reason.startswith(("too small", "classifier"))]
    return [name for name in (*planned, *small) if not is_table(name)]


def is_table(name: str) -> bool:
    """Whether a name is that of an embedding, which is planned too."""
    last = name.rpartition(".")[2]
    return ("embed" in last and last != "embed_out") or last in ("wte", "wpe", "shared", "relative_attention_bias")

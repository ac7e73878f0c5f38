"""The table about a finished export shows names and paths as they are."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from claq_export.api import ExportResult, LayerSummary
from claq_export.config import Config
from claq_export.emit.artifact import Artifact
from claq_export.passes import Skipped
from claq_export.sizing import PlannedLayer
from claq_export.summary import print_plan, print_result, print_tip


def test_brackets_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    path = Path("o/x[/b]/y[draft]/model.onnx")
    artifact = Artifact(path, (path, path.with_suffix(".data"), path.with_name("second[b].onnx")), 10, (), (), ())
    layer = LayerSummary("experts[0][/b]", 4, 4, 3.0, 3.0, 6, 0.1, 1.0, "head")
    print_result(console, ExportResult(artifact, (layer,), (), 3.0, 3.0, 64, 10, {}, {}, {}))
    planned = PlannedLayer("experts[1][/b]", (), 4, 4, (4, 0, 0), 64, 6, 3.0, 3.0)
    print_plan(console, [planned], [Skipped("norm[/b]", "is [bold]", (4,), 16)])
    printed = console.file.getvalue()
    for text in (f"{path}, second[b].onnx", "experts[0][/b]", "experts[1][/b]", "norm[/b]", "is [bold]"):
        assert text in printed


@pytest.mark.parametrize(
    ("settings", "tip"),
    [
        ({"bits": 3}, "--bits 3.83 "),
        ({"bits": 2}, "--bits 3.83 "),
        ({"bits": 4}, None),
        ({"bits": 3.2}, None),
        ({"size": 10**7, "bits": 3}, None),
        ({"bits": 3, "guided": False}, None),
        ({"bits": 3, "importance": False}, None),
        ({"bits": 3, "calibration": "none"}, None),
        ({"bits": 3, "outliers": 0.01}, None),
        ({"preset": "claq-3"}, None),
    ],
)
def test_a_budget_of_the_same_size_is_offered_where_it_is_better(settings: dict[str, Any], tip: str | None) -> None:
    console = Console(file=io.StringIO(), width=200)
    path = Path("model.onnx")
    artifact = Artifact(path, (path,), 10, (), (), ())
    layer = LayerSummary("linear", 4, 4, 3.8399, 3.0, 6, 0.1, 1.0, "")
    print_tip(console, Config(**settings), ExportResult(artifact, (layer,), (), 3.8399, 3.0, 64, 10, {}, {}, {}))
    printed = console.file.getvalue()
    assert (tip in printed) if tip else not printed

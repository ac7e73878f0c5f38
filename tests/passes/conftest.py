"""Helpers of the pass tests: capture and plan in one step, and a round-to-nearest layer in the format."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from claq_export.capture import CapturedModel, capture_module
from claq_export.format.layer import QuantizedLinear, assemble
from claq_export.passes import CanonicalizeLinears, PassContext, Pipeline, Plan, RemoveNoops, planning_pipeline


@dataclass
class Planned:
    """A captured module after the planning passes."""

    captured: CapturedModel
    context: PassContext

    @property
    def graph_module(self) -> fx.GraphModule:
        return self.captured.graph_module

    @property
    def plan(self) -> Plan:
        assert self.context.plan is not None
        return self.context.plan

    @property
    def skipped(self) -> dict[str, str]:
        return {entry.name: entry.reason for entry in self.plan.skipped}


class Helpers:
    """What the tests of passes share."""

    @staticmethod
    def canonical(model: nn.Module, *inputs: torch.Tensor) -> tuple[CapturedModel, PassContext, list[str]]:
        captured = capture_module(model, tuple(inputs))
        context = PassContext()
        records = Pipeline([RemoveNoops(), CanonicalizeLinears()]).run(captured.graph_module, context)
        return captured, context, list(records[-1].notes)

    @staticmethod
    def plan(model: nn.Module, *inputs: torch.Tensor, task: str | None = None, **options: object) -> Planned:
        captured = capture_module(model, tuple(inputs) or None)
        context = PassContext(task=task or captured.task, aliases=captured.aliases)
        planning_pipeline(**options).run(captured.graph_module, context)
        return Planned(captured, context)

    @staticmethod
    def linears(gm: fx.GraphModule) -> list[fx.Node]:
        return [node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default]

    @staticmethod
    def quantize(weight: torch.Tensor) -> QuantizedLinear:
        """Round to nearest at 4 bits with a scale a column: any layer will do to test where layers go."""
        out_features, in_features = weight.shape
        weight = weight.detach().float()
        scale = (weight.abs().amax(0) / 7).clamp(min=1e-6).half()
        codes = ((weight / scale.float()).round().clamp(-8, 7) + 8).t().to(torch.uint8).contiguous()
        centroids = (torch.arange(16) - 8).to(torch.int8).repeat(in_features, 1)
        return assemble(codes, centroids, scale, torch.ones(out_features).half(), torch.full((in_features,), 4))

    @staticmethod
    def same(captured: CapturedModel, model: nn.Module, *sizes: tuple[int, ...], atol: float = 1e-5) -> None:
        """The graph gives the numbers of the module for inputs of these shapes (one input)."""
        (name,) = captured.input_names
        for size in sizes:
            x = torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))
            with torch.no_grad():
                expected = model.eval()(x)
            torch.testing.assert_close(captured.run({name: x})[0], expected, rtol=1e-5, atol=atol)


@pytest.fixture
def helpers() -> type[Helpers]:
    torch.manual_seed(0)
    return Helpers

"""The node-major walk gives every linear the inputs that running the model would give it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from claq_export.algorithm import Hessian
from claq_export.calibration.walk import JointWalk, NodeWalk
from claq_export.capture import capture_module
from claq_export.errors import CalibrationError
from claq_export.passes import PassContext, planning_pipeline


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 64)
        self.second = nn.Linear(64, 48, bias=False)
        self.unrelated = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.first(x + shift.cumsum(-1)))
        return self.second(hidden), self.unrelated(x)


def planned(model: nn.Module, *example: torch.Tensor, **options: object):
    captured = capture_module(model, example)
    context = PassContext()
    planning_pipeline(fuse_siblings=False).run(captured.graph_module, context)
    return captured.graph_module, {site.name: site for site in context.plan.sites}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_inputs_are_those_of_the_model_with_new_weights_upstream(model: Model) -> None:
    batches = [{"x": torch.randn(2, 5, 48), "shift": torch.randn(48)} for _ in range(3)]
    gm, sites = planned(model, *batches[0].values())
    replacement = torch.randn(64, 48)
    seen: dict[str, list[torch.Tensor]] = {}

    def visit(node, inputs):
        name = next(site.name for site in sites.values() if node in site.nodes)
        seen[name] = list(inputs)
        return replacement if name == "first" else None

    targets = [sites[name].node for name in ("first", "second")]
    NodeWalk(gm, batches, targets).run(visit)
    assert set(seen) == {"first", "second"}
    for i, batch in enumerate(batches):
        x = batch["x"] + batch["shift"].cumsum(-1)
        torch.testing.assert_close(seen["first"][i], x)
        torch.testing.assert_close(seen["second"][i], torch.relu(x @ replacement.T + model.first.bias))


def test_shared_inputs_run_once(model: Model) -> None:
    shared = torch.randn(48)
    batches = [{"x": torch.randn(2, 5, 48), "shift": shared} for _ in range(4)]
    gm, sites = planned(model, *batches[0].values())
    calls = 0
    target = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.cumsum.default)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return torch.ops.aten.cumsum.default(*args, **kwargs)

    target.target = counted
    NodeWalk(gm, batches, [sites["second"].node]).run(lambda node, inputs: None)
    assert calls == 1


def test_nothing_past_the_last_linear_is_computed(model: Model) -> None:
    batches = [{"x": torch.randn(2, 5, 48), "shift": torch.randn(48)}]
    gm, sites = planned(model, *batches[0].values())
    walk = NodeWalk(gm, batches, [sites["first"].node])
    assert sites["second"].node not in walk._nodes
    assert all(node.target is not torch.ops.aten.relu.default for node in walk._nodes)


def test_in_place_operators_do_not_leak_between_batches() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            y = table * 1.0
            y.add_(x)
            return self.linear(y)

    table = torch.randn(48)
    batches = [{"x": torch.randn(3, 48)[0], "table": table} for _ in range(3)]
    gm, sites = planned(InPlace().eval(), *batches[0].values())
    seen: list[torch.Tensor] = []
    NodeWalk(gm, batches, [sites["linear"].node]).run(lambda node, inputs: seen.extend(inputs))
    for batch, got in zip(batches, seen, strict=True):
        torch.testing.assert_close(got, table + batch["x"])


@pytest.mark.parametrize("grad", [True, False])
def test_writes_through_views_are_followed(grad: bool) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(48, 64)
            self.second = nn.Linear(128, 48)
            self.register_buffer("table", torch.zeros(128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                out = self.table.expand(len(x), 128).clone()
                out[:, :64] = 1.0
                out[:, 64:] = self.first(x)
                out.t()[0].mul_(x[:, 0])
                before = out * 1.0
                out.clamp_(min=0)
            return self.second(out) + before[:, :48]

    model = Joined().eval()
    batches = [{"x": torch.randn(3, 48)} for _ in range(3)]
    gm, sites = planned(model, batches[0]["x"])
    wanted: list[torch.Tensor] = []
    hook = model.second.register_forward_pre_hook(lambda module, args: wanted.append(args[0].detach().clone()))
    for batch in batches:
        model(**batch)
    hook.remove()
    seen: dict[str, list[torch.Tensor]] = {}

    def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> None:
        seen[next(name for name, site in sites.items() if node in site.nodes)] = list(inputs)

    NodeWalk(gm, batches, [site.node for site in sites.values()]).run(visit)
    assert list(seen) == ["first", "second"]
    hessians = [Hessian(128, token_clip=None) for _ in range(2)]
    for hessian, inputs in zip(hessians, (seen["second"], wanted), strict=True):
        for x in inputs:
            hessian.add(x)
    torch.testing.assert_close(hessians[0].matrix, hessians[1].matrix)


def test_wrong_batches_are_refused(model: Model) -> None:
    gm, sites = planned(model, torch.randn(2, 5, 48), torch.randn(48))
    with pytest.raises(CalibrationError, match="takes 2 inputs"):
        NodeWalk(gm, [{"x": torch.randn(2, 5, 48)}], [sites["first"].node])
    walk = NodeWalk(gm, [{"x": torch.randn(2, 5, 47), "shift": torch.randn(48)}], [sites["first"].node])
    with pytest.raises(CalibrationError, match="calibration batch 0"):
        walk.run(lambda node, inputs: None)


def test_values_are_freed_after_their_last_use(tiny_bert: Path) -> None:
    from claq_export.api import capture

    captured, _ = capture(tiny_bert)
    context = PassContext()
    planning_pipeline().run(captured.graph_module, context)
    nodes = [node for site in context.plan.sites for node in site.nodes]
    walk = NodeWalk(captured.graph_module, [captured.example_inputs], nodes)
    freed = [value for values in walk._last_use.values() for value in values]
    assert sorted(node.name for node in freed) == sorted(node.name for node in walk._nodes)


@pytest.mark.parametrize("joint", [False, True])
def test_a_dense_weight_is_freed_before_the_next_layer_is_visited(joint: bool) -> None:
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4))).eval()
    batches = [{"input": torch.randn(2, 48)} for _ in range(2)]
    gm, sites = planned(model, batches[0]["input"])
    given: list[weakref.ref[torch.Tensor]] = []

    def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        assert [dense() for dense in given] == [None] * len(given)
        dense = torch.randn(48, 48)
        given.append(weakref.ref(dense))
        return dense

    walk = NodeWalk(gm, batches, [site.node for site in sites.values()])
    (JointWalk([walk], {}) if joint else walk).run(visit)
    assert len(given) == 4


class TestJointWalk:
    def walks(self) -> tuple[list[NodeWalk], dict[fx.Node, fx.Node], list[fx.Node]]:
        walks, same, first = [], {}, []
        for rows in (3, 1):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
            captured = capture_module(model.eval(), (torch.randn(2, 8),))
            nodes = [node for node in captured.graph_module.graph.nodes if node.target is torch.ops.aten.linear.default]
            batches = [{captured.input_names[0]: torch.full((rows, 8), float(i))} for i in range(2)]
            walks.append(NodeWalk(captured.graph_module, batches, nodes))
            first = first or nodes
            same |= dict(zip(nodes, first, strict=True))
        return walks, same, first

    def test_a_layer_sees_the_inputs_of_all_graphs_behind_the_new_weights(self) -> None:
        walks, same, (first, second) = self.walks()
        seen: list[tuple[fx.Node, list[torch.Tensor]]] = []

        def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
            seen.append((node, list(inputs)))
            return torch.zeros(16, 8) if node is first else None

        JointWalk(walks, same).run(visit)
        assert [node for node, _ in seen] == [first, second]
        assert [x.shape[0] for x in seen[0][1]] == [3, 3, 1, 1]
        # With zeros as the first weight only its bias is left, the same for every row of every graph.
        rows = torch.cat(seen[1][1])
        assert torch.equal(rows, rows[:1].expand_as(rows))

    def test_graphs_with_layers_in_another_order_do_not_wait_for_one_another(self) -> None:
        walks, same, (first, second) = self.walks()
        crossed = {
            node: second if target is first else first for node, target in same.items() if node not in (first, second)
        }
        visits: list[tuple[fx.Node, int]] = []
        JointWalk(walks, crossed).run(lambda node, inputs: visits.append((node, len(inputs))))
        assert sum(count for _, count in visits) == 8
        assert {node for node, _ in visits} == {first, second}


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_an_index_outside_a_table_is_named(quantized: bool) -> None:
    model = nn.Sequential(nn.Embedding(8, 48), nn.Linear(48, 48)).eval()
    gm, sites = planned(model, torch.tensor([[1, 2], [3, 4]]))
    lookup = next(node for node in gm.graph.nodes if "embedding" in str(node.target))
    rows = {lookup: lambda indices: model[0].weight[indices]} if quantized else {}
    walk = NodeWalk(gm, [{"input": torch.tensor([[1, 9]])}], [sites["1"].node], rows)
    with pytest.raises(CalibrationError, match=f"operator {lookup.name} fails on calibration batch 0: .*index"):
        walk.run(lambda node, inputs: None)

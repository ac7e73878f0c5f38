"""Linears that read one value become one stacked linear and a split."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from claq_export.passes import ContractError, FuseSiblings, PassContext
from claq_export.passes.fuse_siblings import stacked_name

D = 64


class Attention(nn.Module):
    def __init__(self, bias=(True, False, True)) -> None:
        super().__init__()
        self.q = nn.Linear(D, D, bias=bias[0])
        self.k = nn.Linear(D, D // 2, bias=bias[1])
        self.v = nn.Linear(D, D, bias=bias[2])
        self.out = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(torch.relu(v * q) + torch.cat([k, k], -1))


def test_stacked_site(helpers):
    model = Attention()
    planned = helpers.plan(model, torch.randn(2, 5, D))
    stacked, out = planned.plan
    assert out.name == "out"
    assert stacked.name == "q+k+v"
    assert stacked.parts == [("q", D), ("k", D // 2), ("v", D)]
    assert (stacked.out_features, stacked.in_features) == (2 * D + D // 2, D)
    gm = planned.graph_module
    assert torch.equal(stacked.weight(gm), torch.cat([model.q.weight, model.k.weight, model.v.weight]))
    assert torch.equal(stacked.bias(gm), torch.cat([model.q.bias, torch.zeros(D // 2), model.v.bias]))
    assert len(helpers.linears(gm)) == 2
    assert set(gm.state_dict()) == {"q+k+v.weight", "q+k+v.bias", "out.weight", "out.bias"}
    row = planned.plan.rows()[0]
    assert row.parts == ("q", "k", "v")
    assert row.predicted_bytes == planned.plan.predict(stacked.out_features, D)
    helpers.same(planned.captured, model, (1, 1, D), (3, 7, D))


def test_no_bias_at_all(helpers):
    model = Attention((False, False, False))
    planned = helpers.plan(model, torch.randn(2, 5, D))
    assert planned.plan.sites[0].bias_target is None
    helpers.same(planned.captured, model, (2, 3, D))


def test_switched_off(helpers):
    model = Attention()
    planned = helpers.plan(model, torch.randn(2, 5, D), fuse_siblings=False)
    assert [site.name for site in planned.plan] == ["q", "k", "v", "out"]
    assert planned.graph_module.q.weight is model.q.weight


def test_only_planned_sites_are_stacked(helpers):
    model = Attention()
    planned = helpers.plan(model, torch.randn(2, 5, D), exclude=["k"])
    assert [site.name for site in planned.plan] == ["q+v", "out"]
    assert planned.plan.sites[0].bias_target == "q+v.bias"
    assert torch.equal(planned.graph_module.k.weight, model.k.weight)
    helpers.same(planned.captured, model, (2, 3, D))


def test_one_reader_is_not_stacked(helpers):
    planned = helpers.plan(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)), torch.randn(2, D))
    assert [site.name for site in planned.plan] == ["0", "2"]
    assert not [node for node in planned.graph_module.graph.nodes if node.target is operator.getitem]


def test_shared_weight_is_not_stacked(helpers):
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = nn.Linear(D, D)

        def forward(self, x):
            return self.a(torch.relu(self.a(x) + self.b(x)))

    model = Shares()
    planned = helpers.plan(model, torch.randn(2, D))
    assert [site.name for site in planned.plan] == ["a", "b"]
    helpers.same(planned.captured, model, (3, D))


def test_shared_bias_is_kept_for_its_other_use(helpers):
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = nn.Linear(D, D)
            self.b.bias = self.a.bias

        def forward(self, x):
            return torch.relu(self.a(x)) + self.b(x) + self.a.bias.exp()

    model = Shares()
    planned = helpers.plan(model, torch.randn(2, D))
    assert [site.name for site in planned.plan] == ["a+b"]
    helpers.same(planned.captured, model, (3, D))


def test_stored_layouts_are_not_mixed(helpers):
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = nn.Parameter(torch.randn(D, D))
            self.c = nn.Parameter(torch.randn(D, D))

        def forward(self, x):
            return self.a(x) + torch.relu(x @ self.b) + torch.tanh(x @ self.c)

    model = Mixes()
    planned = helpers.plan(model, torch.randn(2, D))
    assert [(site.name, site.transposed) for site in planned.plan] == [("a", False), ("b+c", True)]
    assert set(planned.graph_module.state_dict()) == {"a.weight", "a.bias", "b+c.weight"}
    helpers.same(planned.captured, model, (3, D), atol=1e-4)


@pytest.mark.parametrize(
    ("names", "stacked"),
    [
        (["a.q", "a.k", "a.v"], "a.q+k+v"),
        (["layer.0.attn.q", "layer.0.mlp.up"], "layer.0.attn_q+mlp_up"),
        (["q", "k"], "q+k"),
    ],
)
def test_stacked_name(names, stacked):
    assert stacked_name(names) == stacked


def test_without_a_plan(helpers):
    planned = helpers.plan(Attention(), torch.randn(2, D))
    with pytest.raises(ContractError, match="pass fuse_siblings: there is no plan; select_linears goes first"):
        FuseSiblings()(planned.graph_module, PassContext())


def test_pieces_that_a_view_cannot_flatten(helpers):
    """As in Qwen3.5: writing in place makes capture turn ``reshape`` into a view, which a piece does not allow."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            written = torch.zeros_like(x)
            written[:, 0] = self.q(x)[:, 0]
            heads = self.k(x).reshape(*x.shape[:-1], 4, -1)
            return written + heads[:, :, 1:].reshape(-1, D // 4).sum() + heads.reshape(-1, D // 4).relu().sum()

    model = Flattened()
    planned = helpers.plan(model, torch.randn(2, 5, D))
    assert [site.name for site in planned.plan] == ["q+k"]
    helpers.same(planned.captured, model, (2, 5, D), (3, 7, D), atol=1e-3)

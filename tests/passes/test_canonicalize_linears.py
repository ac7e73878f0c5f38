"""Every spelling of a linear layer becomes aten.linear with an attribute as weight; what is left alone has a reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from claq_export.passes import CanonicalizeLinears, PassContext, RemoveNoops
from claq_export.passes.attributes import get_attribute
from claq_export.passes.canonicalize_linears import is_canonical, weight_origin

K, N = 12, 20


class Spelled(nn.Module):
    """``matrix`` is [N, K], ``flipped`` [K, N]."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(N, K))
        self.flipped = nn.Parameter(torch.randn(K, N))
        self.offset = nn.Parameter(torch.randn(N))
        self.spelling = spelling

    def forward(self, x):
        return self.spelling(self, x)


# name -> (spelling, parameter, stored as [K, N], bias)
SPELLINGS = {
    "linear": (lambda m, x: F.linear(x, m.matrix, m.offset), "matrix", False, True),
    "linear without bias": (lambda m, x: F.linear(x, m.matrix), "matrix", False, False),
    "linear by keywords": (lambda m, x: F.linear(input=x, weight=m.matrix, bias=m.offset), "matrix", False, True),
    "linear of a transpose": (lambda m, x: F.linear(x, m.flipped.t(), m.offset), "flipped", True, True),
    "x @ W": (lambda m, x: x @ m.flipped, "flipped", True, False),
    "x @ W.T": (lambda m, x: x @ m.matrix.T, "matrix", False, False),
    "x @ W.T + b": (lambda m, x: x @ m.matrix.T + m.offset, "matrix", False, True),
    "b + x @ W": (lambda m, x: m.offset + x @ m.flipped, "flipped", True, True),
    "matmul of mT": (lambda m, x: torch.matmul(x, m.matrix.mT), "matrix", False, False),
    "matmul of transpose(0, 1)": (lambda m, x: torch.matmul(x, m.matrix.transpose(0, 1)), "matrix", False, False),
    "matmul of transpose(-1, -2)": (lambda m, x: torch.matmul(x, m.matrix.transpose(-1, -2)), "matrix", False, False),
    "matmul of permute": (lambda m, x: torch.matmul(x, m.matrix.permute(1, 0)), "matrix", False, False),
    "matmul of a contiguous transpose": (lambda m, x: x @ m.matrix.t().contiguous(), "matrix", False, False),
    "matmul of a clone": (lambda m, x: x @ m.flipped.clone(), "flipped", True, False),
    "mm of flattened": (
        lambda m, x: torch.mm(x.reshape(-1, K), m.flipped).reshape(x.shape[0], x.shape[1], N),
        "flipped",
        True,
        False,
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.offset, x.view(-1, x.size(-1)), m.flipped).view(*x.shape[:-1], N),
        "flipped",
        True,
        True,
    ),
    "bmm": (lambda m, x: torch.bmm(x, m.flipped.unsqueeze(0).expand(x.shape[0], -1, -1)), "flipped", True, False),
    "matmul of expanded": (lambda m, x: x @ m.flipped.expand(x.shape[0], K, N), "flipped", True, False),
    "einsum bsk,nk->bsn": (lambda m, x: torch.einsum("bsk,nk->bsn", x, m.matrix), "matrix", False, False),
    "einsum ...k,kn->...n": (lambda m, x: torch.einsum("...k,kn->...n", x, m.flipped), "flipped", True, False),
    "einsum with the matrix first": (lambda m, x: torch.einsum("oi,bsi->bso", m.matrix, x), "matrix", False, False),
    "in-place sum": (lambda m, x: F.linear(x, m.matrix).add_(m.offset), "matrix", False, True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_becomes_a_linear(helpers, name):
    spelling, parameter, transposed, bias = SPELLINGS[name]
    model = Spelled(spelling)
    captured, context, _ = helpers.canonical(model, torch.randn(2, 5, K))
    (node,) = helpers.linears(captured.graph_module)
    assert is_canonical(node)
    assert weight_origin(node) == (parameter, transposed)
    weight = get_attribute(captured.graph_module, node.args[1].target)
    assert weight.shape == (N, K)
    assert weight.data_ptr() == getattr(model, parameter).data_ptr()
    assert (node.args[2] is not None) == bias
    assert context.reasons == {}
    helpers.same(captured, model, (1, 1, K), (2, 5, K), (4, 3, K))


def test_views_around_addmm_go(helpers):
    captured, _, _ = helpers.canonical(Spelled(SPELLINGS["addmm"][0]), torch.randn(2, 5, K))
    (node,) = helpers.linears(captured.graph_module)
    assert not [other for other in captured.graph_module.graph.nodes if "view" in str(other.target)]
    assert node.args[0].op == "placeholder"


def test_view_that_regroups_stays(helpers):
    """The product's rows are regrouped after it, so the views do not only flatten."""
    model = Spelled(lambda m, x: torch.addmm(m.offset, x.view(-1, K), m.flipped).view(x.shape[1], x.shape[0], N))
    captured, _, _ = helpers.canonical(model, torch.randn(2, 5, K))
    assert helpers.linears(captured.graph_module)[0].args[0].op == "call_function"
    helpers.same(captured, model, (2, 5, K), (4, 3, K))


def test_conv1d_of_transformers(helpers):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = Conv1D(N, K)
            self.c_proj = Conv1D(K, N)

        def forward(self, x):
            return self.c_proj(F.gelu(self.c_fc(x)))

    model = Block()
    captured, _, notes = helpers.canonical(model, torch.randn(2, 5, K))
    nodes = helpers.linears(captured.graph_module)
    assert [weight_origin(node) for node in nodes] == [("c_fc.weight", True), ("c_proj.weight", True)]
    assert any("c_fc.weight" in note and "addmm" in note for note in notes)
    helpers.same(captured, model, (1, 1, K), (3, 7, K))


def test_one_view_serves_all_uses_of_a_transposed_weight(helpers):
    model = Spelled(lambda m, x: x @ m.flipped + torch.relu(x) @ m.flipped)
    captured, _, _ = helpers.canonical(model, torch.randn(2, 5, K))
    first, second = helpers.linears(captured.graph_module)
    assert first.args[1] is second.args[1]


def test_sum_that_is_no_bias_stays(helpers):
    for spelling in (
        lambda m, x: (y := x @ m.flipped) + m.offset + y.relu(),  # the product has another use
        lambda m, x: torch.add(x @ m.flipped, m.offset, alpha=2),
        lambda m, x: x @ m.flipped + m.offset[:1],
        lambda m, x: x @ m.flipped + x.sum(),
    ):
        model = Spelled(spelling)
        captured, _, _ = helpers.canonical(model, torch.randn(2, 5, K))
        (node,) = helpers.linears(captured.graph_module)
        assert node.args[2] is None
        helpers.same(captured, model, (2, 5, K), (1, 3, K))


# name -> (spelling, reason)
LEFT = {
    "constant on the left": (lambda m, x: m.matrix @ x.transpose(1, 2), r"matrix is the left operand"),
    "computed weight": (lambda m, x: F.linear(x, m.matrix * 2), r"the weight is computed in the graph \(by aten.mul"),
    "part of a weight": (lambda m, x: F.linear(x, m.matrix[:4]), r"not matrix as a whole but a part"),
    "reshaped weight": (lambda m, x: x @ m.matrix.view(K, N), r"not matrix as a whole but a part or a reshape"),
    "vector": (lambda m, x: x @ m.offset[:K], r"offset has 1 dimensions, not 2"),
    "bias from the input": (lambda m, x: F.linear(x, m.matrix, x.sum().expand(N)), r"the bias is not a plain constant"),
    "scaled addmm": (
        lambda m, x: torch.addmm(m.offset, x.reshape(-1, K), m.flipped, beta=2.0),
        r"alpha or beta is not 1",
    ),
    "einsum over another axis": (
        lambda m, x: torch.einsum("bks,nk->bns", x.transpose(1, 2), m.matrix),
        r"is not a product over the last axis",
    ),
    "einsum of the diagonal": (lambda m, x: torch.einsum("bsk,kk->bsk", x, m.matrix[:K]), r"part|both axes"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_match_says_why(helpers, name):
    spelling, reason = LEFT[name]
    model = Spelled(spelling)
    captured, context, notes = helpers.canonical(model, torch.randn(2, 5, K))
    (found,) = context.reasons.values()
    assert re.search(reason, found), found
    assert any("left: " + found in note for note in notes)
    helpers.same(captured, model, (2, 5, K), (1, 3, K))


def test_products_of_two_values_have_no_reason(helpers):
    model = Spelled(lambda m, x: x @ x.transpose(1, 2))
    _, context, _ = helpers.canonical(model, torch.randn(2, 5, K))
    assert context.reasons == {}


def test_broadcast_product_stays(helpers):
    """[S, K] @ [B, K, N] has an axis that x has not."""

    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flipped = nn.Parameter(torch.randn(K, N))

        def forward(self, x):
            return torch.matmul(x[0], self.flipped.expand(x.shape[0], K, N))

    model = Broadcast()
    captured, context, _ = helpers.canonical(model, torch.randn(2, 5, K))
    assert helpers.linears(captured.graph_module) == []
    assert "broadcasts" in next(iter(context.reasons.values()))
    helpers.same(captured, model, (3, 4, K))


def test_dropout_and_casts_go(helpers):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(K, N)
            self.drop = nn.Dropout(0.3)

        def forward(self, x):
            return self.proj(self.drop(x).to(torch.float32)[:, :, :].detach())

    model = Noisy()
    captured, _, _ = helpers.canonical(model, torch.randn(2, 5, K))
    (node,) = helpers.linears(captured.graph_module)
    assert node.args[0].op == "placeholder"
    helpers.same(captured, model, (2, 5, K))


def test_cast_to_another_dtype_stays(helpers):
    class Casts(nn.Module):
        def forward(self, x):
            return x.to(torch.float16).to(torch.float32)

    captured, _, _ = helpers.canonical(Casts(), torch.randn(2, 5))
    x = torch.randn(2, 5)
    assert torch.equal(captured.run({"x": x})[0], x.half().float())


def test_second_run_changes_nothing(helpers):
    captured, _, _ = helpers.canonical(Spelled(SPELLINGS["addmm"][0]), torch.randn(2, 5, K))
    for step in (RemoveNoops(), CanonicalizeLinears()):
        assert not step(captured.graph_module, PassContext()).modified

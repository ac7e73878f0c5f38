"""The plan: names, sharing, tables and heads, patterns, default skips, and a reason for every weight left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from claq_export.errors import ConfigError
from claq_export.passes import PassContext, SelectLinears
from claq_export.passes.select_linears import four_bit_bytes

D = 64


class Encoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.kind = nn.Embedding(14, D)
        self.bag = nn.EmbeddingBag(50, D)
        self.layer = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(D, 2 * D), "down": Conv1D(D, 2 * D)}) for _ in range(layers)
        )
        self.small = nn.Linear(D, 2)
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(D, D))

    def forward(self, ids):
        x = self.embed(ids) + self.kind(ids.clamp(max=13)) + self.bag(ids)[:, None]
        for layer in self.layer:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) * self.scale[0]
        return self.small(x).tanh().exp()


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 6))


def test_names_shapes_and_reasons(helpers, tokens):
    model = Encoder()
    planned = helpers.plan(model, tokens)
    assert [site.name for site in planned.plan] == ["embed", "layer.0.up", "layer.0.down", "layer.1.up", "layer.1.down"]
    embed, up, down = planned.plan.sites[:3]
    assert (embed.role, embed.out_features, embed.in_features, embed.bias_target) == ("embedding", 50, D, None)
    assert (len(embed.nodes), len(embed.lookups), embed.inputs) == (0, 1, [])
    assert torch.equal(embed.weight(planned.graph_module), model.embed.weight)
    assert up.role == "linear"
    assert (up.out_features, up.in_features, up.transposed, up.bias_target) == (2 * D, D, False, "layer.0.up.bias")
    assert (down.out_features, down.in_features, down.transposed) == (D, 2 * D, True)
    assert down.weight_name == "layer.0.down.weight"
    assert up.parts == [("layer.0.up", 2 * D)]
    assert up.dense_bytes == 2 * D * D * 4
    assert torch.equal(up.weight(planned.graph_module), model.layer[0]["up"].weight)
    assert torch.equal(down.weight(planned.graph_module), model.layer[0]["down"].weight.T)
    assert torch.equal(down.bias(planned.graph_module), model.layer[0]["down"].bias)
    assert up.inputs[0].name in planned.graph_module.code
    assert planned.skipped == {
        "small": f"too small to gain: {four_bit_bytes(2, D)} bytes quantized against {2 * D * 4}",
        "kind": "small table, 1.6 % of the model (name it in include to quantize it)",
        "bag": "embedding table read by aten.embedding_bag.padding_idx, of which no rows can be taken one by one",
        "conv": "convolution",
        "scale": "not used by a linear layer but by aten.mul.Tensor",
    }


def test_rows_for_a_dry_run(helpers, tokens):
    planned = helpers.plan(Encoder(1), tokens, exclude=["kind"])
    table, first, second, *rest = planned.plan.rows()
    assert (table.site, table.shape, table.calls, table.role) == ("embed", (50, D), 1, "embedding")
    assert table.predicted_bytes == four_bit_bytes(50, D)
    assert (first.site, first.shape, first.parts, first.calls) == ("layer.0.up", (2 * D, D), ("layer.0.up",), 1)
    assert first.bias
    assert first.skipped is None
    assert first.dense_bytes == 4 * 2 * D * D
    assert first.predicted_bytes == four_bit_bytes(2 * D, D)
    assert second.predicted_bytes == four_bit_bytes(D, 2 * D)
    assert {row.site: row.skipped for row in rest} == planned.skipped
    assert all(row.predicted_bytes is None and row.parts == () for row in rest)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": ["layer.1.*"]}, ["layer.1.up", "layer.1.down"]),
        ({"include": ["layer.1"]}, ["layer.1.up", "layer.1.down"]),
        ({"include": ["*.up"]}, ["layer.0.up", "layer.1.up"]),
        ({"exclude": ["layer.0"], "embeddings": False}, ["layer.1.up", "layer.1.down"]),
        ({"include": ["embed", "kind", "layer.1.up"]}, ["embed", "kind", "layer.1.up"]),
        ({"include": ["layer.*"], "exclude": ["*.down"]}, ["layer.0.up", "layer.1.up"]),
        ({"exclude": ["embed", "layer.?.up", "layer.[0]*"]}, ["layer.1.down"]),
    ],
)
def test_patterns(helpers, tokens, options, names):
    planned = helpers.plan(Encoder(), tokens, **options)
    assert [site.name for site in planned.plan] == names
    for name in {"layer.0.up", "layer.0.down", "layer.1.up", "layer.1.down"} - set(names):
        assert "excluded by the pattern" in planned.skipped[name] or "not among" in planned.skipped[name]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_an_error(helpers, tokens, option):
    with pytest.raises(
        ConfigError, match=rf"--{option} 'layers\.\*' matches none of the model's 7 layers: embed, kind, layer.0.up"
    ):
        helpers.plan(Encoder(), tokens, **{option: ["layers.*"]})


def test_too_small_follows_the_predicted_bytes(helpers, tokens):
    planned = helpers.plan(Encoder(1), tokens, predicted_bytes=lambda n, k: n * k * 3)
    assert len(planned.plan) == 0
    assert planned.skipped["layer.0.up"].startswith("too small to gain")
    assert planned.skipped["embed"].startswith("too small to gain")
    planned = helpers.plan(Encoder(1), tokens, exclude=["kind"], predicted_bytes=lambda n, k: n * k * 2)
    assert [site.name for site in planned.plan] == ["embed", "layer.0.up", "layer.0.down", "small"]


class Repeats(nn.Module):
    """One linear at two places (twice a module, once under another name), and one weight used in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(D, D)
        self.again = self.shared
        self.tied = nn.Linear(D, D)
        self.tied.weight = self.shared.weight
        self.both = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        x = self.again(torch.relu(self.shared(x)))
        x = torch.relu(self.tied(x) @ self.both)
        return torch.relu(x @ self.both.t())


def test_shared_weights_are_one_site(helpers):
    planned = helpers.plan(Repeats(), torch.randn(2, 3, D))
    (site,) = planned.plan
    assert len(site.nodes) == 3
    assert len(site.inputs) == 3
    assert site.name in {"shared", "again", "tied"}
    assert {node.args[2].target.split(".")[0] for node in site.nodes} >= {"tied"}
    assert planned.skipped == {"both": "its weight is used both as it is and transposed"}


class Language(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, 96, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.embed(ids))))[:, -1:] * 0.5


def test_a_head_tied_to_the_embedding_is_one_site(helpers, tokens):
    planned = helpers.plan(Language(True), tokens)
    tied, body = planned.plan
    assert body.name == "body"
    assert (tied.role, len(tied.nodes), len(tied.lookups)) == ("head", 1, 1)
    assert planned.skipped == {}
    # It goes by both of its names.
    for name in ("embed", "head"):
        left = helpers.plan(Language(True), tokens, exclude=[name])
        assert [site.name for site in left.plan] == ["body"]
        assert list(left.skipped.values()) == [f"excluded by the pattern {name!r}"]
        assert [site.role for site in helpers.plan(Language(True), tokens, include=[name]).plan] == ["head"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"embeddings": False}, "embeddings are left at full precision, and this linear is tied to one"),
        ({"heads": False}, "language-model head; output heads are left at full precision"),
    ],
)
def test_a_tied_table_needs_both_kinds(helpers, tokens, options, reason):
    planned = helpers.plan(Language(True), tokens, **options)
    assert [site.name for site in planned.plan] == ["body"]
    assert list(planned.skipped.values()) == [reason]


def test_a_table_that_something_else_reads_stays(helpers, tokens):
    class Reads(Language):
        def forward(self, ids):
            return super().forward(ids) + self.embed.weight.sum()

    planned = helpers.plan(Reads(True), tokens)
    assert [site.name for site in planned.plan] == ["body"]
    assert list(planned.skipped.values()) == ["the embedding's table is also read by aten.sum.default"]


def test_a_table_multiplied_the_other_way_stays(helpers, tokens):
    class Factorized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, D)

        def forward(self, ids):
            return self.embed(ids) + torch.nn.functional.one_hot(ids, 96).float() @ self.embed.weight

    planned = helpers.plan(Factorized(), tokens)
    assert len(planned.plan) == 0
    assert list(planned.skipped.values()) == ["its weight is used both as it is and transposed"]


@pytest.mark.parametrize("task", ["text-generation", "fill-mask", None])
def test_head_of_the_task(helpers, tokens, task):
    planned = helpers.plan(Language(False), tokens, task=task)
    assert [(site.name, site.role) for site in planned.plan] == [
        ("embed", "embedding"),
        ("body", "linear"),
        ("head", "head"),
    ]
    without = helpers.plan(Language(False), tokens, task=task, heads=False)
    assert [site.name for site in without.plan] == ["embed", "body"]


def test_head_of_a_classifier(helpers, tokens):
    planned = helpers.plan(Language(False), tokens, task="text-classification")
    assert [site.name for site in planned.plan] == ["embed", "body"]
    assert planned.skipped["head"].startswith("classifier head, left at full precision by default")
    named = helpers.plan(Language(False), tokens, task="text-classification", include=["head", "body"])
    assert [site.name for site in named.plan] == ["body", "head"]


def test_last_linear_of_a_module_without_task_is_no_head(helpers):
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    planned = helpers.plan(model, torch.randn(2, D))
    assert [site.name for site in planned.plan] == ["0", "2"]
    features = helpers.plan(model, torch.randn(2, D), task="feature-extraction")
    assert [site.name for site in features.plan] == ["0", "2"]


def test_reason_of_another_spelling_reaches_the_plan(helpers):
    class Computes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))
            self.left = nn.Parameter(torch.randn(D, D))

        def forward(self, x):
            return nn.functional.linear(x, self.weight * 2) + (self.left @ x.transpose(1, 2)).transpose(1, 2)

    planned = helpers.plan(Computes(), torch.randn(2, 3, D))
    assert planned.skipped["left"] == "the constant left is the left operand"
    assert "computed in the graph" in planned.skipped["weight"]


def test_integer_and_double_weights_stay(helpers):
    model = nn.Linear(D, D).double()
    planned = helpers.plan(model, torch.randn(2, D).double())
    assert list(planned.skipped.values()) == ["weights are torch.float64"]


def test_multihead_attention_is_found(helpers):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    planned = helpers.plan(Attends(), torch.randn(2, 3, D))
    assert [(site.name, site.out_features) for site in planned.plan] == [
        ("attention.in_proj_weight", 3 * D),
        ("attention.out_proj", D),
    ]


def test_selection_does_not_touch_the_graph(helpers, tokens):
    planned = helpers.plan(Encoder(1), tokens)
    before = str(planned.graph_module.graph)
    result = SelectLinears()(planned.graph_module, PassContext())
    assert not result.modified
    assert str(planned.graph_module.graph) == before

"""The contract of passes and the pipeline: order, log, dumps, conditions."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import fx, nn

from claq_export.capture import capture_module
from claq_export.passes import (
    CanonicalizeLinears,
    ContractError,
    FuseGelu,
    FuseSiblings,
    Pass,
    PassContext,
    PassResult,
    Pipeline,
    RemoveNoops,
    RemoveUnused,
    ReplaceLinears,
    SelectLinears,
    planning_pipeline,
)

D = 64


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D, bias=False)
        self.b = nn.Linear(D, D, bias=False)

    def forward(self, x):
        return self.a(x) + torch.relu(self.b(x))


@pytest.fixture
def captured():
    return capture_module(Two(), torch.randn(2, D))


def test_order_is_readable():
    lines = str(planning_pipeline()).splitlines()
    assert [line.split(":")[0].split(". ")[1] for line in lines] == [
        "remove_noops",
        "fuse_gelu",
        "canonicalize_linears",
        "remove_unused",
        "select_linears",
        "fuse_siblings",
    ]
    assert all(line.rstrip().endswith(".") for line in lines)


@pytest.mark.parametrize(
    "kind", [RemoveNoops, FuseGelu, CanonicalizeLinears, RemoveUnused, SelectLinears, FuseSiblings, ReplaceLinears]
)
def test_every_pass_says_what_it_does(kind):
    assert kind.name.islower()
    assert kind.doc.endswith(".")
    assert kind.__doc__


def test_records_log_and_dumps(captured, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="claq_export.passes.pipeline"):
        records = planning_pipeline(dump_dir=tmp_path / "dump").run(captured.graph_module, PassContext())
    names = [record.name for record in records]
    assert [record.modified for record in records] == [False, False, True, False, False, True]
    assert records[-1].nodes_after == len(captured.graph_module.graph.nodes)
    assert all(after.nodes_before == before.nodes_after for before, after in itertools.pairwise(records))
    assert any("a + b -> a+b" in note for note in records[-1].notes)
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.levelno == logging.INFO] == names
    assert "fuse_siblings: a + b -> a+b" in caplog.text
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == ["00-input.txt", *(f"{i:02}-{name}.txt" for i, name in enumerate(names, 1))]
    assert "split_with_sizes" in (tmp_path / "dump" / files[-1]).read_text(encoding="utf-8")
    assert "split_with_sizes" not in (tmp_path / "dump" / files[0]).read_text(encoding="utf-8")


class Demands(Pass):
    name = "demands"
    doc = "Wants a graph without linears."

    def requires(self, gm: fx.GraphModule) -> None:
        raise ContractError("a linear is present")

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        raise AssertionError("must not run")


class Promises(Pass):
    name = "promises"
    doc = "Does nothing, promises much."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        return PassResult(gm, False)

    def ensures(self, gm: fx.GraphModule) -> None:
        raise ContractError("nothing came of it")


def test_conditions_are_checked_and_name_the_pass(captured):
    with pytest.raises(ContractError, match="pass demands: a linear is present"):
        Pipeline([Demands()]).run(captured.graph_module, PassContext())
    with pytest.raises(ContractError, match="pass promises: nothing came of it"):
        Pipeline([Promises()]).run(captured.graph_module, PassContext())


def test_remove_unused(captured):
    gm = captured.graph_module
    gm.register_buffer("idle", torch.zeros(3))
    gm.a.register_buffer("idle", torch.zeros(3))
    result = RemoveUnused()(gm, PassContext())
    assert result.modified
    assert set(result.notes) == {"removed idle", "removed a.idle"}
    assert set(gm.state_dict()) == {"a.weight", "b.weight"}
    assert not RemoveUnused()(gm, PassContext()).modified

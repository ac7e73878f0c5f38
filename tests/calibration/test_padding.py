"""Padding of batches that are given as arrays takes no part in anything that is calibrated."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

from claq_export.algorithm import Hessian
from claq_export.api import capture
from claq_export.calibration.gradients import pieces
from claq_export.calibration.padding import real_rows, real_tokens
from claq_export.calibration.progress import ProgressReporter
from claq_export.calibration.sensitivity import guidance
from claq_export.calibration.vocabulary import token_frequency
from claq_export.capture import capture_module
from claq_export.compiler import Compilation
from claq_export.config import Config

REAL, PADDED = 6, 16


def test_masks_say_what_is_padding() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    padded = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = padded.bool().tolist()
    for mask in (padded, padded.bool(), padded.float(), padded * 2):
        found = real_tokens({"input_ids": ids, "attention_mask": mask})
        # 2 and 0 as floating numbers would be added to scores; as whole numbers they are sequences packed together.
        assert found is not None
        assert found.tolist() == expected
    for mask in (ids, padded[:, None], torch.zeros(2, 3), padded.float() * -1e4, "no tensor"):
        assert real_tokens({"attention_mask": mask}) is None
    assert real_tokens({"input_ids": ids}) is None


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 3, 5), [1, 1, 0, 1, 1, 1]),
        ((6, 5), [1, 1, 0, 1, 1, 1]),
        ((2, 3, 2, 5), [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]),
        ((2, 5), None),
        ((3, 2, 5), None),
        ((4, 5), None),
    ],
    ids=str,
)
def test_rows_go_with_tokens(shape: tuple[int, ...], rows: list[int] | None) -> None:
    found = real_rows(shape, torch.tensor([[1, 1, 0], [1, 1, 1]]) == 1)
    assert (None if found is None else found.int().tolist()) == rows
    assert real_rows(shape, None) is None


def batches(names: tuple[str, ...], padded: bool, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(6):
        ids = torch.randint(5, 60, (4, REAL), generator=generator)
        if padded:
            ids = torch.cat([ids, torch.zeros(4, PADDED - REAL, dtype=torch.int64)], 1)
        mask = (torch.arange(ids.shape[1]) < REAL).long().expand(4, -1)
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand(4, -1),
        }
        found.append({name: values[name] for name in names})
    return found


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny_bert", {"bits": 3.5}),
        ("tiny_llama", {"bits": 3.5, "guided": True}),
    ],
    ids=["encoder", "decoder"],
)
def test_layers_are_those_of_the_tokens_alone(
    model: str, settings: dict[str, object], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claq_export.calibration.sensitivity.fast_dtype", lambda device: torch.float32)
    folder: Path = request.getfixturevalue(model)
    added: dict[bool, list[int]] = {True: [], False: []}
    add = Hessian.add
    compiled = {}
    for padded in (False, True):

        def counting(self: Hessian, x: torch.Tensor, *rest: object, padded: bool = padded) -> None:
            added[padded].append(x.shape[0])
            add(self, x, *rest)

        monkeypatch.setattr(Hessian, "add", counting)
        captured, _ = capture(folder)
        config = Config(calibration=batches(captured.input_names, padded), **settings)
        compiled[padded] = Compilation(captured, config, ProgressReporter(quiet=True))
        compiled[padded].quantize_sites()
    assert added[True] == added[False]
    found, alone = (list(compiled[padded].sites.values()) for padded in (True, False))
    # Sums over other shapes differ in their last bits, which the order of columns and single codes may hang on: one other
    # code, and every later layer has other inputs. The first has the same, and over all layers it evens out.
    assert found[0].error == pytest.approx(alone[0].error, rel=1e-3)
    assert sum(one.error for one in found) == pytest.approx(sum(one.error for one in alone), rel=0.02)
    for one, other in zip(found, alone, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.2)
        assert one.layer.columns == other.layer.columns


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_gradients_are_those_of_the_tokens_alone(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claq_export.calibration.sensitivity.fast_dtype", lambda device: torch.float32)
    if model == "tiny_bert":  # a text at a time, with or without padding, so that the draws are the same
        monkeypatch.setattr("claq_export.calibration.sensitivity.pieces", partial(pieces, tokens=1))
    captured, _ = capture(request.getfixturevalue(model))
    compilation = Compilation(captured, Config(), ProgressReporter(quiet=True))
    sites = compilation.plan.sites
    alone, found = (
        guidance(
            captured.graph_module,
            sites,
            batches(captured.input_names, padded),
            task=captured.task,
            seed=0,
            reporter=ProgressReporter(quiet=True),
        )
        for padded in (False, True)
    )
    for kind in ("tokens", "importance.rows", "importance.columns"):
        values, others = attrgetter(kind)(alone), attrgetter(kind)(found)
        assert values
        for name in values:
            torch.testing.assert_close(others[name], values[name], rtol=1e-2, atol=1e-6)


def test_looked_up_padding_is_no_frequent_token(tiny_bert: Path) -> None:
    captured, _ = capture(tiny_bert)
    compilation = Compilation(captured, Config(), ProgressReporter(quiet=True))
    sites = compilation.plan.sites
    for padded in (False, True):
        data = batches(captured.input_names, padded)
        (counts,) = token_frequency(captured.graph_module, sites, data).values()
        assert int(counts.sum()) == 6 * 4 * REAL
        assert int(counts[0]) == 0


class Flat(nn.Module):
    """Tokens as rows of a matrix, and a first token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.flat, self.pooler = nn.Embedding(60, 48), nn.Linear(48, 64), nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.flat(self.table(input_ids).flatten(0, 1)))
        x = x.unflatten(0, input_ids.shape) * attention_mask[..., None]
        return self.pooler(x[:, 0])


def test_not_a_number_in_padding_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Flat().eval()
    with torch.no_grad():
        model.table.weight[0] = torch.inf
    ids = torch.randint(1, 60, (4, 8))
    ids[:, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    captured = capture_module(model, tuple(batch.values()))
    tokens = []
    add = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, x, *rest: (tokens.append(x.shape[0]), add(self, x, *rest))[1])
    config = Config(bits=3, calibration=[batch], embedding_bits=0)
    Compilation(captured, config, ProgressReporter(quiet=True)).quantize_sites()
    assert tokens == [4 * 5, 4]

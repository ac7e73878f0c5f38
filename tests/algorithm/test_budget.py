"""The bit budget lands where it should and beats fixed fractions; presets have the nominal bits of the paper."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm import Hessian, LayerSettings, measure, plan_columns, quantize_layer
from claq_export.algorithm.budget import LayerProfile, _family, per_token_of_text, profile_layer, solve
from claq_export.algorithm.layer import ColumnPlan
from claq_export.algorithm.presets import PRESETS, preset_settings
from claq_export.errors import ConfigError

CONFIG = LayerSettings(outlier_choice="magnitude")


def model(count: int = 3, rows: int = 256, columns: int = 160) -> list[tuple[str, torch.Tensor, Hessian]]:
    layers = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(rows, columns, generator=generator) * 0.05
        weight = weight * (1 + 6 * (torch.rand(rows, columns, generator=generator) > 0.995))
        inputs = torch.randn(600, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
        hessian = Hessian(columns)
        hessian.add(inputs)
        layers.append((f"layer{i}", weight, hessian))
    return layers


LAYERS = model()
PROFILES = [profile_layer(name, weight, hessian, CONFIG) for name, weight, hessian in LAYERS]


@settings(max_examples=8, deadline=None)
@given(st.floats(2.35, 4.3), st.booleans())
def test_lands_within_a_step_of_a_tiny_model(bits: float, outliers: bool) -> None:
    budget = solve(PROFILES, true_bits=bits, outliers=outliers)
    # A block of 32 columns, or the row pointers of a layer's first outlier, are 0.067 bits of these three layers.
    assert bits * 0.99 - 0.07 <= budget.true_bits <= bits + 1e-9
    assert sum(b.nbytes for b in budget.bits.values()) == budget.nbytes


@pytest.mark.parametrize("bits", [2.15, 2.25, 2.5, 3.1, 3.6, 4.1])
def test_lands_within_one_percent(bits: float) -> None:
    rng = np.random.default_rng(0)
    profiles = []
    for i in range(12):
        rows = int(rng.integers(300, 900))
        shape = np.array([0.01, 0.04, 0.14])[:, None] * np.array([1.0, 0.9, 0.84, 0.75, 0.65, 0.55])
        error = np.exp(rng.normal(size=(512, 1, 1)) * 1.5) * shape * np.exp(rng.normal())
        profiles.append(LayerProfile(f"l{i}", rows, error, (0, 2, 4, 8, 15, 30)))
    assert solve(profiles, true_bits=bits).true_bits == pytest.approx(bits, rel=0.01)
    weights = sum(p.out_features * p.in_features for p in profiles)
    assert solve(profiles, nbytes=int(bits * weights / 8)).nbytes <= bits * weights / 8


def test_prediction_is_what_the_layers_take() -> None:
    budget = solve(PROFILES, true_bits=2.8)
    total = 0
    for name, weight, hessian in LAYERS:
        result = quantize_layer(weight, hessian, CONFIG, plan=budget.plans[name])
        assert measure(result.layer).nbytes == pytest.approx(budget.bits[name].nbytes, rel=1e-3)
        total += measure(result.layer).nbytes
        for width in (4, 3, 2):
            assert int((budget.plans[name].bits == width).sum()) % 32 == 0
    weights = sum(weight.numel() for _, weight, _ in LAYERS)
    assert 8 * total / weights == pytest.approx(2.8, rel=0.01)


@pytest.mark.parametrize("paper", ["claq-2.12", "claq-2.5", "claq-3.12"])
def test_beats_the_fixed_fractions_of_the_paper_at_equal_true_bits(paper: str) -> None:
    config = preset_settings(paper)
    fixed = [quantize_layer(weight, hessian, config) for _, weight, hessian in LAYERS]
    weights = sum(weight.numel() for _, weight, _ in LAYERS)
    nbytes = sum(measure(result.layer).nbytes for result in fixed)
    budget = solve(PROFILES, nbytes=nbytes)
    ours = [quantize_layer(w, h, CONFIG, plan=budget.plans[name]) for name, w, h in LAYERS]
    assert sum(measure(result.layer).nbytes for result in ours) <= nbytes * 1.01
    assert np.mean([r.error for r in ours]) < 0.9 * np.mean([r.error for r in fixed])
    assert weights > 0


def test_predicted_error_ranks_like_the_measured_one() -> None:
    """The profile's sum over columns must follow the loop's error when bits move."""
    name, weight, hessian = LAYERS[0]
    predicted, measured = [], []
    for bits in (2.0, 2.5, 3.0, 3.5, 4.0):
        plan = plan_columns(weight, hessian, LayerSettings(bits=bits))
        index = torch.tensor([0, 0, 2, 1, 0])[plan.bits.long()].numpy()
        predicted.append(PROFILES[0].error[np.arange(len(index)), index, 0].sum())
        measured.append(quantize_layer(weight, hessian, CONFIG, plan=plan).error)
    ratio = np.array(predicted) / np.array(measured)
    assert ratio.max() / ratio.min() < 1.5
    assert name in {p.name for p in PROFILES}


def test_floor_is_kept_and_others_pay() -> None:
    free = solve(PROFILES, true_bits=2.8)
    floored = solve(PROFILES, true_bits=2.8, floors={"layer1": 3})
    assert int(floored.plans["layer1"].bits.min()) == 3
    assert floored.true_bits == pytest.approx(2.8, abs=0.07)
    assert floored.bits["layer0"].nbytes < free.bits["layer0"].nbytes


def test_widths_can_be_limited() -> None:
    budget = solve(PROFILES, true_bits=3.0, widths=(4, 2))
    assert {int(b) for plan in budget.plans.values() for b in plan.bits.unique()} <= {4, 2}


def test_important_layer_gets_more() -> None:
    scaled = [
        LayerProfile(p.name, p.out_features, p.error * (20 if p.name == "layer2" else 1), p.reserve) for p in PROFILES
    ]
    before, after = solve(PROFILES, true_bits=2.8), solve(scaled, true_bits=2.8)
    assert after.bits["layer2"].true_bits > before.bits["layer2"].true_bits + 0.2


def test_row_importance_and_missing_hessian_are_accepted() -> None:
    name, weight, hessian = LAYERS[0]
    weighted = profile_layer(name, weight, hessian, CONFIG, row_importance=torch.full((256,), 3.0))
    assert weighted.error.shape == PROFILES[0].error.shape
    plain = profile_layer(name, weight, None, CONFIG)
    assert solve([plain], true_bits=3.0).true_bits == pytest.approx(3.0, rel=0.01)
    empty = profile_layer("zero", torch.zeros(64, 64), None, CONFIG)
    assert not empty.error.any()


def layers_of(tokens: dict[str, int]) -> tuple[dict[str, tuple[torch.Tensor, Hessian]], list[LayerProfile]]:
    """Layers alike but for the number of rows they read, and their profiles in units of the loss."""
    generator = torch.Generator().manual_seed(0)
    layers, profiles = {}, []
    for name, rows in tokens.items():
        weight, hessian = torch.randn(96, 128, generator=generator), Hessian(128, token_clip=None)
        hessian.add(torch.randn(rows, 128, generator=generator) @ torch.randn(128, 128, generator=generator))
        layers[name] = weight, hessian
        profiles.append(profile_layer(name, weight, hessian, CONFIG, row_importance=torch.ones(96)))
    return layers, profiles


def test_a_layer_counts_as_often_as_it_is_used() -> None:
    tokens = {"dense": 2048, "also": 2048} | {f"experts.{i}.w1": 128 for i in range(4)}
    layers, profiles = layers_of(tokens)
    weighed = per_token_of_text(profiles, dict.fromkeys(tokens, 1))
    rises = []
    for errors in (profiles, weighed):
        plans = solve(errors, true_bits=3.0).plans
        results = {name: quantize_layer(*layer, CONFIG, plan=plans[name]).layer for name, layer in layers.items()}
        rises.append(
            sum(
                float(hessian.energy(results[name].dequantize() - weight).sum())
                for name, (weight, hessian) in layers.items()
            )
        )
    assert rises[1] < 0.8 * rises[0]


def test_layers_that_see_every_token_stay_as_they_are() -> None:
    _, profiles = layers_of({"first": 300, "second": 300})
    for before, after in zip(profiles, per_token_of_text(profiles, {"first": 1, "second": 1}), strict=True):
        assert np.array_equal(before.error, after.error)
    # The same weight at two places of the model: half of the tokens each time.
    once, shared = per_token_of_text(
        [profiles[0], replace(profiles[1], tokens=600)], {profiles[0].name: 1, profiles[1].name: 2}
    )
    assert np.array_equal(once.error, profiles[0].error)
    assert np.array_equal(shared.error, 2 * profiles[1].error)


def test_an_expert_without_tokens_counts_like_a_sibling_that_saw_one() -> None:
    tokens = {"0.experts.0.w1": 400, "0.experts.1.w1": 0, "0.experts.2.w1": 300, "1.experts.0.w1": 400, "out": 700}
    _, profiles = layers_of(tokens)
    # Another layer's activations are another matter.
    profiles[3] = replace(profiles[3], cost=1e9)
    found = {profile.name: profile for profile in per_token_of_text(profiles, dict.fromkeys(tokens, 1))}
    unseen, seen = found["0.experts.1.w1"], found["0.experts.0.w1"]
    assert unseen.cost == pytest.approx((profiles[0].cost + profiles[2].cost) / 2)
    assert float(unseen.error[:, 2, 0].sum()) == pytest.approx(float(seen.error[:, 2, 0].sum()) / 400, rel=0.5)
    untouched = per_token_of_text([profiles[1]], {profiles[1].name: 1})
    assert np.array_equal(untouched[0].error, profiles[1].error)


def test_thousands_of_experts_are_sorted_into_families_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LayerProfile] = []

    def counting(profile: LayerProfile) -> tuple[str, int, int]:
        asked.append(profile)
        return _family(profile)

    monkeypatch.setattr("claq_export.algorithm.budget._family", counting)
    error = np.ones((1, 3, 1))
    profiles = [LayerProfile(f"0.experts.{i}.w1", 1, error, (0,), i % 2, float(i)) for i in range(3000)]
    found = per_token_of_text(profiles, {profile.name: 1 for profile in profiles})
    assert len(asked) <= len(profiles)
    assert {profile.cost for profile in found[::2]} == {1500.0}


def test_errors_fall_with_bits_and_with_reserve() -> None:
    for profile in PROFILES:
        assert (np.diff(profile.error, axis=1) >= 0).all()
        assert (np.diff(profile.error, axis=2) <= 0).all()


def test_impossible_budgets_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot be met.*take 2\.\d+ to"):
        solve(PROFILES, true_bits=1.5)
    with pytest.raises(ConfigError, match="cannot be met"):
        solve(PROFILES, true_bits=9.0)
    with pytest.raises(ConfigError, match="either"):
        solve(PROFILES)
    with pytest.raises(ConfigError, match="either"):
        solve(PROFILES, true_bits=3, nbytes=100)
    with pytest.raises(ConfigError, match="nowhere"):
        solve(PROFILES, true_bits=3, floors={"nowhere": 3})
    with pytest.raises(ConfigError, match="floor"):
        solve(PROFILES, true_bits=3, floors={"layer0": 4}, widths=(3, 2))
    with pytest.raises(ConfigError, match="at least one"):
        solve([], true_bits=3)


def test_report_is_json() -> None:
    report = solve(PROFILES, true_bits=2.6).to_json()
    assert json.loads(json.dumps(report)) == report
    assert sum(layer["error_share"] for layer in report["layers"].values()) == pytest.approx(1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_nominal_bits_of_their_name(name: str) -> None:
    """On a layer wide enough for groups of 32 to hit the fractions."""
    config = preset_settings(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 6400, generator=generator)
    plan: ColumnPlan = plan_columns(weight, None, config)
    # Names of the fusions are rounded: 3.05 + 0.5 % of 13 bits is called 3.12.
    assert plan.predict(100).nominal_bits == pytest.approx(float(name.removeprefix("claq-")), abs=0.0101)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"claq-2\.12"):
        preset_settings("claq-5")

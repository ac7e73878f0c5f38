"""Hessian, rankings, group sizes, outlier counts, scales, settings: each rule by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_export.algorithm import Hessian, LayerSettings
from claq_export.algorithm.accounting import predict
from claq_export.algorithm.outliers import locate, reserve_counts, split_reserved
from claq_export.algorithm.precision import (
    assign_widths,
    column_scores,
    group_counts,
    outlier_order,
    saliency,
    spread_counts,
)
from claq_export.algorithm.scales import round_codebook, row_scales
from claq_export.errors import CalibrationError, ConfigError


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class TestHessian:
    def test_is_the_sum_of_outer_products(self) -> None:
        x = tokens(60, 8)
        hessian = Hessian(8, token_clip=None)
        hessian.add(x[:20].reshape(4, 5, 8))
        hessian.add(x[20:])
        torch.testing.assert_close(hessian.matrix, x.T @ x)
        assert hessian.tokens == 60

    def test_factor_is_of_the_damped_inverse(self) -> None:
        hessian = Hessian(12, token_clip=None)
        hessian.add(tokens(100, 12) * 2.0 ** torch.arange(12))
        for act_order in (True, False):
            factor = hessian.factor(0.02, act_order)
            assert factor.upper.equal(factor.upper.triu())
            inverse = torch.linalg.inv(hessian.damped(0.02))[factor.order][:, factor.order]
            torch.testing.assert_close(factor.upper.double().T @ factor.upper.double(), inverse, rtol=1e-4, atol=1e-12)
        assert hessian.factor(0.02, True).order.tolist() == list(range(11, -1, -1))

    def test_factor_is_computed_once_until_more_tokens_come(self) -> None:
        hessian = Hessian(4)
        hessian.add(tokens(30, 4))
        first = hessian.factor()
        assert hessian.factor() is first
        hessian.add(tokens(30, 4, seed=1))
        assert hessian.factor() is not first

    def test_fewer_tokens_than_features_and_dead_features(self) -> None:
        x = tokens(3, 20)
        x[:, 5] = 0
        hessian = Hessian(20)
        hessian.add(x)
        assert torch.isfinite(hessian.factor().upper).all()

    def test_token_clip_limits_the_norm_to_twice_the_median(self) -> None:
        x = tokens(101, 6)
        x[0] *= 1000
        hessian = Hessian(6, token_clip=2.0)
        hessian.add(x)
        norms = x.norm(dim=1)
        clipped = x * (2 * norms.median() / norms).clamp(max=1)[:, None]
        torch.testing.assert_close(hessian.matrix, clipped.T @ clipped)

    def test_weights_drop_padding(self) -> None:
        x = tokens(10, 4)
        mask = torch.tensor([1.0] * 6 + [0.0] * 4)
        masked, alone = Hessian(4), Hessian(4)
        masked.add(x.reshape(2, 5, 4), mask.reshape(2, 5))
        alone.add(x[:6])
        torch.testing.assert_close(masked.matrix, alone.matrix)
        assert masked.tokens == 6

    def test_bad_input(self) -> None:
        hessian = Hessian(4)
        with pytest.raises(CalibrationError, match="width 5"):
            hessian.add(tokens(3, 5))
        with pytest.raises(CalibrationError, match="not finite"):
            hessian.add(torch.tensor([[1.0, float("nan"), 0, 0]]))
        hessian.add(tokens(3, 4))
        with pytest.raises(CalibrationError, match="reference"):
            hessian.add(tokens(3, 4), reference=tokens(3, 4))
        with pytest.raises(ConfigError, match="damping"):
            hessian.damped(0.0)
        with pytest.raises(ConfigError, match="in_features"):
            Hessian(0)
        with pytest.raises(ConfigError, match="token_clip"):
            Hessian(3, token_clip=0.0)


class TestRankings:
    def test_outlier_order_counts_large_weights(self) -> None:
        weight = torch.full((100, 4), 0.1)
        weight[:3, 2] = 50.0
        weight[:1, 1] = 60.0
        scores = outlier_order(weight, 13)
        assert scores.floor().tolist() == [0, 1, 3, 0]
        # With no weight past the threshold, the larger peak goes first.
        weight = torch.full((10, 3), 1.0)
        weight[0, 2] = 1.5
        assert int(outlier_order(weight, 13).argmax()) == 2

    def test_saliency_weighs_with_the_input(self) -> None:
        weight = torch.ones(5, 3)
        hessian = Hessian(3, token_clip=None)
        hessian.add(torch.tensor([[1.0, 2.0, 3.0]]))
        assert saliency(weight, hessian).tolist() == pytest.approx([5, 20, 45])
        assert saliency(weight, None).tolist() == [5, 5, 5]

    def test_loss_uses_the_conditional_cost(self) -> None:
        hessian = Hessian(6, token_clip=None)
        hessian.add(tokens(50, 6))
        scores = column_scores(torch.ones(2, 6), hessian, LayerSettings(ranking="loss"))
        factor = hessian.factor()
        expected = 2 * factor.upper.diagonal().double() ** -2
        torch.testing.assert_close(scores[factor.order], expected)


class TestGroups:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 3000), st.floats(2, 4))
    def test_counts_add_up_with_one_part_block_at_most(self, columns: int, bits: float) -> None:
        _, shares = LayerSettings(bits=bits).mix()
        counts = group_counts(columns, shares)
        assert sum(counts) == columns
        assert all(count >= 0 for count in counts)
        assert sum(count % 32 != 0 for count in counts) == (1 if columns % 32 else 0)
        assert all(abs(count - columns * share) <= 48 for count, share in zip(counts, shares, strict=True))

    @settings(max_examples=50, deadline=None)
    @given(st.floats(2, 4), st.lists(st.tuples(st.integers(32, 800), st.integers(32, 800)), min_size=1, max_size=40))
    def test_spread_passes_on_what_a_layer_misses(self, bits: float, shapes: list[tuple[int, int]]) -> None:
        widths, shares = LayerSettings(bits=bits).mix()
        columns, rows = [k for k, _ in shapes], [n for _, n in shapes]
        counts = spread_counts(columns, rows, shares)
        weights = sum(k * n for k, n in shapes)
        index_bits = sum(
            n * sum(c * w for c, w in zip(cs, widths, strict=True)) for n, cs in zip(rows, counts, strict=True)
        )
        # What is left over is at most what one layer could not express.
        assert abs(index_bits - bits * weights) <= 2 * 48 * max(rows) + 1e-6 * weights

    def test_a_narrow_model_comes_out_at_the_mean_asked_for(self) -> None:
        widths, shares = LayerSettings(bits=2.1).mix()
        counts = spread_counts([384] * 36, [384] * 36, shares)
        mean = np.mean([sum(c * w for c, w in zip(cs, widths, strict=True)) / 384 for cs in counts])
        assert mean == pytest.approx(2.1, abs=0.005)

    def test_best_columns_get_the_widest_codes(self) -> None:
        bits = assign_widths(torch.tensor([1.0, 5.0, 3.0, 5.0]), (4, 2), (2, 2))
        assert bits.tolist() == [2, 4, 2, 4]
        with pytest.raises(ConfigError, match="3 columns"):
            assign_widths(torch.zeros(4), (4, 2), (1, 2))


class TestOutliers:
    @pytest.mark.parametrize("reservation", ["fixed", "dynamic", "saliency"])
    @pytest.mark.parametrize("share", [0.001, 0.005, 0.02])
    def test_kept_share_is_the_share_asked_for(self, reservation: str, share: float) -> None:
        weight = tokens(500, 64)
        config = LayerSettings(outliers=share, reservation=reservation)
        counts = reserve_counts(weight, None, saliency(weight, None), config)
        assert int(counts.sum()) == round(share * 500 * 64)

    def test_dynamic_follows_the_true_column(self) -> None:
        weight = tokens(1000, 200)
        scores = torch.arange(200.0)
        config = LayerSettings(outliers=0.005, reservation="dynamic")
        counts = reserve_counts(weight, None, scores, config)
        assert int(counts[180:].min()) >= 3 * int(counts[:180].max())
        # The paper's constants: 1.4 % in a tenth of the columns and 0.4 % in the rest make 0.5 %.
        assert counts[180:].double().mean() / 1000 == pytest.approx(0.014, abs=0.001)
        assert counts[:180].double().mean() / 1000 == pytest.approx(0.004, abs=0.001)

    def test_saliency_goes_where_the_energy_is(self) -> None:
        hessian = Hessian(3, token_clip=None)
        hessian.add(torch.tensor([[1.0, 1.0, 30.0]]))
        counts = reserve_counts(
            tokens(100, 3), hessian, torch.zeros(3), LayerSettings(outliers=0.1, reservation="saliency")
        )
        assert counts.tolist() == [0, 0, 30]

    def test_few_hot_inputs_do_not_lower_the_share_that_is_kept(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight, inputs = torch.randn(128, 128, generator=generator), torch.randn(300, 128, generator=generator)
        inputs[:, :2] *= 100
        hessian = Hessian(128, token_clip=None)
        hessian.add(inputs)
        config = LayerSettings(outliers=0.02, reservation="saliency")
        counts = reserve_counts(weight, hessian, torch.zeros(128), config)
        assert int(counts.sum()) == round(0.02 * 128 * 128)
        assert counts[:2].tolist() == [64, 64]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(-5, 5), min_size=2, max_size=30), st.data())
    def test_located_rows_are_the_extremes(self, values: list[int], data: st.DataObject) -> None:
        column = np.array(values, dtype=np.float32)
        count = data.draw(st.integers(1, len(values) - 1))
        ordered = np.sort(column)
        for choice in ("sides", "magnitude"):
            low, high = split_reserved(ordered, count, choice)
            assert low + high == count
            rows = locate(column, ordered, low, high)
            assert len(set(rows.tolist())) == count
            assert sorted(column[rows]) == [*ordered[:low], *ordered[len(ordered) - high :]]
            if choice == "magnitude":
                others = np.delete(column, rows)
                assert np.abs(column[rows]).min() >= np.abs(others).max()
            else:
                assert abs(low - high) <= 1


class TestScales:
    def test_rows_have_unit_rms(self) -> None:
        weight = tokens(20, 50) * torch.logspace(-4, 3, 20)[:, None]
        scaled = weight / row_scales(weight, "rms").float()[:, None]
        torch.testing.assert_close(scaled.square().mean(dim=1), torch.ones(20), rtol=2e-3, atol=0)

    @pytest.mark.parametrize("kind", ["none", "rms", "mean", "max", "balanced"])
    def test_zero_rows_have_scale_zero(self, kind: str) -> None:
        weight = tokens(4, 10)
        weight[1] = 0
        assert (row_scales(weight, kind) == 0).tolist() == [False, True, False, False]

    def test_none_is_one_number(self) -> None:
        assert len(set(row_scales(tokens(4, 10), "none").tolist())) == 1

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=16), st.floats(0, 1e5, width=32))
    def test_codebook_is_within_half_a_step(self, centroids: list[float], reach: float) -> None:
        array = np.sort(np.array(centroids))
        integers, scale, table = round_codebook(array, reach)
        assert np.isfinite(scale)
        assert scale >= 0
        assert np.abs(table - array).max() <= 0.51 * float(scale) + 1e-7
        assert reach <= 65504 * float(scale) or float(scale) == 0
        assert (np.diff(table) >= 0).all()
        assert np.array_equal(table, integers.astype(np.float32) * np.float32(scale))

    @pytest.mark.parametrize(("largest", "reach"), [(1e7, 0.0), (1.0, 1e10), (8.4e6, 0.0)])
    def test_what_no_scale_expresses_keeps_a_finite_one(self, largest: float, reach: float) -> None:
        integers, scale, table = round_codebook(np.array([-largest, 0.0, largest]), reach)
        assert scale == np.float16(65504)
        assert np.isfinite(table).all()
        assert np.abs(integers.astype(int)).max() <= 127


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"bits": 1.9}, "bits"),
            ({"bits": 4.1}, "bits"),
            ({"bits": float("nan")}, "bits"),
            ({"bits": True}, "bits"),
            ({"outliers": -0.1}, "outliers"),
            ({"outliers": 0.5}, "outliers"),
            ({"dynamic_ratio": math.inf}, "dynamic_ratio must be a finite number of at least 1, got inf"),
            ({"outlier_threshold": math.nan}, "outlier_threshold must be a finite number"),
            ({"damping": 0}, "damping"),
            ({"block": 0}, "block"),
            ({"descent": -1}, "descent"),
            ({"descent": 1.5}, "descent"),
            ({"ranking": "best"}, "ranking"),
            ({"reservation": "all"}, "reservation"),
            ({"row_scale": "l7"}, "row_scale"),
            ({"kmeans": "magic"}, "kmeans"),
            ({"bits": 3, "widths": (2, 4)}, "falling"),
            ({"bits": 3, "widths": (5, 2)}, "widths"),
            ({"bits": 2, "widths": (4, 3)}, "outside"),
            ({"bits": 3, "widths": (4, 3, 2)}, "shares"),
            ({"bits": 3, "widths": (4, 2), "shares": (0.2, 0.8)}, "mean"),
            ({"bits": 3, "widths": (4, 2), "shares": (0.7, 0.7)}, "add up"),
            ({"bits": 3, "shares": (1.0,)}, "shares"),
        ],
    )
    def test_nonsense_is_refused(self, arguments: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            LayerSettings(**arguments)

    def test_mixes_of_the_paper(self) -> None:
        assert LayerSettings(bits=3).mix() == ((3,), (1.0,))
        widths, shares = LayerSettings(bits=2.1).mix()
        assert widths == (4, 2)
        assert shares == pytest.approx((0.05, 0.95))
        widths, shares = LayerSettings(bits=3.1).mix()
        assert widths == (4, 3)
        assert shares == pytest.approx((0.1, 0.9))
        assert LayerSettings(bits=2.5, widths=(3, 2)).mix() == ((3, 2), (0.5, 0.5))


def test_predicted_bytes_by_hand() -> None:
    # 70 columns of 2 bits are stored as 96: codes 96*2/32*10*4, codebook 4*96, scale 2*96, row_scale 2*10, no order.
    size = predict(10, 70, (0, 0, 70))
    assert size.nbytes == 240 + 384 + 192 + 20
    assert size.nominal_bits == 2
    # Two groups need the order; three outliers need pointers, indices and values.
    size = predict(10, 64, (32, 0, 32), (1, 0, 2))
    assert size.nbytes == (4 + 2) * 10 * 4 + 32 * 16 + 32 * 4 + 2 * 64 + 2 * 10 + 2 * 64 + 4 * 11 + 3 * 4
    assert size.nominal_bits == pytest.approx(3 + (12 + 2 * 14) / 640)

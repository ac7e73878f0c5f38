"""The quantizers that claq is compared with do what their papers say; the walks see what the model's linears see."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers import bert, llama
from benchmarks.peers.awq import awq
from benchmarks.peers.bench import Bench
from benchmarks.peers.common import Inputs
from benchmarks.peers.hqq import hqq
from benchmarks.peers.rows import squeezellm
from benchmarks.peers.uniform import gptq, grid, round_to_nearest, snap
from benchmarks.quality import rise_at

N, K = 24, 96


@pytest.fixture
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(K) + 0.4 * torch.randn(K, K, generator=generator) / K**0.5
    return torch.randn(400, K, generator=generator) * torch.rand(K, generator=generator) @ mix


def output_error(result, weight, inputs):
    return float(((result.weight - weight) @ inputs.T).square().sum())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, None)])
def test_round_to_nearest_stays_within_half_a_step_on_few_levels(weight, bits, group):
    result = round_to_nearest(weight, bits, group)
    for original, part in zip(weight.split(group or K, 1), result.weight.split(group or K, 1), strict=True):
        step = (original.amax(1).clamp(min=0) - original.amin(1).clamp(max=0)) / (2**bits - 1)
        # The zero point is a code, so that the ends of the range may be cut by half a step.
        assert ((original - part).abs().amax(1) <= 1.01 * step).all()
        assert all(len(row.unique()) <= 2**bits for row in part)
    groups = 1 if group is None else -(-K // group)
    assert result.bits == N * K * bits + N * groups * (16 + bits)


def test_gptq_without_correlation_is_rounding(weight):
    plain = gptq(weight, torch.eye(K), 3, None, act_order=False)
    assert torch.equal(plain.weight, round_to_nearest(weight, 3, None).weight)


def test_gptq_with_static_groups_keeps_their_grids(weight, inputs):
    feedback = gptq(weight, inputs.T @ inputs, 3, 32, static_groups=True)
    rounding = round_to_nearest(weight, 3, 32)
    assert output_error(feedback, weight, inputs) < 0.8 * output_error(rounding, weight, inputs)
    assert feedback.bits == rounding.bits
    for original, part in zip(weight.split(32, 1), feedback.weight.split(32, 1), strict=True):
        scale, zero = grid(original, 3)
        torch.testing.assert_close(snap(part, scale, zero, 3), part)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_lowers_the_output_error(weight, inputs, group, act_order):
    feedback = gptq(weight, inputs.T @ inputs, 3, group, act_order)
    rounding = round_to_nearest(weight, 3, group)
    assert output_error(feedback, weight, inputs) < 0.8 * output_error(rounding, weight, inputs)
    assert feedback.bits == rounding.bits + (16 * K if act_order and group else 0)


def test_hqq_lowers_the_weight_error_of_its_own_start(weight):
    error = [float((hqq(weight, 3, 32, steps=steps).weight - weight).abs().mean()) for steps in (0, 20)]
    assert error[1] < error[0]
    assert hqq(weight, 3, 32).bits == N * K * 3 + N * 3 * 32


def test_awq_search_pays(weight, inputs):
    hessian, magnitude = inputs.T @ inputs, inputs.abs().mean(0)
    rounding = output_error(round_to_nearest(weight, 3, 32), weight, inputs)
    clipped = output_error(awq(weight, hessian, magnitude, 3, 32, scaled=False), weight, inputs)
    scaled = awq(weight, hessian, magnitude, 3, 32)
    assert output_error(scaled, weight, inputs) < clipped < rounding
    assert scaled.bits == round_to_nearest(weight, 3, 32).bits
    frozen = awq(weight, hessian, magnitude, 3, 32, scaled=False, frozen_rows=N).weight
    torch.testing.assert_close(frozen, round_to_nearest(weight, 3, 32).weight)


def test_squeezellm_fits_a_codebook_a_row_by_sensitivity(weight):
    flat = squeezellm(weight, torch.ones(N, K), 3)
    assert all(len(row.unique()) <= 8 for row in flat.weight)
    assert float((flat.weight - weight).norm()) < float((round_to_nearest(weight, 3, None).weight - weight).norm())
    sensitive = torch.ones(N, K)
    sensitive[:, :4] = 1e4
    focused = squeezellm(weight, sensitive, 3).weight
    assert float((focused - weight)[:, :4].norm()) < float((flat.weight - weight)[:, :4].norm())
    sparse = squeezellm(weight, torch.ones(N, K), 3, sparse=0.02)
    largest = weight.abs().flatten().topk(round(0.02 * 8 / 9 * N * K)).indices
    assert torch.equal(sparse.weight.flatten()[largest], weight.half().float().flatten()[largest])
    assert sparse.bits > flat.bits


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def recorded(linears, run):
    """Inputs of each linear while ``run`` runs."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, x, n=n: seen.setdefault(n, x[0].clone())) for n, m in linears.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_llama_walk_sees_what_the_model_computes():
    model = tiny_llama()
    windows = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(2))
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        expected = recorded(linears, lambda: model(input_ids=windows))
    walked = {}
    for group, inputs in llama.walk(model, windows):
        walked.update(dict.fromkeys(group.linears.values(), inputs[0]))
    assert set(walked) == set(linears.values())
    for name, linear in linears.items():
        torch.testing.assert_close(walked[linear], expected[name], rtol=1e-4, atol=1e-5)


def test_bert_walk_sees_what_the_model_computes():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = BertModel(config, add_pooling_layer=False).eval()
    batch = {"input_ids": torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(2))}
    linears = {n: m for n, m in model.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        expected = recorded(linears, lambda: model(**batch))
    walked = {}
    bert.walk(model, [batch], lambda group, inputs: walked.update(dict.fromkeys(group.linears.values(), inputs[0])))
    assert set(walked) == set(linears.values())
    for name, linear in linears.items():
        torch.testing.assert_close(walked[linear], expected[name], rtol=1e-4, atol=1e-5)


def test_bench_always_starts_from_the_original(tmp_path):
    model = tiny_llama()
    text = torch.randint(0, 40, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    bench = Bench("folder", model, lambda _: text, "t", "c", 20, 2, 3, tmp_path)
    assert bench.evaluate().kl_mean == 0.0

    def two_bits(group, weight):
        return round_to_nearest(weight, 2, None)

    bits = bench.at_once(two_bits)
    first = bench.evaluate()
    assert first.kl_mean > 0
    assert bits == sum(w.numel() * 2 + len(w) * 18 for w in bench.original.values())
    statistics = bench.statistics  # walks the unquantized model
    assert set(statistics) == set(bench.original)
    bench.in_sequence(lambda group, weight, inputs: gptq(weight, Inputs.of(inputs).hessian, 4, None))
    assert bench.evaluate().kl_mean < first.kl_mean
    seen = []

    def beside(group, weight, inputs, originals):
        unquantized = Inputs.of(originals).hessian
        torch.testing.assert_close(unquantized, statistics[group.name].hessian, rtol=1e-4, atol=1e-4)
        seen.append(torch.equal(Inputs.of(inputs).hessian, unquantized))
        return two_bits(group, weight)

    bench.in_sequence(beside, beside_the_original=True)
    assert seen[0]
    assert not any(seen[1:])  # these read what quantized layers give
    bench.at_once(two_bits)
    assert bench.evaluate() == first
    assert all((value >= 0).all() for value in bench.fisher.values())


def test_rise_is_interpolated_on_the_lower_envelope():
    def row(bits, perplexity):
        return {"true_bits": bits, "perplexity": perplexity, "reference_perplexity": 10.0}

    rows = [row(4.0, 11.0), row(3.0, 20.0), row(3.5, 30.0)]  # the last is worse than what takes fewer bits
    assert rise_at(rows, 4.0) == pytest.approx(rise_at(rows[:2], 4.0))
    middle = rise_at(rows, 3.5)
    assert middle == pytest.approx((rise_at(rows, 3.0) * rise_at(rows, 4.0)) ** 0.5)
    assert rise_at(rows, 2.9) is None

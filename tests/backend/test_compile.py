"""The backend on small models: what is quantized, how often, and that results are those of claq_export.quantize."""

from __future__ import annotations

import copy
import gc
import shutil
import sys
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from backend_models import FEATURES, Net, compiled, data, stacks_of, store_of
from torch import nn

import claq_export
from claq_export import Config
from claq_export.backend.session import Session, _sessions
from claq_export.backend.store import WeightStore
from claq_export.errors import CalibrationError, ConfigError, ModelError


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def quantized(model: nn.Module, config: Config) -> nn.Module:
    """An independent copy, quantized through the export's capture."""
    return claq_export.quantize(copy.deepcopy(model), (data()[0],), config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 3, "outliers": 0.01, "accuracy": "int8"},
        {"bits": 2, "fuse_siblings": False},
        {"preset": "claq-2.24"},
        {"bits": 4.5},
        {"exclude": ("blocks.1",)},
    ],
    ids=str,
)
def test_data_gives_the_layers_of_quantize(settings: dict[str, Any]) -> None:
    model, batches = Net(), data()
    expected = quantized(model, Config(calibration=batches, **settings))
    run = compiled(model, calibration=batches, **settings)
    for rows in (1, 5):
        x = data(1, rows, seed=9)[0]
        torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(run(x), model(x))


def test_no_calibration_gives_the_layers_of_quantize() -> None:
    model = Net()
    expected = quantized(model, Config(calibration="none"))
    run = compiled(model, calibration="none")
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bits": 4.5}], ids=str)
def test_observe_then_swap_gives_the_layers_of_quantize(settings: dict[str, Any]) -> None:
    model, batches = Net(), data(3)
    expected = quantized(model, Config(calibration=batches, **settings))
    run = compiled(model, observe=3, **settings)
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, None])
def test_observed_writes_into_parts_of_values_are_followed(dynamic: bool | None) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(FEATURES, 64), nn.Linear(128, FEATURES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(*x.shape[:-1], 128)
            out[..., :64] = 1.0
            out[..., 64:] = self.first(x)
            return self.second(out)

    model, batches = Joined().eval(), [*data(2), *data(2, 3)]
    expected = claq_export.quantize(copy.deepcopy(model), (batches[0],), Config(calibration=batches))
    run = compiled(model, observe=4, dynamic=dynamic)
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-3, atol=1e-3)


def test_progress_lines_tell_of_observation_and_swap(capsys: pytest.CaptureFixture[str]) -> None:
    run = compiled(Net(), observe=2, progress=True)
    told = []
    for x in data(3):
        run(x)
        told.append(" ".join(capsys.readouterr().err.split()))
    assert "the first 2 calls run in full precision and are observed; then the weights are quantized" in told[0]
    assert "2 calls observed, quantizing the weights" in told[1]
    assert "quantized weights are in use from the next call on" in told[1]
    assert told[2] == ""


def test_observed_graphs_of_several_shapes_are_walked_together() -> None:
    model, batches = Net(), [*data(2, 40), data(1, 1, seed=3)[0], data(1, 7, seed=4)[0]]
    expected = quantized(model, Config(calibration=batches))
    run = compiled(model, observe=4)  # three graphs: 40 rows, one row, any number
    for x in batches:
        torch.testing.assert_close(run(x), model(x))
    x = data(1, 11, seed=9)[0]
    # The order of the sums differs between the walks.
    torch.testing.assert_close(run(x), expected(x), rtol=1e-3, atol=1e-3)


def test_observed_inputs_stay_within_their_memory() -> None:
    model, batches = Net(), data(3)
    size = batches[0].numel() * 4
    expected = quantized(model, Config(calibration=batches[:2]))
    run = compiled(model, observe=3, observe_bytes=2 * size + 1)
    for x in batches:
        run(x)
    torch.testing.assert_close(run(batches[2]), expected(batches[2]), rtol=1e-5, atol=1e-5)


def test_a_weight_is_quantized_once_whatever_is_recompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    put = WeightStore.put

    def counting(store: WeightStore, weight: torch.Tensor, *rest: Any) -> None:
        added.append(id(weight))
        put(store, weight, *rest)

    monkeypatch.setattr(WeightStore, "put", counting)
    model = Net()
    run = compiled(model, calibration=data())
    for rows in (3, 1, 8, 9):
        run(data(1, rows)[0])
    run(data(1, 5)[0].double().float())
    assert len(added) == len(set(added)) > 0


def test_siblings_share_one_operator_and_their_parts_know_their_rows() -> None:
    model = Net(1)
    compiled(model, calibration=data())(data(1)[0])
    stacks = stacks_of(model)
    block = "blocks.0"
    assert stacks[f"{block}.q.weight"] is stacks[f"{block}.k.weight"] is stacks[f"{block}.v.weight"]
    assert stacks[f"{block}.q.weight"].rows == (32, FEATURES, FEATURES)  # k is the first in the graph
    assert stacks[f"{block}.out.weight"].rows == (FEATURES,)


def test_graph_breaks_are_fine() -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    model = Broken()
    expected = quantized(Net(), Config(calibration=data()))
    run = compiled(model, fullgraph=False, calibration=data())
    # Capture cannot follow a graph break of Dynamo's, but torch.export ignores this one.
    x = data(1, seed=9)[0]
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)
    assert all(stacks_of(model)[f"blocks.{i}.out.weight"] is not None for i in range(2))


def test_layers_of_one_class_may_share_compiled_code() -> None:
    model = Net(3)
    expected = quantized(model, Config(calibration="none"))
    dense = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend=claq_backend(), options={"fallback": "eager", "calibration": "none", "progress": False})
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        x = data(1, seed=9)[0]
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), dense(x))


def claq_backend() -> Any:
    from claq_export.backend import claq

    return claq


def test_changed_weights_are_quantized_again() -> None:
    model, other = Net(), Net(seed=5)
    run = compiled(model, calibration="none")
    x = data(1)[0]
    run(x)
    model.load_state_dict(other.state_dict())
    expected = quantized(other, Config(calibration="none"))
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


def test_other_memory_is_another_weight() -> None:
    """Assigning to ``.data`` leaves identity and version counter alone."""
    model, other = Net(), Net(seed=5)
    run = compiled(model, calibration="none")
    x = data(1)[0]
    run(x)
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = value.data.clone()
    expected = quantized(other, Config(calibration="none"))
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"calibration": "none"}, {"observe": 2}], ids=str)
def test_casting_there_and_back(settings: dict[str, Any]) -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(200, 64), nn.Linear(64, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.table(ids) * 2)

    model, ids = Looked().eval(), torch.arange(10)
    run = compiled(model, fallback="inductor", **settings)
    for dtype in (torch.float32, torch.float16, torch.float32):
        model.to(dtype)
        for _ in range(4):
            again = run(ids)
            assert again.dtype == dtype
    dense = model(ids)
    assert 0 < (again - dense).abs().max() < 0.15 * dense.abs().max()


def test_changes_that_are_not_counted_need_a_word() -> None:
    model, other = Net(), Net(seed=5)
    run = compiled(model, calibration="none")
    x = data(1)[0]
    with pytest.raises(ModelError, match="no weight of this model has been quantized"):
        claq_export.requantize_compiled(run)
    before = run(x)
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(value)
    assert torch.equal(run(x), before)
    claq_export.requantize_compiled(run)
    expected = quantized(other, Config(calibration="none"))
    torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)
    released = compiled(Net(), calibration="none", release_weights=True)
    released(x)
    with pytest.raises(ModelError, match="released"):
        claq_export.requantize_compiled(released)


def test_a_call_that_is_not_finite_starts_observation_again() -> None:
    model, x = Net(), data(1)[0]
    run, dense = compiled(model, observe=2), copy.deepcopy(model)
    run(torch.full_like(x, float("inf")))
    with pytest.warns(UserWarning, match="not finite.*goes on unquantized and is observed anew"):
        run(x)
    for _ in range(2):
        torch.testing.assert_close(run(x), dense(x))
    assert not torch.allclose(run(x), dense(x))


def test_observation_that_always_fails_ends() -> None:
    model, x = Net(), torch.full((4, FEATURES), float("inf"))
    run = compiled(model, observe=1)
    for told in ("is observed anew", "is observed anew", "for good: that was attempt 3"):
        with pytest.warns(UserWarning, match=told):
            run(x)
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            torch.testing.assert_close(run(data(1)[0]), dense(data(1)[0]))


@pytest.mark.parametrize("seed", range(4))
def test_hessians_are_not_under_the_callers_autocast(seed: int) -> None:
    """Of few tokens they were no longer positive definite, and nothing was quantized."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    run, dense = compiled(model, observe=2), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            x = torch.randn(5, 64, generator=generator)
            got, expected = run(x), dense(x)
    assert got.dtype == torch.bfloat16
    assert 0.01 < (got - expected).abs().max() / expected.abs().max() < 0.4


def test_memory_that_lies_where_the_first_did_is_other_memory() -> None:
    model = nn.Linear(256, 256, bias=False).eval()
    run = compiled(model, calibration="none")
    x, same = torch.randn(3, 256), 0
    for _ in range(6):
        run(x)
        before = model.weight.data_ptr()
        model.weight.data = torch.empty(0)
        model.weight.data = torch.randn(256, 256)
        same += model.weight.data_ptr() == before
        wanted = model(x)
        assert (run(x) - wanted).abs().max() < 0.3 * wanted.abs().max()
    if not same:
        pytest.skip("the allocator gave other memory each time")


def test_threads_with_models_of_their_own() -> None:
    """They share a store, and look for what has changed in it while others put products in."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(15):
                    model.blocks[seed].q.bias.add_(0.01)
                    model.blocks[seed](x)
        except BaseException as failure:
            failures.append(failure)

    model, x = Net(3), data(1)[0]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=claq_backend(), options={"fallback": "eager", "calibration": "none", "progress": False})
    model(x)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def test_a_model_that_is_never_called_again_is_let_go() -> None:
    model = Net()
    run = compiled(model, observe=5)
    run(data(1)[0])
    recordings = [one for session in _sessions.values() for one in session._recordings if one.alive]
    (recording,) = [one for one in recordings if any(arg is model.blocks[0].q.weight for arg in one.args)]
    weight = weakref.ref(model.blocks[0].q.weight)
    assert recording.batches
    assert recording.nbytes
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert not recording.alive
    assert recording.batches == []
    assert all(arg is None for arg in recording.args)
    other = Net(seed=2)
    run = compiled(other, observe=5)
    run(data(1)[0])
    assert not any(one is recording for session in _sessions.values() for one in session._recordings)


def test_a_bias_that_is_added_outside_of_autocast_keeps_its_type() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.randn(48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    model, x = Written(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), compiled(model, calibration="none")(x)
    assert got.dtype == expected.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.2 * expected.abs().max()


def test_the_last_call_is_observed_once() -> None:
    """Of two threads whose calls were the last to be observed the second finds the weights quantized."""
    model, x = Net(), data(1)[0]
    run = compiled(model, observe=1)
    session = session_of(model, run, x)
    recording = session._recordings[0]
    session.observed(recording)
    assert all(stack is not None for name, stack in stacks_of(model).items() if "out" in name)
    session.observed(recording)


def session_of(model: nn.Module, run: Any, x: torch.Tensor) -> Session:
    """Where a call is observed that has not ended."""
    sessions: list[Session] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "observed", lambda session, _recording: sessions.append(session))
        run(x)
    return sessions[0]


def test_shared_code_prepares_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(3)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=claq_backend(), options={"fallback": "eager", "calibration": "none", "progress": False})
    x = data(1)[0]
    model(x)
    built: list[Any] = []
    build = WeightStore._build
    monkeypatch.setattr(WeightStore, "_build", lambda *arguments: built.append(1) or build(*arguments))
    model(x)
    count = len(built)
    for _ in range(3):
        model(x)
    assert len(built) == count
    with torch.no_grad():
        model.blocks[1].q.bias.add_(1)
    before, after = model.blocks[0](x), model(x)
    assert len(built) == count + 1
    assert not torch.equal(before, after)


def test_weights_stored_transposed_and_tied() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(FEATURES, 64) / 7)
            self.bias = nn.Parameter(torch.randn(64))
            self.table = nn.Embedding(96, 64)
            self.tail = nn.Parameter(torch.randn(64, 40))
            self.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.addmm(self.bias, x, self.weight)
            ids = inner.abs().sum(-1).long() % 96
            return (inner + self.table(ids)) @ self.table.weight.t(), inner @ self.tail

    model = Odd()
    reference = copy.deepcopy(model)
    run = compiled(model, calibration="none", exclude=("tail",))
    store = store_of_after(run, model)
    for name in ("weight", "table.weight"):
        entry = store.find(model.get_parameter(name))
        assert entry is not None
        assert entry.stack is not None
        value = entry.layer.dequantize()
        reference.get_parameter(name).copy_(value.T if entry.stack.transposed else value)
    assert store.find(model.tail) is None
    x = data(1, seed=9)[0]
    for got, wanted in zip(run(x), reference(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def store_of_after(run: Any, model: nn.Module) -> WeightStore:
    run(data(1)[0])
    return store_of(model)


def test_floats_that_dynamo_takes_for_inputs() -> None:
    class Scaled(Net):
        scale = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model, x = Scaled(), data(1)[0]
    run = compiled(model, calibration="none", dynamic=True)
    first = run(x)
    model.scale = 0.25
    torch.testing.assert_close(run(x), first / 2)
    assert not torch.equal(first, model(x) * 2)


def test_tensors_made_from_a_size_do_not_fix_it() -> None:
    class Positions(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.arange(x.shape[0])[:, None]  # has no tensor among its inputs

    model = Positions()
    run = compiled(model, calibration="none", dynamic=True)
    expected = quantized(model, Config(calibration="none"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            x = data(1, rows, seed=9)[0]
            torch.testing.assert_close(run(x), expected(x), rtol=1e-5, atol=1e-5)


def test_a_graph_that_cannot_be_traced_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_gm: Any) -> Any:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr("claq_export.backend.compile.trace_to_aten", refuse)
    model, x = Net(), data(1)[0]
    with pytest.warns(UserWarning, match="runs without quantization: NotImplementedError: no such operator"):
        assert torch.equal(compiled(model, calibration="none")(x), model(x))


def test_entries_die_with_their_model() -> None:
    model = Net()
    run = compiled(model, calibration="none")
    run(data(1)[0])
    store = store_of(model)
    assert list(store.entries())
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert not list(store.entries())


class Mixed(nn.Module):
    """Layers without autocast, under it, and under one that is switched off again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 64), nn.Linear(64, 64)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = self.second(x)
            chosen = torch.where(inside > 0, inside, self.second(x))
            with torch.autocast("cpu", enabled=False):
                outside = self.third(chosen.float())
        return before, inside, chosen, outside, self.first(x)


@pytest.mark.parametrize(
    "fallback",
    [
        "eager",
        pytest.param(
            "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]
        ),
    ],
)
@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
@pytest.mark.parametrize("settings", [{"calibration": "none"}, {"observe": 1}], ids=str)
def test_autocast_gives_the_dtypes_of_eager(fallback: str, around: bool, settings: dict[str, Any]) -> None:
    model, x = Mixed(), data(1, 120)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        wanted, run = model(x), compiled(model, fallback=fallback, **settings)
        for call in range(2):
            for got, value in zip(run(x), wanted, strict=True):
                assert got.dtype == value.dtype
                assert (got - value).float().norm() < 0.15 * value.float().norm(), call
        assert not torch.equal(run(x)[0], wanted[0])
        # A dtype of autocast's own must not outlive the trace.
        assert torch.is_autocast_enabled("cpu") == around


def test_tuning_needs_no_gradients_of_the_caller() -> None:
    model, batches = Net(1), data(12)
    settings = {"bits": 2, "calibration": batches}
    with torch.enable_grad():
        tuned = quantized(model, Config(tune=0.01, **settings))
    run = compiled(model, tune=0.01, **settings)
    with torch.inference_mode():
        again = claq_export.quantize(copy_outside(model), (batches[0],), Config(tune=0.01, **settings))
        x = data(1, seed=9)[0]
        for net in (tuned, run, again):
            assert (net(x) - model(x)).norm() < model(x).norm()


@torch.inference_mode(False)
def copy_outside(model: nn.Module) -> nn.Module:
    """Parameters that are made in inference mode have no gradients ever."""
    return copy.deepcopy(model)


class TestWhatIsLeftAlone:
    """A warning says what is not quantized and why, where anybody might take it for quantized."""

    def warnings_of(self, model: nn.Module, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled(model.eval(), calibration="none", fullgraph=False, **options)(data(1)[0][None])
        return [str(one.message) for one in caught if "backend='claq'" in str(one.message)]

    def test_encoders_of_one_operator(self) -> None:
        layer = nn.TransformerEncoderLayer(FEATURES, 4, 96, batch_first=True)
        (told,) = self.warnings_of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        assert "no layer of this graph is quantized (layers.0.self_attn.in_proj_weight: not used by" in told
        assert "and 5 more). torch.backends.mha.set_fastpath_enabled(False)" in told
        (told,) = self.warnings_of(nn.Sequential(nn.Linear(FEATURES, FEATURES), layer))
        assert "not every layer of this graph is quantized (1.self_attn" in told
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert self.warnings_of(layer) == []
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert stacks_of(layer)["linear1.weight"] is not None

    def test_recurrent_layers_in_a_graph(self) -> None:
        with torch._dynamo.config.patch(allow_rnn=True):
            (told,) = self.warnings_of(nn.LSTM(FEATURES, FEATURES))
        assert "weight_ih_l0: not used by a linear layer but by aten.lstm.input" in told

    def test_linears_that_are_too_small(self) -> None:
        (told,) = self.warnings_of(nn.Linear(FEATURES, 2))
        assert "no layer of this graph is quantized (weight: too small to gain" in told

    def test_nothing_is_said_of_other_graphs(self) -> None:
        assert self.warnings_of(nn.Sequential(nn.Conv1d(40, 4, 3), nn.LayerNorm(FEATURES - 2))) == []
        assert self.warnings_of(nn.Sequential(nn.Linear(FEATURES, FEATURES)), exclude=("*",)) == []
        assert self.warnings_of(Net(1), exclude=("blocks.0.q",)) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_rest_in_one_graph_for_every_batch_size() -> None:
    model = Net(1)
    expected = quantized(model, Config(calibration=data()))
    run = compiled(model, calibration=data(), fallback="inductor")
    modules = torch.compile(expected, backend="inductor", fullgraph=True, dynamic=True)  # claq::linear of ClaqLinear
    for rows in (5, 9):
        x = data(1, rows, seed=9)[0]
        torch.testing.assert_close(run(x), expected(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(modules(x), expected(x), rtol=1e-4, atol=1e-4)


class TestRefusals:
    def test_gradients(self) -> None:
        model = Net()
        run = compiled(model, calibration="none")
        with torch.enable_grad(), pytest.raises(ConfigError, match="compiles for inference: call the model under"):
            run(data(1)[0])
        with torch.enable_grad(), pytest.raises(ConfigError, match="compiles for inference"):
            compiled(model.train(), calibration="none")(data(1)[0])
        model.eval()
        assert not torch.equal(compiled(model, calibration="none")(data(1)[0]), model(data(1)[0]))

    def test_training_mode_without_gradients_is_allowed(self) -> None:
        model = Net().requires_grad_(False).train()
        with torch.enable_grad():
            compiled(model, calibration="none")(data(1)[0])

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Dropout(0.1),
            nn.Dropout(0.1, inplace=True),
            nn.Dropout1d(0.1),
            nn.AlphaDropout(0.1),
            nn.FeatureAlphaDropout(0.1, inplace=True),
            nn.RReLU(),
            nn.BatchNorm1d(FEATURES),
            nn.Sequential(nn.Unflatten(1, (4, -1)), nn.InstanceNorm1d(4, track_running_stats=True)),
            nn.TransformerEncoderLayer(FEATURES, 4, 64, batch_first=True),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    @pytest.mark.filterwarnings("ignore:backend='claq':UserWarning")  # the encoder's fused operator
    def test_layers_that_compute_as_in_training(self, layer: nn.Module) -> None:
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES), layer).train()
        with pytest.raises(ConfigError, match=r"training mode \(.*\): call model.eval\(\)"):
            compiled(model, calibration="none")(data(1)[0])
        compiled(model.eval(), calibration="none")(data(1)[0])

    def test_layers_that_compute_in_training_as_ever(self) -> None:
        layers = (
            nn.Dropout(0.0),
            nn.RReLU(0.2, 0.2),
            nn.BatchNorm1d(FEATURES, track_running_stats=False),
            nn.LayerNorm(FEATURES),
        )
        compiled(nn.Sequential(nn.Linear(FEATURES, FEATURES), *layers).train(), calibration="none")(data(1)[0])

    def test_attention_that_drops_as_in_training(self) -> None:
        class Attention(Net):
            dropout = 0.1

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = super().forward(x)[None]
                dropout = self.dropout if self.training else 0.0
                return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout)

        model = Attention().train()
        with pytest.raises(ConfigError, match=r"attention with dropout of 0\.1"):
            compiled(model, calibration="none")(data(1)[0])
        compiled(model.eval(), calibration="none")(data(1)[0])

    def test_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="no option 'calibraton'; did you mean 'calibration'"):
            compiled(Net(), calibraton="none")(data(1)[0])

    def test_text_without_a_text_model(self) -> None:
        with pytest.raises(CalibrationError, match="needs a transformers model"):
            compiled(Net(), calibration="default")(data(1)[0])

    def test_data_without_a_module(self) -> None:
        model = Net()
        parameters = (model.blocks[0].q.weight, model.blocks[0].q.bias)

        def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, weight, bias)

        with pytest.raises(CalibrationError, match="not the forward of one"):
            compiled(function, calibration=data())(data(1)[0], *parameters)

    def test_patterns_that_match_nothing_are_an_error(self) -> None:
        with pytest.warns(UserWarning, match="no layer of this graph is quantized"):
            compiled(Net(), calibration="none", include=("nothing",))(data(1)[0])

    def test_other_settings_after_release(self) -> None:
        model = Net()
        compiled(model, calibration="none", release_weights=True)(data(1)[0])
        with pytest.raises(claq_export.errors.ModelError, match="were released"):
            compiled(model, calibration="none", bits=3)(data(1)[0])

"""ClaqCachedAttention and ClaqAttention in ONNX Runtime against attention written out in float64, and their functions."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from claq_export.emit.function import ATTENTION, CACHED_ATTENTION, claq_function

claq_runtime = pytest.importorskip("claq_runtime")

Array = npt.NDArray[Any]
INPUTS = ("query", "key", "value", "mask", "past_key", "past_value")
OUTPUTS = ("y", "present_key", "present_value")
HIDDEN = float(np.finfo(np.float32).min / 2)
"""What the exporter adds where a mask says no."""


def model(
    heads: int, kv_heads: int, scale: float, mask_rank: int = 4, cached: bool = True, cache: type[Any] = np.float32
) -> bytes:
    """One node; without a cache every head has keys of its own."""
    ranks = {"query": 3, "key": 3, "value": 3, "mask": mask_rank, "y": 3}
    inputs, outputs = (INPUTS, OUTPUTS) if cached else (INPUTS[:4], OUTPUTS[:1])
    operator, opset = (CACHED_ATTENTION, 23) if cached else (ATTENTION, 18)
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads} if cached else {"num_heads": heads}

    def value(name: str) -> onnx.ValueInfoProto:
        axes = [f"{name}_{axis}" for axis in range(ranks.get(name, 4))]
        kind = cache if name.startswith(("past", "present")) else np.float32
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), axes)

    node = helper.make_node(operator, inputs, outputs, "node", domain="com.claq", scale=scale, **counts)
    graph = helper.make_graph([node], "attention", [value(name) for name in inputs], [value(name) for name in outputs])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.claq", 1)]
    functions = [onnx.FunctionProto.FromString(claq_function(operator, narrow_cache=cache != np.float32))]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10).SerializeToString()


def session(content: bytes, library: bool = True, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        claq_runtime.register(options)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def written_out(feeds: dict[str, Array], heads: int, kv_heads: int, scale: float) -> list[Array]:
    """The same in float64, one head after the other."""
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}
    batch, rows, _ = feeds["query"].shape
    for name in ("key", "value"):  # without a cache the past is empty
        size = feeds[name].shape[-1] // kv_heads
        wide.setdefault(f"past_{name}", np.zeros((batch, kv_heads, 0, size)))

    def by_head(value: Array, count: int) -> Array:
        return value.reshape(*value.shape[:2], count, -1).transpose(0, 2, 1, 3)

    query = by_head(wide["query"], heads)
    keys = np.concatenate([wide["past_key"], by_head(wide["key"], kv_heads)], 2)
    values = np.concatenate([wide["past_value"], by_head(wide["value"], kv_heads)], 2)
    mask = np.broadcast_to(wide["mask"], (batch, heads, rows, keys.shape[2]))
    result = np.zeros((batch, rows, heads, values.shape[-1]))
    for head in range(heads):
        own = head // (heads // kv_heads)
        scores = scale * query[:, head] @ keys[:, own].transpose(0, 2, 1) + mask[:, head]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[:, :, head] = weights / weights.sum(-1, keepdims=True) @ values[:, own]
    return [result.reshape(batch, rows, -1), keys, values]


def rounded(feeds: dict[str, Array], cache: type[Any]) -> dict[str, Array]:
    """What counts of inputs whose new keys and values go into a cache of this type."""
    return feeds | {name: feeds[name].astype(cache) for name in ("key", "value")}


def causal(rows: int, past: int, padding: int = 0) -> Array:
    """The mask of a decoder whose first tokens may be padding: their own rows see nothing."""
    token = np.arange(past + rows)
    seen = (token[None] <= np.arange(past, past + rows)[:, None]) & (token >= padding)
    return np.where(seen, np.float32(0), np.float32(HIDDEN))


def random_feeds(
    random: np.random.Generator, kv_heads: int, groups: int, cache: type[Any] = np.float32, **sizes: int
) -> dict[str, Array]:
    batch, rows, past, size, value_size = (sizes[name] for name in ("batch", "rows", "past", "size", "value_size"))
    shapes = {
        "query": (batch, rows, kv_heads * groups * size),
        "key": (batch, rows, kv_heads * size),
        "value": (batch, rows, kv_heads * value_size),
        "past_key": (batch, kv_heads, past, size),
        "past_value": (batch, kv_heads, past, value_size),
    }
    feeds = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: value.astype(cache) if name.startswith("past") else value for name, value in feeds.items()}


def random_mask(random: np.random.Generator, batch: int, heads: int, rows: int, tokens: int) -> Array:
    """Of a random rank, each leading axis full or 1; with numbers to add, hidden tokens and rows that see nothing."""
    full = (batch, heads, rows)
    rank = int(random.integers(2, 5))
    shape = [size if random.random() < 0.5 else 1 for size in full[3 - (rank - 1) :]]
    kind = random.integers(3)
    if kind == 0:
        return random.standard_normal((*shape, tokens), np.float32)
    mask = np.where(random.random((*shape, tokens)) < 0.6, np.float32(0), np.float32(HIDDEN))
    if kind == 1:  # long stretches, which the kernel leaves out
        first = int(random.integers(tokens + 1))
        mask[..., first:] = HIDDEN
    return mask


caches = pytest.mark.parametrize("cache", [np.float32, np.float16], ids=lambda cache: cache.__name__)


@caches
@pytest.mark.parametrize("kernel", claq_runtime.kernels())
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(kernel: str, seed: int, cache: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAQ_KERNEL", kernel)
    random = np.random.default_rng(seed)
    for case in range(25):
        kv_heads, groups, batch = (int(random.integers(1, high)) for high in (5, 6, 4))
        rows = int(random.choice([1, 2, 7, 8, 9, 24, 25, 33, 70, 130]))
        sizes = {
            "batch": batch,
            "rows": rows,
            "past": int(random.choice([0, 1, 5, 31, 64, 65, 200, 700])),
            "size": int(random.choice([1, 4, 8, 16, 24, 33, 64, 80, 128])),
            "value_size": int(random.choice([1, 5, 8, 16, 31, 64, 96])),
        }
        feeds = random_feeds(random, kv_heads, groups, cache, **sizes)
        feeds["mask"] = random_mask(random, batch, kv_heads * groups, rows, sizes["past"] + rows)
        scale = float(random.uniform(0.05, 1))
        content = model(kv_heads * groups, kv_heads, scale, feeds["mask"].ndim, cache=cache)
        found = session(content, threads=1 + case % 2).run(None, feeds)
        wanted = written_out(rounded(feeds, cache), kv_heads * groups, kv_heads, scale)
        np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5, atol=2e-5, err_msg=str(sizes))
        for have, want in zip(found[1:], wanted[1:], strict=True):
            assert have.dtype == cache
            np.testing.assert_array_equal(have, want.astype(cache))


@pytest.mark.parametrize("kernel", claq_runtime.kernels())
def test_random_shapes_without_a_cache(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAQ_KERNEL", kernel)
    random = np.random.default_rng(7)
    for case in range(30):
        heads, batch = int(random.integers(1, 14)), int(random.integers(1, 5))
        rows, tokens = (int(random.choice([1, 3, 8, 17, 24, 64, 130])) for _ in range(2))
        size, value_size = (int(random.choice([1, 8, 24, 32, 64])) for _ in range(2))
        shapes = {"query": (rows, size), "key": (tokens, size), "value": (tokens, value_size)}
        feeds = {
            name: random.standard_normal((batch, count, heads * width), np.float32)
            for name, (count, width) in shapes.items()
        }
        feeds["mask"] = np.zeros(1, np.float32) if case % 5 == 0 else random_mask(random, batch, heads, rows, tokens)
        content = model(heads, heads, 0.3, feeds["mask"].ndim, cached=False)
        (found,) = session(content, threads=1 + case % 2).run(None, feeds)
        wanted = written_out(feeds, heads, heads, 0.3)[0]
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5, err_msg=str(shapes))
        (by_function,) = session(content, False).run(None, feeds)
        np.testing.assert_allclose(found, by_function, rtol=1e-4, atol=2e-5, err_msg=str(shapes))


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("rows", [0, 2, 40])
def test_nothing_to_look_at_or_to_ask(rows: int, tokens: int) -> None:
    shapes = {"query": (2, rows, 8), "key": (2, tokens, 8), "value": (2, tokens, 8), "mask": (1,)}
    feeds = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    (found,) = session(model(2, 2, 1.0, 1, cached=False)).run(None, feeds)
    np.testing.assert_array_equal(found, np.full((2, rows, 8), min(tokens, 1), np.float32))


@caches
@pytest.mark.parametrize(("rows", "past"), [(1, 80), (5, 0), (40, 0), (300, 100)])
def test_the_function_is_the_same(rows: int, past: int, cache: type[Any]) -> None:
    random = np.random.default_rng(rows)
    feeds = random_feeds(random, 3, 3, cache, batch=2, rows=rows, past=past, size=64, value_size=64)
    feeds["mask"] = causal(rows, past)[None, None]
    content = model(9, 3, 0.125, cache=cache)
    for found, wanted in zip(session(content).run(None, feeds), session(content, False).run(None, feeds), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_rows_of_padding_are_means_and_never_nan(rows: int) -> None:
    random = np.random.default_rng(0)
    feeds = random_feeds(random, 2, 2, batch=1, rows=rows, past=0, size=16, value_size=16)
    feeds["mask"] = causal(rows, 0, padding=2)[None, None]
    y = session(model(4, 2, 0.25)).run(["y"], feeds)[0]
    mean = feeds["value"].reshape(rows, 2, 16).mean(0).repeat(2, 0).reshape(-1)
    np.testing.assert_allclose(y[0, :2], [mean, mean], rtol=1e-4, atol=1e-5)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("hidden", [slice(590), slice(100, None)])
@pytest.mark.parametrize("rows", [1, 40])
def test_minus_infinity_hides_and_a_row_of_it_is_nan(rows: int, hidden: slice) -> None:
    random = np.random.default_rng(1)
    feeds = random_feeds(random, 1, 1, batch=2, rows=rows, past=600, size=8, value_size=8)
    mask = np.full((2, 1, rows, 600 + rows), -200, np.float32)
    mask[0, :, :, hidden] = -np.inf
    mask[1] = -np.inf
    feeds["mask"] = mask
    y = session(model(1, 1, 0.5)).run(["y"], feeds)[0]
    finite = {name: value[:1] for name, value in feeds.items()} | {"mask": np.maximum(mask[:1], HIDDEN)}
    np.testing.assert_allclose(y[:1], written_out(finite, 1, 1, 0.5)[0], rtol=1e-5, atol=1e-5)
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("number", [-np.inf, np.nan, -1.5])
def test_one_number_for_all_tokens_is_that_number_for_each(number: float) -> None:
    feeds = random_feeds(np.random.default_rng(2), 2, 1, batch=2, rows=5, past=3, size=8, value_size=8)
    mask = np.zeros((1, 2, 5, 1), np.float32)
    mask[0, 1, 2] = number
    content = model(2, 2, 0.5)
    feeds["mask"] = np.repeat(mask, 8, axis=-1)
    expected = session(content).run(["y"], feeds)[0]
    feeds["mask"] = mask
    found = session(content).run(["y"], feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.isnan(found).any() == (not np.isfinite(number))


@pytest.mark.parametrize("number", [-1e4, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("rows", [2, 40])
def test_one_large_number_for_all_tokens_rounds_scores_as_in_the_function(rows: int, number: float) -> None:
    random = np.random.default_rng(4)
    feeds = {name: random.standard_normal((1, rows, 8), np.float32) for name in INPUTS[:3]}
    feeds["mask"] = np.full((1, 1, rows, 1), number, np.float32)
    content = model(2, 2, 0.5, cached=False)
    found, stock = (session(content, library).run(None, feeds)[0] for library in (True, False))
    feeds["mask"] = np.full((1, 1, rows, rows), number, np.float32)
    np.testing.assert_array_equal(found, session(content).run(None, feeds)[0])
    # Of -1e4 the last bit is worth 1e-3, and either may round to another one.
    np.testing.assert_allclose(found, stock, atol=5e-3 if number == -1e4 else 1e-5)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_reach_the_rows_that_see_them(rows: int, bad: float) -> None:
    random = np.random.default_rng(2)
    past = 100
    feeds = random_feeds(random, 1, 2, batch=1, rows=rows, past=past, size=16, value_size=16)
    feeds["mask"] = causal(rows, past)[None, None]
    feeds["query"][0, 0, :16] = bad  # of the first head's first row
    feeds["past_value"][0, 0, 3, 5] = bad
    y = session(model(2, 1, 0.25)).run(["y"], feeds)[0].reshape(rows, 2, 16)
    assert np.isnan(y[0, 0]).all()
    column = y[:, :, 5]
    assert not np.isfinite(column).any()
    others = np.delete(y.reshape(rows * 2, 16)[1:], 5, 1)
    assert np.isfinite(others).all()


def test_no_tokens_at_all_and_no_past() -> None:
    random = np.random.default_rng(3)
    feeds = random_feeds(random, 1, 1, batch=2, rows=0, past=4, size=8, value_size=8)
    feeds["mask"] = np.zeros((1, 1, 0, 4), np.float32)
    y, keys, values = session(model(1, 1, 1.0)).run(None, feeds)
    assert y.shape == (2, 0, 8)
    np.testing.assert_array_equal(keys, feeds["past_key"])
    np.testing.assert_array_equal(values, feeds["past_value"])


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("rows", [0, 2, 40])
def test_an_empty_batch(rows: int, past: int) -> None:
    feeds = random_feeds(np.random.default_rng(3), 2, 2, batch=0, rows=rows, past=past, size=8, value_size=4)
    feeds["mask"] = np.zeros((1, 1, rows, past + rows), np.float32)
    found = session(model(4, 2, 1.0)).run(None, feeds)
    assert [part.shape for part in found] == [(0, rows, 16), (0, 2, past + rows, 8), (0, 2, past + rows, 4)]


class Buffers:
    """A cache in memory that a session writes into."""

    def __init__(self, past: dict[str, Array], room: int) -> None:
        self.arrays = {}
        for name, value in past.items():
            self.arrays[name] = np.full((*value.shape[:2], room, value.shape[3]), np.nan, value.dtype)
            self.arrays[name][:, :, : value.shape[2]] = value

    def run(self, shared: ort.InferenceSession, feeds: dict[str, Array]) -> Array:
        binding = shared.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, array in self.arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        binding.bind_output("y")
        shared.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


@caches
@pytest.mark.parametrize("kernel", claq_runtime.kernels())
def test_a_cache_in_place(kernel: str, cache: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, single tokens and several at once, in buffers that hold NaN where there is no token yet."""
    monkeypatch.setenv("CLAQ_KERNEL", kernel)
    random = np.random.default_rng(6)
    for heads, kv_heads, size, value_size, first in ((9, 3, 64, 64, 1), (4, 2, 33, 16, 70), (2, 2, 8, 5, 2)):
        shared = session(model(heads, kv_heads, 0.2, 2, cache=cache))
        sizes = {"batch": 2, "size": size, "value_size": value_size}
        past = {
            name: np.zeros((2, kv_heads, 0, width), cache)
            for name, width in (("past_key", size), ("past_value", value_size))
        }
        buffers, length = Buffers(past, 150), 0
        for rows in (first, 1, 1, 5, 40, 1, 150 - first - 48):  # the last fills them
            feeds = random_feeds(random, kv_heads, heads // kv_heads, rows=rows, past=0, **sizes)
            feeds |= past | {"mask": causal(rows, length)}
            wanted = written_out(rounded(feeds, cache), heads, kv_heads, 0.2)
            found = buffers.run(shared, {name: feeds[name] for name in INPUTS[:4]})
            np.testing.assert_allclose(found, wanted[0], rtol=2e-5, atol=2e-5, err_msg=f"{rows} after {length}")
            length += rows
            past = {name: value.astype(cache) for name, value in zip(past, wanted[1:], strict=True)}
            for name, value in past.items():
                np.testing.assert_array_equal(buffers.arrays[name][:, :, :length], value)
                assert np.isnan(buffers.arrays[name][:, :, length:]).all()
        assert length == 150
        # No room is left: the outputs that are bound are too short.
        feeds = random_feeds(random, kv_heads, heads // kv_heads, rows=1, past=0, **sizes) | {"mask": causal(1, length)}
        with pytest.raises(Exception, match="present_key"):
            buffers.run(shared, {name: feeds[name] for name in INPUTS[:4]})


def test_keys_that_a_cache_in_float16_cannot_hold_are_infinite_in_library_and_function() -> None:
    feeds = random_feeds(np.random.default_rng(9), 1, 1, np.float16, batch=1, rows=2, past=3, size=8, value_size=8)
    feeds["key"][0, 1, 2], feeds["value"][0, 0, 5] = 7e4, 1e-8
    feeds["mask"] = causal(2, 3)[None, None]
    content = model(1, 1, 1.0, cache=np.float16)
    for library in (True, False):
        _, keys, values = session(content, library).run(None, feeds)
        assert np.isinf(keys[0, 0, 4, 2])
        assert np.isfinite(keys).sum() == keys.size - 1
        assert values[0, 0, 3, 5] == 0


def test_a_cache_of_two_types_is_refused() -> None:
    content = onnx.ModelProto.FromString(model(1, 1, 1.0))
    (value,) = (value for value in content.graph.input if value.name == "past_value")
    value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del content.functions[:]
    with pytest.raises(Exception, match="ClaqCachedAttention"):
        session(content.SerializeToString())


def test_a_mask_without_the_new_tokens_is_refused_where_the_cache_is_not_in_place() -> None:
    feeds = random_feeds(np.random.default_rng(8), 2, 2, batch=1, rows=2, past=6, size=4, value_size=4)
    feeds["mask"] = np.zeros((1, 1, 2, 6), np.float32)
    with pytest.raises(
        Exception,
        match=r"mask: has shape \[1, 1, 2, 6\], expected what broadcasts to \[1, 4, 2, 8\], or present_key and present_value",
    ):
        session(model(4, 2, 1.0)).run(None, feeds)


WRONG = {
    "query": ((1, 2, 15), "query"),
    "key": ((1, 3, 8), "key"),
    "value": ((1, 2, 7), "value"),
    "mask": ((1, 1, 2, 5), "mask"),
    "past_key": ((1, 2, 4, 5), "past_key"),
    "past_value": ((1, 2, 3, 4), "past_value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    random = np.random.default_rng(4)
    feeds = random_feeds(random, 2, 2, batch=1, rows=2, past=4, size=4, value_size=4)
    feeds["mask"] = np.zeros((1, 1, 2, 6), np.float32)
    shape, message = WRONG[name]
    feeds[name] = np.zeros(shape, np.float32)
    with pytest.raises(Exception, match=rf"ClaqCachedAttention: {message}: has shape \[.*expected"):
        session(model(4, 2, 1.0)).run(None, feeds)


def test_shapes_that_do_not_fit_are_named_without_a_cache() -> None:
    feeds = {name: np.zeros((1, 3, 8), np.float32) for name in INPUTS[:3]} | {"mask": np.zeros((1, 4), np.float32)}
    with pytest.raises(
        Exception, match=r"ClaqAttention: mask: has shape \[1, 4\], expected what broadcasts to \[1, 2, 3, 3"
    ):
        session(model(2, 2, 1.0, 2, cached=False)).run(None, feeds)
    feeds["mask"] = np.zeros((1, 3), np.float32)
    feeds["value"] = np.zeros((1, 4, 8), np.float32)
    with pytest.raises(Exception, match=r"ClaqAttention: value: has shape \[1, 4, 8\], expected \[1, 3, 8\]"):
        session(model(2, 2, 1.0, 2, cached=False)).run(None, feeds)


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(Exception, match="node 'node': q_num_heads: is 3, expected a multiple of kv_num_heads = 2"):
        session(model(3, 2, 1.0))


@pytest.mark.parametrize("cached", [True, False])
def test_too_many_heads_are_refused(cached: bool) -> None:
    name = "q_num_heads" if cached else "num_heads"
    with pytest.raises(Exception, match=f"node 'node': {name}: is {2**62}, expected 1 to {2**30}"):
        session(model(2**62, 1, 1.0, cached=cached))


def test_sizes_that_are_too_large_together_are_named() -> None:
    feeds = {name: np.zeros((1, 2**29, 0), np.float32) for name in INPUTS[:3]} | {"mask": np.zeros((1,), np.float32)}
    with pytest.raises(
        Exception, match="ClaqAttention: batch, heads, rows, tokens, key_size or value_size: is too large"
    ):
        session(model(1, 1, 1.0, 1, cached=False)).run(None, feeds)


def test_concurrent_runs() -> None:
    random = np.random.default_rng(5)
    shared = session(model(6, 3, 0.2))
    problems: list[str] = []

    def work(rows: int, past: int) -> None:
        feeds = random_feeds(np.random.default_rng(rows), 3, 2, batch=2, rows=rows, past=past, size=32, value_size=32)
        feeds["mask"] = causal(rows, past)[None, None]
        first = shared.run(None, feeds)
        for _ in range(20):
            for found, wanted in zip(shared.run(None, feeds), first, strict=True):
                if not np.array_equal(found, wanted):
                    problems.append(f"{rows} rows after {past}")

    threads = [threading.Thread(target=work, args=(rows, int(random.integers(300)))) for rows in (1, 3, 20, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_registered_where_the_file_is_opened(tmp_path: Path) -> None:
    """With the library the node stays one node; without it ONNX Runtime runs the function."""
    for library, wanted in ((True, [CACHED_ATTENTION]), (False, ["Attention"])):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        if library:
            claq_runtime.register(options)
        ort.InferenceSession(model(2, 1, 1.0), options, providers=["CPUExecutionProvider"])
        assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == wanted

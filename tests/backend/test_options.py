"""The options: names, types, ranges, contradictions, what is chosen without them, and data that can be read once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_models import Net, compiled, data

import claq_export
from claq_export import Config
from claq_export.backend.options import DEFAULT_OBSERVE, parse_options
from claq_export.errors import CalibrationError, ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 3}, "no option 'bit'; did you mean 'bits'"),
        ({"zzzz": 3}, "no option 'zzzz'; known: .*release_weights"),
        ({"bits": 7}, "bits must be"),
        ({"fallback": "tvm"}, "fallback must be one of inductor, eager"),
        ({"observe": -1}, "observe must be a whole number of at least 0"),
        ({"observe": True}, "observe must be a whole number"),
        ({"release_weights": 1}, "release_weights must be True or False"),
        ({"observe": 3, "calibration": "none"}, "observe and calibration exclude one another"),
        ({"weights": "out", "observe": 3}, "weights and observe exclude one another"),
        ({"weights": 5}, "^weights must be a folder or None, got 5$"),
        ({"fallback": []}, "^fallback must be one of inductor, eager, got"),
        ({"observe_bytes": "1"}, "^observe_bytes must be a whole number, got '1'$"),
        ({"opset": 23}, "^opset is that of an exported file"),
        ({"last_logits": True}, "^last_logits is for an exported file"),
        ({"cache_dtype": "float16"}, "^cache_dtype is for an exported file"),
        ({"dtype": "float16"}, "^dtype is that of an exported graph"),
        ({"tokenizer": 1, "observe": 3}, "^tokenizer is for calibration on text, .* observe"),
        ({"tokenizer": 1, "weights": "out"}, "^tokenizer is for calibration on text, .* weights"),
        ({"tokenizer": 1, "calibration": "none"}, "^tokenizer is for calibration on text, .* calibration='none'"),
        ({"bits": 3, "accuracy": "int8", "weights": "out"}, "^accuracy and bits would say how.*weights='out'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": "4"}, "bits must be 2, 3, 4 or a fraction.*, got '4'"),
        ({"size": "1MB"}, r"size must be a whole number of bytes \(60_000_000\) or None, got '1MB'"),
        ({"floors": []}, r"floors must be a dictionary of .*, got \[\]"),
        ({"floors": {"a": "x"}}, "floors must be a dictionary of .*, got {'a': 'x'}"),
        ({"embedding_bits": "4"}, "embedding_bits must be one of .*, got '4'"),
        ({"importance": 1}, "importance must be True or False, got 1"),
        ({"preset": []}, "preset must be one of claq-4"),
        ({"calibration": 3}, 'calibration must be the name of a file, "default", "none", or an iterable.*, got 3'),
        ({"calibration": None}, "calibration must be .*, got None"),
        ({"calibration": {"x": torch.ones(1)}}, "calibration must be .*, got {'x'"),
        ({"calibration": np.ones((2, 2))}, "calibration must be .*, got array"),
        ({"samples": True}, "samples must be a whole number or None, got True"),
        ({"samples": 1.5}, "samples must be a whole number or None, got 1.5"),
        ({"samples": torch.ones(2)}, "samples must be a whole number or None, got tensor"),
        ({"sequence_length": "5"}, "sequence_length must be a whole number of tokens or None, got '5'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"outliers": None}, "outliers must be a number, got None"),
        ({"outliers": "x"}, "outliers must be a number, got 'x'"),
        ({"outliers": np.ones(2)}, "outliers must be a number, got array"),
        ({"bits": 2.6, "outliers": 0.03}, "outliers does not go with a budget .* which decides itself"),
        ({"size": 90_000, "algorithm": {"outliers": 0.03}}, "outliers does not go with a budget"),
        ({"tune": "a"}, "tune must be a number of minutes or None, got 'a'"),
        ({"token_clip": "q"}, "token_clip must be a number or None, got 'q'"),
        ({"token_clip": 0}, "token_clip must be positive or None, got 0"),
        ({"include": None}, "include must be a name pattern or a list of them, got None"),
        ({"exclude": [3]}, r"exclude must be a name pattern or a list of them, got \[3\]"),
        ({"fuse_siblings": "no"}, "fuse_siblings must be True or False, got 'no'"),
        ({"accuracy": 8}, "accuracy must be one of fp32, int8 or None, got 8"),
        ({"devices": "cpu"}, "devices must be a sequence of at least one name"),
        ({"algorithm": {"fit_outliers": "no"}}, "algorithm setting fit_outliers must be True or False, got 'no'"),
        ({"algorithm": {"widths": 4}}, "algorithm setting widths must be a sequence of whole numbers or None, got 4"),
        ({"algorithm": ["x"]}, "algorithm must be a dictionary"),
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        claq_export.Config(**settings)
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_options(settings)


def test_an_iterator_is_no_list_of_names() -> None:
    with pytest.raises(ConfigError, match="exclude must be a name pattern or a list of them, got <generator"):
        Config(exclude=(name for name in "ab"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("samples", np.int64(3), 3),
        ("seed", torch.tensor(3), 3),
        ("size", 60e6, 60_000_000),
        ("bits", 4, 4),
        ("outliers", np.float32(0.0625), 0.0625),
        ("tune", 0, 0),
        ("token_clip", None, None),
        ("importance", np.bool_(False), False),
        ("calibration", Path("text"), Path("text")),
        ("include", {"b", "a"}, ("a", "b")),
        ("exclude", "lm_head", ("lm_head",)),
        ("floors", {"a": np.int32(3)}, {"a": 3}),
        ("devices", [torch.device("cpu")], ("cpu",)),
        ("algorithm", {"widths": [4, 2], "bits": 3}, {"widths": (4, 2), "bits": 3}),
    ],
)
def test_values_in_types_near_the_fields(name: str, value: Any, wanted: Any) -> None:
    budget = {"bits": 3.5} if name == "floors" else {}
    found = getattr(parse_options({name: value, **budget}).config, name)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize("kind", [list, iter, lambda texts: (text for text in texts), lambda texts: map(str, texts)])
def test_data_is_the_same_data_however_often_the_options_are_read(kind: Any) -> None:
    options = {"calibration": kind(["a", "b"])}
    first, again = parse_options(options), parse_options(options)
    assert first.key == again.key
    assert first.config.calibration is again.config.calibration


def test_a_dataset_is_data() -> None:
    dataset = torch.utils.data.TensorDataset(torch.ones(3, 2))  # has items and no __iter__
    assert parse_options({"calibration": dataset}).config.calibration is dataset


def test_ways_to_calibrate() -> None:
    assert parse_options(None).observe == DEFAULT_OBSERVE
    assert parse_options({"observe": 2}).observe == 2
    assert parse_options({"observe": 0}).config.calibration == "none"
    assert parse_options({"calibration": "none"}).observe == 0
    with_tokenizer = parse_options({"tokenizer": object()})
    assert (with_tokenizer.observe, with_tokenizer.config.calibration) == (0, "default")
    assert parse_options({"weights": "folder"}).observe == 0


def test_names_as_a_list() -> None:
    assert parse_options({"exclude": ["a", "b"]}).config.exclude == ("a", "b")


def test_weights_serve_the_settings_they_were_made_with() -> None:
    key = parse_options({"bits": 3}).key
    assert key == parse_options({"bits": 3, "fallback": "eager", "release_weights": True}).key
    assert key != parse_options({"bits": 4}).key
    assert key != parse_options({"bits": 3, "calibration": "none"}).key


def passing(batches: list[torch.Tensor], read: list[weakref.ref[torch.Tensor]] | None = None) -> Iterator[torch.Tensor]:
    """The batches one by one, held by nobody here once they are given, and weak references to those that were read."""
    while batches:
        if read is not None:
            read.append(weakref.ref(batches[0]))
        yield batches.pop(0)


class TestDataThatCanBeReadOnce:
    @pytest.fixture(autouse=True)
    def no_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_a_generator_serves_weights_that_change(self) -> None:
        model, x = Net(), data(1, seed=9)[0]
        run = compiled(model, calibration=passing(data()))
        before = run(x)
        model.blocks[0].q.weight.mul_(2)
        changed = run(x)
        assert not torch.equal(changed, before)
        torch.testing.assert_close(changed, compiled(model, calibration=data())(x), rtol=1e-5, atol=1e-5)

    def test_what_was_read_goes_with_the_compiled_function(self) -> None:
        model, read = Net(), list[weakref.ref[torch.Tensor]]()
        run = compiled(model, calibration=passing(data(5), read), samples=3)
        run(data(1)[0])
        gc.collect()
        assert len(read) == 3
        assert all(batch() is not None for batch in read)
        del run
        torch._dynamo.reset()
        gc.collect()
        assert all(batch() is None for batch in read)

    def test_an_iterator_that_is_used_up_is_an_error_that_says_so(self) -> None:
        model, x = Net(), data(1, seed=9)[0]
        run = compiled(model, calibration=map(torch.clone, data()))
        run(x)
        model.blocks[0].q.weight.mul_(2)
        with pytest.raises(CalibrationError, match=r"iterator gives nothing: .* was read before, .* give a list"):
            run(x)

    def test_options_that_live_no_longer_than_the_graph(self) -> None:
        model, x = Net(), data(1, seed=9)[0]
        torch._dynamo.reset()

        def backend(graph: Any, inputs: Any) -> Any:
            options = {"fallback": "eager", "progress": False, "calibration": passing(data())}
            return claq_export.backend.claq(graph, inputs, options=options)

        expected = compiled(Net(), calibration=data())(x)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected, rtol=1e-5, atol=1e-5)

    def test_a_failure_while_reading_is_not_the_end_of_the_data(self) -> None:
        def broken() -> Iterator[torch.Tensor]:
            yield data(1)[0]
            raise OSError("disk")

        options = {"calibration": broken()}
        replay = parse_options(options).config.calibration
        with pytest.raises(OSError, match="disk"):
            list(replay)
        with pytest.raises(CalibrationError, match="gives nothing"):
            list(replay)

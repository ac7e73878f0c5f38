"""Capturing modules given in Python: names, nesting, dynamic axes, other sizes, and modules that cannot be captured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from claq_export.capture import capture_module
from claq_export.errors import CaptureError, ConfigError


class Mixer(nn.Module):
    """Two tensors, a flag, a keyword, and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 12, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(12.0))
        self.register_buffer("scratch", torch.ones(12), persistent=False)

    def forward(self, x, mask=None, flag=True, *, factor=2.0):
        y = self.second(self.drop(torch.relu(self.first(x)))) * factor + self.table * self.scratch
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        return {"hidden": y, "pooled": y.mean(1)} if flag else y


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def same(captured, model, inputs):
    with torch.no_grad():
        expected = model.eval()(**inputs)
    expected = list(expected.values()) if isinstance(expected, dict) else [expected]
    found = captured.run(inputs)
    assert len(found) == len(expected)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_names_axes_and_numbers_at_other_sizes():
    model = Mixer()
    captured = capture_module(model, {"x": torch.randn(2, 5, 12), "mask": torch.ones(2, 5)})
    assert captured.input_names == ("x", "mask")
    assert captured.output_names == ("hidden", "pooled")
    assert captured.dynamic_axes["x"] == {0: "batch", 1: "sequence"}
    assert set(captured.dynamic_axes["mask"]) == {0, 1}
    assert captured.task is None
    assert captured.source.path.endswith("Mixer")
    for batch, length in [(1, 1), (2, 5), (7, 3)]:
        assert same(captured, model, {"x": torch.randn(batch, length, 12), "mask": torch.rand(batch, length)})


def test_parameters_keep_names_and_memory():
    model = Mixer()
    captured = capture_module(model, torch.randn(2, 5, 12))
    state = captured.graph_module.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in state.items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()
    targets = {node.target for node in captured.graph_module.graph.nodes if node.op == "get_attr"}
    assert targets == {*state, "scratch"}


def test_no_guards_and_no_modules_in_the_graph():
    captured = capture_module(Mixer(), torch.randn(2, 5, 12))
    assert {node.op for node in captured.graph_module.graph.nodes} <= {
        "placeholder",
        "get_attr",
        "call_function",
        "output",
    }
    assert not [node for node in captured.graph_module.graph.nodes if "assert" in str(node.target)]


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model = Mixer().train()
    model.second.eval()
    captured = capture_module(model, torch.randn(2, 5, 12))
    assert model.training
    assert model.drop.training
    assert not model.second.training
    x = torch.randn(3, 4, 12)
    assert all(torch.equal(a, b) for a, b in zip(captured.run({"x": x}), captured.run({"x": x}), strict=True))


def test_example_of_batch_one_stays_dynamic():
    captured = capture_module(Mixer(), torch.randn(1, 1, 12))
    assert captured.dynamic_axes == {"x": {0: "batch", 1: "sequence"}}
    assert captured.run({"x": torch.randn(4, 9, 12)})[0].shape == (4, 9, 12)


def test_constants_and_keywords_are_held():
    model = Mixer()
    captured = capture_module(model, {"x": torch.randn(2, 5, 12), "flag": False, "factor": 3.0})
    assert captured.input_names == ("x",)
    assert captured.output_names == ("output",)
    x = torch.randn(3, 4, 12)
    with torch.no_grad():
        assert torch.equal(captured.run({"x": x})[0], model.eval()(x, flag=False, factor=3.0))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, *pair, extras):
        return self.proj(pair[0]) + pair[1]["bias"] + extras[0], (extras[1],)


def test_nested_arguments_become_flat_inputs():
    a, b, c, d = (torch.randn(3, 4) for _ in range(4))
    model = Nested().eval()
    captured = capture_module(
        _Bound(model), {"a": a, "rest": {"bias": b}, "extras": [c, d]}, output_names=["sum", "passed"]
    )
    assert captured.input_names == ("a", "rest_bias", "extras_0", "extras_1")
    assert captured.output_names == ("sum", "passed")
    found = captured.run(dict(zip(captured.input_names, (a, b, c, d), strict=True)))
    with torch.no_grad():
        assert torch.equal(found[0], model(a, {"bias": b}, extras=[c, d])[0])
    assert torch.equal(found[1], d)


class _Bound(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a, rest, extras):
        return self.inner(a, rest, extras=extras)


def test_own_names():
    captured = capture_module(Mixer(), torch.randn(2, 5, 12), input_names=["input"], output_names=["last", "mean"])
    assert captured.input_names == ("input",)
    assert captured.output_names == ("last", "mean")
    assert captured.run({"input": torch.randn(1, 2, 12)})[0].shape == (1, 2, 12)


def test_asked_for_axes_only():
    captured = capture_module(Mixer(), torch.randn(2, 5, 12), dynamic_shapes={"x": {1: torch.export.Dim("frames")}})
    assert captured.dynamic_axes == {"x": {1: "frames"}}
    assert captured.dynamic_shapes == {"x": {1: "frames"}}
    static = capture_module(Mixer(), torch.randn(2, 5, 12), dynamic_shapes={})
    assert static.dynamic_axes == {"x": {}}


def test_batch_and_sequence_of_equal_size_stay_apart():
    captured = capture_module(Mixer(), torch.randn(3, 3, 12))
    assert captured.dynamic_axes == {"x": {0: "batch", 1: "sequence"}}
    assert captured.run({"x": torch.randn(2, 7, 12)})[0].shape == (2, 7, 12)


def test_captured_graph_is_captured_again():
    captured = capture_module(Mixer(), torch.randn(2, 5, 12))
    again = torch.export.export(
        captured.graph_module, (), kwargs=captured.example_inputs, dynamic_shapes=captured.export_shapes
    )
    x = torch.randn(6, 3, 12)
    assert torch.equal(again.module()(x=x)[0], captured.run({"x": x})[0])


def test_tied_weights_are_listed_as_aliases():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    captured = capture_module(Tied(), torch.randint(0, 11, (2, 3)))
    assert captured.aliases == {"embed.weight": ("head.weight",), "head.weight": ("embed.weight",)}
    assert len(captured.graph_module.state_dict()) == 1


def test_source_digest_follows_the_weights():
    model = Mixer()
    before = capture_module(model, torch.randn(2, 5, 12)).source
    assert capture_module(model, torch.randn(2, 5, 12)).source == before
    with torch.no_grad():
        model.first.weight[0, 0] += 1
    assert capture_module(model, torch.randn(2, 5, 12)).source.sha256 != before.sha256


def test_regions_without_gradients_or_autocast_are_inlined():
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                with torch.enable_grad():
                    y = self.first(x.float())
                y = torch.relu(y)
            with torch.no_grad():
                return self.second(y)

    model = Regions()
    captured = capture_module(model, torch.randn(3, 8))
    targets = [str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.linear.default") == 2
    assert not [target for target in targets if "wrap_with" in target]
    assert same(captured, model, {"x": torch.randn(5, 8)})


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        y = self.proj(x)
        if y.sum() > 0:
            return y
        return -y


class LeavesTorch(Branches):
    def forward(self, x):
        return torch.from_numpy(self.proj(x).numpy())


class Broken(Branches):
    def forward(self, x):
        return self.proj(x) + self.absent


def test_data_dependent_control_flow_is_explained(capfd):
    with pytest.raises(
        CaptureError, match=r"cannot capture Branches: its control flow depends on tensor values"
    ) as info:
        capture_module(Branches(), torch.randn(3, 8))
    message = str(info.value)
    assert "if y.sum() > 0:" in message
    assert "test_module.py:" in message
    assert len(message.splitlines()) <= 2
    assert "torch.where" in message
    printed = capfd.readouterr()
    assert "forward" not in printed.out + printed.err


def test_unsupported_code_is_named():
    with pytest.raises(
        CaptureError, match=r"cannot capture LeavesTorch: .*numpy.* at test_module.py:\d+: `return torch"
    ):
        capture_module(LeavesTorch(), torch.randn(3, 8))


def test_failing_forward_is_reported_with_its_line():
    with pytest.raises(CaptureError, match=r"Broken fails on the example inputs: .*absent.* at test_module.py:\d+"):
        capture_module(Broken(), torch.randn(3, 8))


def test_axis_that_cannot_be_dynamic_is_named():
    with pytest.raises(CaptureError, match=r"axis 2 of x cannot be dynamic, the model needs it to be 12"):
        capture_module(Mixer(), torch.randn(2, 5, 12), dynamic_shapes={"x": {2: "features"}})


class Forgets(nn.Module):
    """Bakes the size of its example into the graph."""

    def forward(self, x):
        return x + torch.ones(x.shape[0]).sum().new_tensor(float(int(x.shape[0])))


def test_size_fixed_while_tracing_is_noticed():
    with pytest.raises(CaptureError, match=r"cannot be dynamic|disagrees with the model"):
        capture_module(Forgets(), torch.randn(3, 8), dynamic_shapes={"x": {0: "batch"}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": None}, "needs example inputs"),
        ({"example_inputs": 3}, "must be a tensor, a tuple or a dict, got int"),
        ({"example_inputs": ("text",)}, "hold no tensor"),
        ({"dynamic_shapes": {"y": {0: "batch"}}}, "'y', which is no input; inputs: x"),
        ({"dynamic_shapes": {"x": {5: "batch"}}}, "axis 5 of 'x', which has 3 axes"),
        ({"dynamic_shapes": ({}, {})}, "2 entries for 1 input tensors"),
        ({"input_names": ["a", "b"]}, "2 input names were given for 1"),
        ({"input_names": ["a.b"]}, "'a.b' must be letters"),
        ({"output_names": ["a"]}, "1 output names were given for 2"),
        ({"output_names": ["a", "a"]}, "must differ"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        capture_module(Mixer(), **{"example_inputs": torch.randn(2, 5, 12), **arguments})


def test_inputs_that_forward_does_not_take():
    with pytest.raises(CaptureError, match=r"do not fit Mixer.forward.*'x'"):
        capture_module(Mixer(), {"y": torch.randn(2, 5, 12)})


def test_what_is_no_module():
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got function"):
        capture_module(lambda x: x, torch.randn(2))


def test_tokens_of_a_model_without_tokens():
    captured = capture_module(Mixer(), torch.randn(2, 5, 12))
    with pytest.raises(ConfigError, match="does not read tokens: its inputs are x"):
        captured.inputs_from_tokens(torch.ones(1, 3, dtype=torch.int64))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, query, key, value):
        return torch.softmax(self.query(query) @ self.key(key).transpose(1, 2), -1) @ value


@pytest.mark.parametrize("given", ["one tensor", "views"])
def test_a_tensor_given_for_several_inputs_is_several_inputs(given):
    x = torch.randn(2, 5, 8)
    model = Attends()
    captured = capture_module(model, (x, x, x) if given == "one tensor" else tuple(x.view(2, 5, 8) for _ in range(3)))
    assert len({tensor.data_ptr() for tensor in captured.example_inputs.values()}) == 3
    assert same(captured, model, {name: torch.randn(3, 7, 8) for name in ("query", "key", "value")})


def test_inputs_of_equal_values_are_compared_with_others(monkeypatch):
    monkeypatch.setattr("claq_export.capture.module._copy_shared", lambda leaves, positions: frozenset({1, 2}))
    x = torch.randn(2, 5, 8)
    with pytest.raises(CaptureError, match="disagrees with the model"):
        capture_module(Attends(), (x, x, x))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x, shift):
        return self.proj(x) + shift


@pytest.mark.parametrize("batches", [(2, 1), (1, 2), (3, 1)])
def test_a_broadcast_axis_stays_of_size_one(batches):
    model = Adds()
    example = {name: torch.randn(size, 5, 8) for name, size in zip(("x", "shift"), batches, strict=True)}
    captured = capture_module(model, example)
    one, other = sorted(example, key=lambda name: example[name].shape[0])
    assert captured.dynamic_axes == {one: {1: "sequence"}, other: {0: "batch", 1: "sequence"}}
    assert captured.given_inputs is None
    assert same(captured, model, example)


def test_axes_of_size_one_that_are_free_grow():
    model = Attends()
    example = {"query": torch.randn(2, 1, 8), "key": torch.randn(2, 7, 8), "value": torch.randn(2, 7, 8)}
    captured = capture_module(model, example)
    assert set(captured.dynamic_axes["query"]) == {0, 1}
    assert captured.given_inputs["query"] is example["query"]
    assert same(captured, model, {**example, "query": torch.randn(2, 4, 8)})


def test_axes_that_are_asked_for_are_repeated_as_before():
    example = {"x": torch.randn(2, 5, 8), "shift": torch.randn(1, 5, 8)}
    captured = capture_module(Adds(), example, {name: {0: "batch"} for name in example})
    assert captured.dynamic_axes == {"x": {0: "batch"}, "shift": {0: "batch"}}
    assert captured.given_inputs is None  # it has two sizes for one axis


class Collapses(Adds):
    def forward(self, x):
        return self.proj(x) if x.shape[1] > 1 else self.proj(x[:, 0])


def test_what_differs_at_size_one_is_captured_at_size_one():
    model, x = Collapses(), torch.randn(2, 1, 8)
    captured = capture_module(model, x)
    assert captured.dynamic_axes == {"x": {0: "batch"}}
    assert captured.run({"x": x})[0].shape == (2, 8)


@dataclasses.dataclass
class Parts:
    first: torch.Tensor
    rest: object


class Returns(Adds):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(self.proj(x))


def test_dataclasses_are_results():
    model = Returns(lambda y: Parts(y, [Parts(y + 1, None)]))
    captured = capture_module(model, torch.randn(2, 8))
    x = torch.randn(3, 8)
    assert captured.output_names == ("first", "output_1")
    torch.testing.assert_close(captured.run({"x": x}), (model.proj(x), model.proj(x) + 1))
    assert capture_module(Returns(lambda y: Parts(y, y)), x).output_names == ("first", "rest")


class Opaque:
    pass


def test_a_result_without_tensors_is_named():
    with pytest.raises(CaptureError, match="returns no tensor but a Opaque"):
        capture_module(Returns(lambda y: Opaque()), torch.randn(2, 8))

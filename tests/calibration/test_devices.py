"""Several devices in one process: work runs at once, and the artifact is that of a single device, byte for byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import claq_export
from claq_export.algorithm import Hessian
from claq_export.calibration import stage
from claq_export.calibration.devices import Devices
from claq_export.calibration.walk import NodeWalk
from claq_export.capture import capture_module
from claq_export.errors import CalibrationError, ConfigError
from claq_export.passes import PassContext, planning_pipeline


class TestDevices:
    @pytest.mark.parametrize("names", [["cpu"], ["cpu"] * 3])
    def test_map_keeps_the_order(self, names: list[str]) -> None:
        devices = Devices(names)
        assert list(devices.map(lambda item, device: (item, str(device)), range(20))) == [(i, "cpu") for i in range(20)]

    @pytest.mark.parametrize("names", [["cpu"], ["cpu"] * 3])
    def test_each_gives_every_result_once(self, names: list[str]) -> None:
        assert sorted(Devices(names).each(lambda item, _: item * item, list(range(20)))) == [
            (i, i * i) for i in range(20)
        ]

    def test_work_runs_at_once(self) -> None:
        meeting = threading.Barrier(3, timeout=60)  # passed by three threads together or by none
        assert sorted(number for number, _ in Devices(["cpu"] * 3).each(lambda *_: meeting.wait(), range(6))) == [
            *range(6)
        ]

    def test_items_are_taken_as_devices_become_free(self) -> None:
        taken: list[int] = []

        def items() -> Iterator[int]:
            for item in range(10):
                taken.append(item)
                yield item

        results = Devices(["cpu"] * 2).map(lambda item, _: item, items())
        next(results)
        assert len(taken) <= 3
        assert list(results) == [*range(1, 10)]

    @pytest.mark.parametrize("call", ["map", "each"])
    def test_an_error_stops_the_rest(self, call: str) -> None:
        begun: list[int] = []

        def work(item: int, _: torch.device) -> int:
            begun.append(item)
            if item == 1:
                raise CalibrationError("item 1")
            time.sleep(0.2)
            return item

        with pytest.raises(CalibrationError, match="item 1"):
            list(getattr(Devices(["cpu"] * 2), call)(work, range(100)))
        assert len(begun) < 100

    def test_workers_record_no_gradients_and_use_as_many_threads(self) -> None:
        seen = list(Devices(["cpu"] * 2).map(lambda *_: (torch.is_grad_enabled(), torch.get_num_threads()), range(4)))
        assert seen == [(False, torch.get_num_threads())] * 4


def test_merged_hessians_are_the_sum_of_calls() -> None:
    groups = [torch.randn(37, 48) * 10**i for i in range(3)]
    whole, merged = Hessian(48), Hessian(48)
    for rows in groups:
        whole.add(rows)
        part = Hessian(48)
        part.add(rows)
        merged.merge(part)
    assert torch.equal(whole.matrix, merged.matrix)
    assert whole.tokens == merged.tokens
    with pytest.raises(CalibrationError, match="47 inputs"):
        whole.merge(Hessian(47))


class Block(nn.Module):
    """A table, siblings, and what a graph makes on the device it was captured on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 64)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.LayerNorm(64)
        self.out = nn.Linear(64, 96)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + torch.arange(ids.shape[1], device=ids.device, dtype=x.dtype)[:, None] / 100
        q, k, v = (projection(x)[:, None] for projection in (self.q, self.k, self.v))  # one head
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.out(self.norm(x))


def export(folder: Path, devices: tuple[str, ...], **settings: object) -> dict[str, bytes]:
    torch.manual_seed(0)
    ids = [torch.randint(0, 500, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(9)]
    config = claq_export.Config(
        **{"calibration": ids, "outliers": 0.01, "fuse_siblings": False, "devices": devices, **settings}
    )
    folder.mkdir()
    claq_export.export(Block().eval(), ids[0], out=folder / "model.onnx", config=config, verify=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": 3, "calibration": "none"},
        {"bits": 3.4, "outliers": 0.0},
        {"bits": 3, "fuse_siblings": True},
    ],
    ids=["siblings", "no-calibration", "budget", "stacked"],
)
def test_the_artifact_does_not_depend_on_the_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    threads: set[str] = set()
    two_workers = threading.Event()

    def noted(call):
        def wrapper(*args, **kwargs):
            threads.add(threading.current_thread().name)
            if len(threads) > 2:
                two_workers.set()
            elif threading.current_thread() is not threading.main_thread():
                # A worker that is done at once may be given the next piece too: hold the first until another has begun.
                two_workers.wait(timeout=1)
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(stage, "_TOKENS_AT_ONCE", 256)  # several groups for the Hessians
    monkeypatch.setattr(stage, "quantize_layer", noted(stage.quantize_layer))
    monkeypatch.setattr(stage.Hessian, "add", noted(stage.Hessian.add))
    alone = export(tmp_path / "one", ("cpu",), **settings)
    assert threads == {"MainThread"}
    together = export(tmp_path / "three", ("cpu", "cpu", "cpu"), **settings)
    assert len(threads) > 2  # the main thread and at least two workers
    assert alone == together


def test_the_walk_runs_on_its_device() -> None:
    """Tensors without values that claim to be on a GPU: an operator that mixes devices raises, as on a real one."""
    model = Block().eval()
    ids = torch.randint(0, 500, (2, 16))
    captured = capture_module(model, (ids,))
    context = PassContext()
    planning_pipeline(fuse_siblings=False).run(captured.graph_module, context)
    nodes = [node for site in context.plan.sites for node in site.nodes]
    assert len(nodes) == 4
    seen: list[list[torch.device]] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = [{"ids": torch.empty(2, 16, dtype=torch.int64)} for _ in range(2)]
        for new in (lambda node: None, lambda node: torch.empty(node.args[1].meta["val"].shape)):

            def visit(node, inputs, new=new):
                seen.append([x.device for x in inputs])
                return new(node)

            NodeWalk(captured.graph_module, batches, nodes, device=torch.device("cuda:0")).run(visit)
    assert seen == [[torch.device("cuda:0")] * 2] * 8


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("warp",), "'warp' is not one that PyTorch knows"),
        (("cpu", "meta"), "'meta': claq quantizes on cpu and cuda"),
        ((), "at least one name"),
        ("cpu", "a sequence of at least one name"),
    ],
)
def test_wrong_devices_are_named(devices: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        claq_export.Config(devices=devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'cuda:1' is not there: CUDA is not available"):
        claq_export.Config(devices=("cuda:1",))


def test_devices_of_two_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert claq_export.Config(devices=("cuda:0", "cuda:1")).devices == ("cuda:0", "cuda:1")
    with pytest.raises(ConfigError, match="'cuda:2' is not there: PyTorch sees 2 CUDA devices"):
        claq_export.Config(devices=("cuda:2",))
    with pytest.raises(ConfigError, match="of one type, got cpu, cuda:0"):
        claq_export.Config(devices=("cpu", "cuda:0"))

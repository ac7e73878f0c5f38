"""Two processes (gloo) calibrate one model and end with what one process ends with."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from claq_export.calibration.peers import Peers
from claq_export.errors import CalibrationError
from claq_export.format.checkpoint import load_checkpoint

_PROGRAM = """
import sys
sys.path[:0] = sys.argv[4:]
import torch
import claq_export
import claq_export.calibration.stage as stage
stage._TOKENS_AT_ONCE = 32
torch.manual_seed(0)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))
        self.o = torch.nn.Linear(64, 96)
    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
batches = [torch.randn(16, 64) for _ in range(9)]
config = claq_export.Config(
    bits=3, calibration=batches, fuse_siblings=False, outliers=0.01, devices=tuple(sys.argv[2].split(","))
)
result = claq_export.export(Model(), torch.randn(4, 64), out=sys.argv[1], config=config, verify=sys.argv[3] == "verify")
print(len(result.layers), result.artifact_bytes)
"""


_FAILED = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
import claq_export
import claq_export.verify
def fail(*_, **__):
    raise claq_export.errors.VerificationError("it deviates")
claq_export.verify.verify_artifact = fail
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
try:
    claq_export.export(model, torch.randn(4, 64), out=sys.argv[1], config=claq_export.Config(calibration="none"))
except claq_export.ClaqError as error:
    print(type(error).__name__, error)
"""


_SUM = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from claq_export.algorithm import Hessian
from claq_export.calibration.peers import Peers
peers = Peers.from_environment()
tokens = torch.randn(512, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 97.0)
found = []
for few in (True, False):
    mine = tokens[:40].repeat(1, 40) if few else tokens
    hessian = Hessian(96 * (40 if few else 1))
    for part in mine.chunk(4)[peers.rank :: peers.size]:
        hessian.add(part)
    peers.add_up(hessian)
    found.append([hessian.tokens, *hessian.matrix.diagonal().tolist()[:96], float(hessian.matrix.square().sum().sqrt())])
print(*(" ".join(map(str, values)) for values in found), sep=";")
"""

_ENDED = """
import sys
sys.path[:0] = sys.argv[1:]
import os
import torch
from claq_export.calibration.peers import Peers, _end_group
def threads():
    names = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)
peers = Peers.from_environment()
peers.tell("values")
torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
running = threads()
_end_group()
print(running, threads())
"""


def run(out: Path, size: int, devices: str = "cpu", verify: bool = False) -> list[str]:
    """Export in ``size`` processes; what each printed last."""
    out.parent.mkdir()
    return in_processes(_PROGRAM, size, str(out), devices, "verify" if verify else "")


def in_processes(program: str, size: int, *arguments: str) -> list[str]:
    """Run a program in ``size`` processes of one group; the last line of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if size > 1:
            environment |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, "-c", program, *arguments, *sys.path]
        children.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = []
    for child in children:
        output, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors
        outputs.append(output.strip().splitlines()[-1])
    return outputs


@pytest.fixture(scope="module")
def summed():
    """What one process printed, and each of two."""
    return [*in_processes(_SUM, 1), *in_processes(_SUM, 2)]


@pytest.mark.parametrize(("number", "tokens"), enumerate(["few", "many"]), ids=["few", "many"])
def test_hessians_are_summed_over_processes(summed, number, tokens):
    """Kept as sums or as the tokens themselves, every process ends with the Hessian of all tokens."""
    alone, first, second = (output.split(";")[number] for output in summed)
    assert first == second
    expected, got = (torch.tensor([float(word) for word in line.split()]) for line in (alone, first))
    assert got[0] == expected[0] == {"few": 40, "many": 512}[tokens]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_threads_of_a_group_end_with_it():
    """One that still ran when the interpreter ended could abort the process, after the artifact was written."""
    for output in in_processes(_ENDED, 2):
        running, left = map(int, output.split())
        assert running > 0
        assert left == 0


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of a verified artifact made by two processes, and what each of them printed."""
    folder = tmp_path_factory.mktemp("peers") / "two"
    return folder, run(folder / "model.onnx", 2, verify=True)


def test_two_processes_end_with_what_one_ends_with(of_two, tmp_path):
    (alone,) = run(tmp_path / "one" / "model.onnx", 1)
    folder, together = of_two
    assert together[0] == together[1]
    assert together[0].split()[0] == alone.split()[0] == "4"
    one, two = load_checkpoint(tmp_path / "one"), load_checkpoint(folder)
    for name, layer in one.layers.items():
        expected, got = layer.dequantize(), two.layers[name].dequantize()
        # A sum in another order can move a weight to the neighbouring centroid, here and there.
        assert float((expected - got).norm() / expected.norm()) < 1e-2, name
    assert not list(folder.glob(".*"))
    assert json.loads((folder / "claq.json").read_text())["format"] == "claq"


def test_all_processes_are_told_of_a_failed_verification(tmp_path):
    first, second = in_processes(_FAILED, 2, str(tmp_path / "model.onnx"))
    assert first == "VerificationError it deviates"
    assert second == "OutputError the process that writes the artifact failed: it deviates"


def test_processes_with_several_devices_each_end_with_the_same_bytes(of_two, tmp_path):
    one, several = of_two[0], tmp_path / "several"
    run(several / "model.onnx", 2, "cpu,cpu")
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in several.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (several / name).read_bytes(), name


@pytest.mark.parametrize(
    ("place", "processes", "expected"),
    [(0, 1, ["a", "b", "c"]), (0, 2, ["a", "c"]), (1, 2, ["b"]), (4, 5, ["b"])],
)
def test_processes_of_a_machine_share_its_devices(monkeypatch, place, processes, expected):
    monkeypatch.setenv("LOCAL_RANK", str(place))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert list(Peers(place, max(processes, 2)).devices(("a", "b", "c"))) == expected


def test_groups_of_tokens_stay_together():
    batches = [{"ids": torch.zeros(4, 8, dtype=torch.int64)} for _ in range(7)]
    shares = [Peers(rank, 2).share(batches, 64) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 3]
    assert {id(batch) for share in shares for batch in share} == {id(batch) for batch in batches}
    with pytest.raises(CalibrationError, match="9 processes need as many groups"):
        Peers(0, 9).share(batches, 64)

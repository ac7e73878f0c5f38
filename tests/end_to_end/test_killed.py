"""Exports that are killed at any moment go on with the same command and end the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import claq_export
from claq_export.algorithm import ColumnPlan
from claq_export.calibration.store import LayerStore
from claq_export.errors import FormatError, OutputError
from claq_export.format.checkpoint import load_checkpoint, save_checkpoint

PROGRAM = Path(__file__).with_name("kill_export.py")


@pytest.mark.parametrize(("model", "seconds", "kills"), [("module", 8, 4), ("sharded", 10, 2)])
def test_killed_at_random_moments(model, seconds, kills):
    options = [f"--seconds={seconds}", f"--seed={os.getpid()}", f"--most-kills={kills}", "--captured"]
    command = [sys.executable, PROGRAM, "--model", model, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["rounds"] >= 1
    assert counts["repeated"] == 0


def test_a_marker_that_was_never_finished_is_no_obstacle(tmp_path):
    (tmp_path / ".claq-run.json.1234.tmp").write_text('{"mo')
    LayerStore(tmp_path, {"model": "a"}).close()
    assert json.loads((tmp_path / "claq-run.json").read_text()) == {"model": "a"}


def test_a_removal_that_was_killed_leaves_a_folder_to_go_on_with(tmp_path):
    store = LayerStore(tmp_path / "work", {"model": "a"})
    store.save_plans({"x": ColumnPlan(torch.tensor([4, 2], dtype=torch.uint8), torch.tensor([0, 1]))})
    store._discard_layers()
    store.close()
    again = LayerStore(tmp_path / "work", {"model": "a"}, resume=True)
    assert again.load_plans() is None
    again.remove()
    assert not (tmp_path / "work").exists()


def test_plans_come_back(tmp_path):
    plan = ColumnPlan(torch.tensor([4, 2, 3], dtype=torch.uint8), torch.tensor([0, 1, 7]))
    store = LayerStore(tmp_path, {"model": "a"})
    store.save_plans({"a.b": plan})
    found = store.load_plans()
    assert torch.equal(found["a.b"].bits, plan.bits)
    assert torch.equal(found["a.b"].reserve, plan.reserve)


def test_changes_are_named_and_nothing_is_thrown_away_unasked(tmp_path):
    LayerStore(tmp_path, {"model": "0" * 64, "setting bits": "4"}).close()
    keep = tmp_path / f"{'0' * 24}.safetensors"
    keep.write_bytes(b"x")
    with pytest.raises(OutputError, match=r"model; setting bits \(4 -> 3\)\. --no-resume discards"):
        LayerStore(tmp_path, {"model": "1" * 64, "setting bits": "3"})
    assert keep.exists()
    LayerStore(tmp_path, {"model": "1" * 64, "setting bits": "3"}, resume=False).close()
    assert not keep.exists()


def test_an_unchanged_run_is_discarded_when_that_is_asked_for(tmp_path):
    plan = ColumnPlan(torch.tensor([4, 2], dtype=torch.uint8), torch.tensor([0, 1]))
    store = LayerStore(tmp_path, {"model": "a"})
    store.save_plans({"x": plan})
    store.close()
    again = LayerStore(tmp_path, {"model": "a"}, resume=False)
    assert again.load_plans() is None
    again.save_plans({"x": plan})
    again.close()
    assert LayerStore(tmp_path, {"model": "a"}).load_plans() is not None


def test_files_of_others_survive_the_work_folder(tmp_path):
    store = LayerStore(tmp_path, {"model": "a"})
    store.save_plans({"x": ColumnPlan(torch.tensor([4, 2], dtype=torch.uint8), torch.tensor([0, 1]))})
    (tmp_path / "0123456789abcdef01234567.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "1_Pooling").mkdir()
    store.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_Pooling", "model.safetensors"]


def test_one_process_at_a_time(tmp_path):
    store = LayerStore(tmp_path, {"model": "a"})
    with pytest.raises(OutputError, match="in use by another process"):
        LayerStore(tmp_path, {"model": "a"})
    store.close()
    LayerStore(tmp_path, {"model": "a"}).close()


_BEGINS = """
import sys, time
from claq_export.calibration.store import LayerStore
from claq_export.errors import OutputError
sys.stdin.readline()
try:
    store = LayerStore(sys.argv[1], {"model": "a"})
    print("owns", flush=True)
    sys.stdin.readline()
except OutputError as error:
    print(error, flush=True)
"""


def test_of_processes_that_begin_at_once_one_owns_the_folder(tmp_path):
    program = [sys.executable, "-c", _BEGINS]
    others = [
        subprocess.Popen([*program, tmp_path / "work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for other in others:
        other.stdin.write("\n")
        other.stdin.flush()
    said = [other.stdout.readline() for other in others]
    for other in others:
        other.communicate("\n")
    assert sum(line == "owns\n" for line in said) == 1, said


def test_a_marker_written_by_another_process_meanwhile_is_seen(tmp_path, monkeypatch):
    """The other one begins between this one's look into the empty folder and its lock."""
    look, began = LayerStore._earlier_run, []

    def slow_look(self):
        found = look(self)
        if not began:
            began.append(None)
            began.append(LayerStore(tmp_path, {"model": "a"}))
        return found

    monkeypatch.setattr(LayerStore, "_earlier_run", slow_look)
    with pytest.raises(OutputError, match="in use by another process"):
        LayerStore(tmp_path, {"model": "a"})
    began.pop().close()


def test_a_folder_of_others_is_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not a work folder"):
        LayerStore(tmp_path, {"model": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_pair_of_two_exports_is_refused(tmp_path):
    from quantized_layers import random_layer

    for folder, size in (("a", 24), ("b", 40)):
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder, {"fc": random_layer(32, 16)}, {"other": torch.zeros(size)}, {})
    save_checkpoint(tmp_path / "b", {"fc": random_layer(32, 16)}, {"other": torch.zeros(4)}, {}, accuracy_level=4)
    (tmp_path / "a" / "claq.json").write_bytes((tmp_path / "b" / "claq.json").read_bytes())
    with pytest.raises(FormatError, match="from two exports"):
        load_checkpoint(tmp_path / "a")


_KILLED_BETWEEN_RENAMES = """
import os, shutil, signal, sys
import torch
folder, count = sys.argv[1], int(sys.argv[2])
moments = [int(word) for word in sys.argv[3 : 3 + count]]
sys.path[:0] = sys.argv[3 + count :]
import claq_export

def export(out):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
    claq_export.export(model, torch.randn(2, 64), out=out, verify=False,
                       config=claq_export.Config(bits=2, calibration="none"))

def in_child(out, left):
    pid = os.fork()
    if pid == 0:
        replace = os.replace
        def dying(source, target):
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            replace(source, target)
        os.replace = dying
        try:
            export(out)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

export(f"{folder}/imports/model.onnx")  # once here, so that children find everything imported
for moment in moments:
    killed = in_child(f"{folder}/{moment}/model.onnx", moment)
    assert killed == -signal.SIGKILL, (moment, killed)
    shutil.copytree(f"{folder}/{moment}", f"{folder}/{moment}-killed")
    finished = in_child(f"{folder}/{moment}/model.onnx", 99)
    assert finished == 0, (moment, finished)
"""
_MOMENTS = (0, 1, 4, 7)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """A folder of artifacts: ``before``, and for each moment ``<renames>-killed``, what a killed replacement of a copy left of
    it, and ``<renames>``, what the replacement that followed made of that. All of them by one process, which forks."""
    folder = tmp_path_factory.mktemp("replaced")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
    config = claq_export.Config(bits=2, calibration="none")
    out = folder / "before" / "model.onnx"
    claq_export.export(model, torch.randn(2, 64), out=out, verify=False, config=config)
    for moment in _MOMENTS:
        shutil.copytree(out.parent, folder / str(moment))
    command = [
        sys.executable,
        "-c",
        _KILLED_BETWEEN_RENAMES,
        folder,
        str(len(_MOMENTS)),
        *map(str, _MOMENTS),
        *sys.path,
    ]
    # One thread: forked children must not find locks of threads that the parent started.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("renames", _MOMENTS)
def test_a_live_artifact_stays_whole_when_its_replacement_is_killed(replaced, renames):
    """Killed before the two renames of ``model.onnx`` and its data where they are written, before the first of those that
    put all files into their places, and before the last one."""
    import onnxruntime

    x = torch.randn(2, 64).numpy()

    def run(name):
        path = replaced / name / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: x})[0].tobytes()

    before = run("before")
    assert run(f"{renames}-killed") == before
    assert run(str(renames)) != before
    assert len(list((replaced / str(renames)).glob("model.onnx.*.data"))) == 1
    assert not list((replaced / str(renames)).glob(".*"))

"""Temporary folders for large files: gone at the end, and what killed processes left goes with the next."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import claq_export
from claq_export.calibration.progress import ProgressReporter
from claq_export.format.files import scratch_folder

HOLD = """
import sys, tempfile
from claq_export.format.files import scratch_folder
tempfile.tempdir = sys.argv[1]
with scratch_folder() as folder:
    (folder / "large").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_no_one_elses(temporary: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(temporary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    other = temporary / "elsewhere"
    other.mkdir()
    (other / "lock").write_text("mine")
    (temporary / "claq-scratch-link").symlink_to(other)
    (temporary / "claq-scratch-unknown").mkdir()
    others = {"elsewhere", "claq-scratch-link", "claq-scratch-unknown"}
    with scratch_folder() as mine:
        assert {path.name for path in temporary.iterdir()} == others | {left.name, mine.name}
    assert (left / "large").is_file()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with scratch_folder() as mine:
        assert {path.name for path in temporary.iterdir()} == others | {mine.name}
    assert {path.name for path in temporary.iterdir()} == others
    assert (other / "lock").read_text() == "mine"


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_export_does_without_room_for_the_unquantized_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claq_export.api.UNQUANTIZED_LIMIT", 1 << 20)
    monkeypatch.setattr("claq_export.api.scratch_folder", full)
    told: list[str] = []
    reporter = ProgressReporter(quiet=True)
    monkeypatch.setattr(reporter, "warn", told.append)
    config = claq_export.Config(calibration="none")
    example = (torch.randn(3, 64),)
    result = claq_export.export(nn.Linear(64, 32), example, tmp_path / "model.onnx", config, reporter=reporter)
    assert any(
        "latency of the unquantized model will not be measured: " in text and "No space" in text for text in told
    )
    assert result.verification is not None
    assert "original" not in result.verification.runs

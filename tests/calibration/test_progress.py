"""What a person reads of a run, and its log: texts as they are, a log that cannot be written is one error."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from claq_export.calibration.progress import ProgressReporter
from claq_export.errors import ModelError, OutputError


def test_brackets_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=100)
    with ProgressReporter(console=console) as reporter:
        reporter.stage("writing o/x[/b]/model.onnx")
        reporter.warn("o/y[draft]/model.onnx :smile:")
        reporter.start_layers(1, "quantizing [/b]")
        reporter.layer("experts[0].up[/b]", true_bits=3.0, error=0.1)
    printed = console.file.getvalue()
    assert "writing o/x[/b]/model.onnx" in printed
    assert "warning: o/y[draft]/model.onnx :smile:" in printed


def test_a_log_on_a_full_disk_is_an_error_of_output() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def run(error: Exception | None) -> None:
        with ProgressReporter(quiet=True, log_path="/dev/full") as reporter:
            if error is not None:
                raise error
            reporter.stage("begins")

    with pytest.raises(OutputError, match="log file '/dev/full' cannot be written: No space"):
        run(None)
    with pytest.raises(ModelError, match="first"):
        run(ModelError("first"))


def test_an_error_is_the_last_line_of_the_log(tmp_path: Path) -> None:
    def run() -> None:
        with ProgressReporter(quiet=True, log_path=tmp_path / "log") as reporter:
            reporter.stage("begins")
            raise ModelError("ends")

    with pytest.raises(ModelError):
        run()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["stage", "error"]

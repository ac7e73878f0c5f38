"""Bad input gets an error that names it, the documented exit status, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import sentences
from torch import nn

from claq_export import Config, export, quantize
from claq_export.cli import main, parse
from claq_export.errors import CaptureError, ConfigError, ModelError, OutputError, VerificationError
from claq_export.evaluation.models import open_tokenizer


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(20)), encoding="utf-8")
    return path


def missing_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "safetensors"


def truncated_weights(model: Path) -> str:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors"


def absurd_header(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    return "model.safetensors"


def missing_tensor(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "encoder.layer.1.output.dense.weight"


def not_a_number(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.0.attention.self.key.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "encoder.layer.0.attention.self.key.weight"


def infinite(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.0.intermediate.dense.bias"][0] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "encoder.layer.0.intermediate.dense.bias"


def no_config(model: Path) -> str:
    (model / "config.json").unlink()
    return "config.json"


def unknown_architecture(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "bart-simpson"}))
    return "bart-simpson"


def pickles_only(model: Path) -> str:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return "pytorch_model.bin is a pickle"


def weights_elsewhere(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model.parent / "a.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "../a.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "'../a.safetensors', which is outside"


def linked_tokenizer(model: Path) -> str:
    shutil.move(model / "tokenizer.json", model.parent / "private.json")
    (model / "tokenizer.json").symlink_to(model.parent / "private.json")
    return "tokenizer.json is a link out of its folder"


def endless_config(model: Path) -> str:
    with (model / "config.json").open("r+b") as file:
        file.truncate(300 << 20)  # no disk space is taken
    return "config.json has more than the 268435456 bytes accepted"


def nested_config(model: Path) -> str:
    (model / "config.json").write_text('{"a":' * 100_000)
    return "nested too deeply"


def two_model_types(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": "bert", "model_type": "gpt2"}')
    return "'model_type' occurs twice"


def quantized_somehow(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": "yes"}))
    return "already quantized"


def own_code(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (model / "config.json").write_text(json.dumps({**config, **code}))
    (model / "own.py").write_text(f"open({str(model / 'was-run')!r}, 'w')")
    return "--trust-remote-code"


@pytest.mark.parametrize(
    "damage",
    [
        pickles_only,
        weights_elsewhere,
        linked_tokenizer,
        endless_config,
        nested_config,
        two_model_types,
        quantized_somehow,
        own_code,
        missing_weights,
        truncated_weights,
        absurd_header,
        missing_tensor,
        not_a_number,
        infinite,
        no_config,
        unknown_architecture,
    ],
)
def test_damaged_models(
    damage: Callable[[Path], str], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = damage(model)
    out = tmp_path / "out" / "model.onnx"
    assert main([str(model), "--out", str(out), "--calibration", str(text), "--quiet"]) == 3
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert not (model / "was-run").exists()
    assert_nothing_left(out)


def test_a_tokenizer_that_cannot_be_read_is_named(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    out = tmp_path / "out" / "model.onnx"
    assert main([str(model), "--out", str(out), "--calibration", str(text), "--quiet"]) == 5
    assert "the model has no tokenizer" in capsys.readouterr().err
    assert any("cannot be loaded" in entry.message and str(model) in entry.message for entry in caplog.records)
    assert_nothing_left(out)


def test_a_name_in_a_file_is_no_control_sequence(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "\x1b[2J": {"hidden_size": -1}}))
    assert main([str(model), "--out", str(tmp_path / "out" / "model.onnx"), "--calibration", str(text), "--quiet"]) == 3
    message = capsys.readouterr().err
    assert "\\x1b[2J.hidden_size is -1" in message
    assert "\x1b" not in message


def assert_nothing_left(out: Path) -> None:
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert not out.with_name(out.name + ".work").exists()


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--bits", "1"], 2, "bits"),
        (["--bits", "5"], 2, "bits"),
        (["--bits", "nan"], 2, "bits"),
        (["--outliers", "0.5"], 2, "outliers"),
        (["--samples", "0"], 2, "samples"),
        (["--set", "row_scale"], 2, "NAME=VALUE"),
        (["--set", "no_such=1"], 2, "no_such"),
        (["--set", "row_scale=tall"], 2, "row_scale"),
        (["--task", "weather"], 3, "weather"),
        (["--include", "nothing.like.this"], 2, "nothing.like.this"),
        (["--sequence-length", "4096"], 5, "4096"),
        (["--bits", "2.01"], 2, "2.01 true bits a weight cannot be met"),
        (["--size", "2kB"], 2, "2,000 bytes cannot be met"),
        (["--size", "2kB", "--dry-run"], 2, "2,000 bytes cannot be met"),
        (["--devices", "warp"], 2, "warp"),
        (["--devices", "cpu,meta"], 2, "meta"),
        (["--devices", "cpu,"], 2, "device ''"),
    ],
)
def test_wrong_settings(
    options: list[str],
    status: int,
    named: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "model.onnx"
    assert main([str(model), "--out", str(out), "--calibration", str(text), "--quiet", *options]) == status
    assert named in capsys.readouterr().err
    assert_nothing_left(out)


@pytest.mark.parametrize(("content", "named"), [("", "holds no text"), ("x", "no sample")])
def test_calibration_text_too_short(
    content: str, named: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(content)
    out = tmp_path / "out" / "model.onnx"
    assert main([str(model), "--out", str(out), "--calibration", str(path), "--quiet"]) == 5
    assert named in capsys.readouterr().err
    assert_nothing_left(out)


def test_out_is_needed_and_names_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main([str(model), "--out", str(tmp_path / "model.bin")]) == 2
    assert ".onnx" in capsys.readouterr().err
    (tmp_path / "folder.onnx").mkdir()
    assert main([str(model), "--out", str(tmp_path / "folder.onnx")]) == 7
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["example_inputs", "dynamic_shapes", "input_names", "output_names"])
def test_a_folder_is_not_given_what_a_module_needs(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {name: str(tmp_path / "out.onnx") if name == "example_inputs" else ["x"]}
    hint = r"did you mean out='.*out\.onnx'" if name == "example_inputs" else "task$"
    with pytest.raises(ConfigError, match=f"^{name} is for a module.*{hint}"):
        export(model, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_modules_that_cannot_be_exported_are_told_why(tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    config = Config(calibration="none")
    out = tmp_path / "out" / "model.onnx"

    def perceptron() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()

    broken = perceptron()
    with torch.no_grad():
        broken[0].bias[1] = torch.nan
    with pytest.raises(ModelError, match=r"^Sequential has NaN or infinite weights in 0\.bias$"):
        export(broken, (x,), out, config)
    with torch.device("meta"):
        absent = perceptron()
    lazy = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64)).eval()
    for work in (lambda given: export(given, (x,), out, config), lambda given: quantize(given, (x,), config)):
        with pytest.raises(
            ModelError, match=r"^Sequential is on the meta device: 0\.weight, 0\.bias, .* have no values"
        ):
            work(absent)
        with pytest.raises(
            ModelError, match=r"^Sequential has lazy modules that were never called, so 1\.weight, 1\.bias"
        ):
            work(lazy)
    with pytest.raises(CaptureError, match="cannot capture a TorchScript module"):
        export(torch.jit.trace(perceptron(), x), (x,), out, config)
    with pytest.raises(ConfigError, match=r"the model must be an nn\.Module, a folder or a hub id, got function"):
        export(lambda x: x, (x,), out, config)
    with pytest.raises(ConfigError, match=r"0, 2: quantized already; take the model as it was before"):
        export(quantize(perceptron(), (x,), config), (x,), out, config)
    with pytest.raises(ConfigError, match=r"0, 2: quantized already; take the model as it was before"):
        quantize(quantize(perceptron(), (x,), config), (x,), config)
    assert not out.exists()


def test_a_report_that_cannot_be_written_is_known_at_the_start(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file' is not writable"):
        export(model, out=tmp_path / "out" / "model.onnx", report=tmp_path / "file" / "r.html")
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize(("typed", "meant"), [("generat", "generate"), ("evla", "eval"), ("verfy", "verify")])
def test_a_misspelled_command_is_no_model(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([typed, "folder", "--prompt", "hi"])
    assert exit_.value.code == 2
    assert f"there is no command and no folder {typed!r}; did you mean {meant!r}?" in capsys.readouterr().err
    assert not parse(["--no-verify", "folder"]).verify
    assert parse(["owner/generator"]).model == "owner/generator"


def test_what_does_not_exist_is_named_with_what_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "smol"), "--prompt", "hi"]) != 0
    assert f"claq-export MODEL --out {tmp_path / 'smol' / 'model.onnx'}" in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(ModelError, match=r"nofile\.onnx does not exist$"):
        open_tokenizer(tmp_path / "nofile.onnx")


def test_output_folder_that_cannot_be_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file where the folder should be: not writable for root either, whom permissions do not stop.
    (tmp_path / "file").write_text("")
    assert main([str(model), "--out", str(tmp_path / "file" / "model.onnx"), "--quiet"]) == 7
    assert "not writable" in capsys.readouterr().err


def test_full_disk_leaves_no_part_of_a_file(model: Path, text: Path, tmp_path: Path) -> None:
    # A limit on file size fails a write half-way, as a full disk does.
    out = tmp_path / "out" / "model.onnx"
    command = [sys.executable, "-m", "claq_export", str(model), "--out", str(out), "--calibration", str(text)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run = subprocess.run(
        [*command, "--samples", "4", "--quiet", "--no-verify", "--work", str(tmp_path / "work")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 7, run.stderr
    assert "claq-export:" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(out.parent.glob("*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--out", "o/m.onnx", "--work", "o"], "lies in it"),
        (["--out", "o/p/m.onnx", "--work", "o"], "lies in it"),
        (["--out", "o/m.onnx", "--work", "w", "--report", "w/r.html"], "--report 'w/r.html' lies in it"),
        (["--out", "o/m.onnx", "--report", "o/m.onnx"], "--out and --report are both"),
        (["--out", "o/m.onnx", "--log", "o/../o/m.onnx"], "--log and --out are both"),
        (["--out", "o/m.onnx", "--log", "l", "--report", "l"], "--log and --report are both"),
        (["--out", "o/m.onnx", "--log", "o/claq.json"], "is a file of the artifact"),
        (["--out", "o/m.onnx", "--log", "o/m.onnx.0123456789abcdef.data"], "is a file of the artifact"),
        (["--out", "o/m.onnx", "--log", "text.txt"], "is the calibration file"),
        (["--out", "o/m.onnx", "--report", "link.txt"], "is the calibration file"),
        (["--out", "o/m.onnx", "--log", "model/config.json"], "is a file of the model's folder"),
        (["--dry-run", "--log", "text.txt"], "is the calibration file"),
        (["--out", "o/m.onnx", "--memory", "4GB", "--tune"], "tuning need the unquantized weights"),
        (["--out", "o/m.onnx", "--memory", "4GB", "--guided"], "--guided needs the whole model"),
        (["--out", "o/m.onnx", "--tune", "--calibration", "none"], "tune needs calibration data"),
        (["--out", "o/m.onnx", "--bits", "4", "--floor", "*=3"], "floors are for a budget"),
        (["--out", "o/m.onnx", "--preset", "claq-4", "--outliers", "0.1"], "--preset sets the outliers"),
        (["--out", "o/m.onnx", "--preset", "claq-4", "--reservation", "fixed"], "--preset sets the outliers"),
        (["--dry-run", "--memory", "abc"], "a size is a number"),
        (["--dry-run", "--bits", "4", "--floor", "*=3"], "floors are for a budget"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_refused_before_the_model_is_read(
    options: list[str],
    named: str,
    tiny_bert: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("claq_export.api.capture", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "model").symlink_to(tiny_bert)
    (tmp_path / "link.txt").symlink_to(text)
    before = text.read_bytes(), (tiny_bert / "config.json").read_bytes()
    assert main(["model", "--calibration", "text.txt", *options]) == 2
    assert named in capsys.readouterr().err
    assert before == (text.read_bytes(), (tiny_bert / "config.json").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "model", "text.txt"]


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--bits", "3.5", "--floor", "zzz=3"], 2, "--floor zzz=3: no layer to quantize matches"),
        (["--dry-run", "--exclude", "*"], 2, "there is no layer to quantize"),
        (["--dry-run", "--last-logits"], 2, "last_logits is for language models"),
        (["--dry-run", "--cache-dtype", "float16"], 2, "cache_dtype is for language models"),
        (["--dry-run", "--cache-dtype", "float32", "--dtype", "bfloat16"], 2, "leave cache_dtype 'float32' out"),
        (["--dry-run", "--calibration", "missing.txt"], 5, "'missing.txt' does not exist"),
        (["--dry-run", "--report", "text.txt/r.html"], 7, "'text.txt' is not writable"),
    ],
)
def test_what_the_plan_rules_out_is_refused_before_calibration(
    options: list[str],
    status: int,
    named: str,
    tiny_bert: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "claq_export.compiler.load_calibration", lambda *_, **__: pytest.fail("calibration data was read")
    )
    out = [] if "--dry-run" in options else ["--out", "out/model.onnx"]
    assert main([str(tiny_bert), "--calibration", "text.txt", "--quiet", *out, *options]) == status
    assert named in capsys.readouterr().err


def test_names_are_tried_at_their_full_length(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("claq_export.api.capture", lambda *_, **__: pytest.fail("the model was read"))
    out = tmp_path / ("x" * 232 + ".onnx")  # the data file's name has 22 characters more, 259
    assert main([str(tiny_bert), "--out", str(out), "--quiet"]) == 7
    assert "too long for its file system, and files beside it have names 22" in capsys.readouterr().err
    assert main([str(tiny_bert), "--out", str(tmp_path / "m.onnx"), "--report", str(tmp_path), "--quiet"]) == 7
    assert "--report names the file to write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--out", "x" * 300 + ".onnx"], 7, "--out: the name 'x"),
        (["--out", "x" * 232 + ".onnx"], 7, "and files beside it have names 22 bytes longer"),
        (["--out", "x" * 300 + "/m.onnx"], 7, "of a folder is too long"),
        (["--out", "m.onnx", "--report", "x" * 300 + ".html"], 7, "--report: the name 'x"),
        (["--out", "m.onnx", "--calibration", "x" * 300], 5, "does not exist"),
    ],
    ids=["out", "data", "folder", "report", "calibration"],
)
def test_names_that_are_too_long_are_refused_by_a_dry_run_too(
    options: list[str],
    status: int,
    named: str,
    dry: list[str],
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("claq_export.api.capture", lambda *_, **__: pytest.fail("the model was read"))
    assert main([str(tiny_bert), "--quiet", *options, *dry]) == status
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_default_work_folder_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claq_export.api.capture", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "m.onnx.work").mkdir()
    (tmp_path / "m.onnx.work" / "text.txt").write_text("text")
    config = Config(calibration=tmp_path / "m.onnx.work" / "text.txt")
    with pytest.raises(ConfigError, match=r"claq deletes its files in --work '.*m\.onnx\.work'"):
        export("model", out=tmp_path / "m.onnx", config=config, memory=1 << 30)


_SIGNALLED = """
import os, signal, sys, tempfile, time
from claq_export import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored where the tests were started
number = getattr(signal, sys.argv[2])
earlier = signal.getsignal(number)
def run(options):
    try:
        with tempfile.TemporaryDirectory(dir=sys.argv[1]):
            os.kill(os.getpid(), number)
            time.sleep(60)
    except KeyboardInterrupt:
        if sys.argv[3] == "passes":
            raise
        raise ImportError("no module")
cli.run_export = run
status = cli.main(["model", "--out", "m.onnx"])
assert signal.getsignal(number) == earlier
sys.exit(status)
"""


@pytest.mark.parametrize("library", ["passes", "takes it for a failed import"])
@pytest.mark.parametrize(("number", "status", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_lets_a_run_clean_up(tmp_path: Path, number: str, status: int, word: str, library: str) -> None:
    command = [sys.executable, "-c", _SIGNALLED, str(tmp_path), number, library]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.stderr == f"claq-export: {word}; the same command goes on where it stopped\n"
    assert done.returncode == status
    assert not list(tmp_path.iterdir())


def test_only_an_export_goes_on_after_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("cli.run_export", "generate_command.run_generate"):

        def interrupted(options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(f"claq_export.{command}", interrupted)
    for arguments, goes_on in (
        (["model", "--out", "m.onnx"], True),
        (["model", "--dry-run"], False),
        (["generate", "folder", "--prompt", "x"], False),
    ):
        assert main(arguments) == 130
        assert ("goes on where it stopped" in capsys.readouterr().err) == goes_on


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from claq_export.__main__ import main as entry

    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "claq_export.cli", Interrupted("claq_export.cli"))
    assert entry() == 130
    assert capsys.readouterr().err == "claq-export: interrupted\n"


@pytest.mark.parametrize(
    ("several", "speaks"), [({}, True), ({"WORLD_SIZE": "2", "MASTER_ADDR": "here"}, False)], ids=str
)
def test_a_rank_without_other_processes_is_no_reason_to_be_silent(
    several: dict[str, str], speaks: bool, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no further")

    for name, value in ({"RANK": "1"} | several).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("claq_export.api.export", refuse)
    log = tmp_path / "log.jsonl"
    assert main([str(tiny_bert), "--out", str(tmp_path / "m.onnx"), "--log", str(log)]) == 3
    assert log.exists() == speaks


@pytest.mark.parametrize(
    ("failing", "kind"), [("verify.verify_artifact", VerificationError), ("compiler.save_checkpoint", OutputError)]
)
def test_a_failure_after_quantization_leaves_the_artifact_before(
    failing: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, out = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64), tmp_path / "m.onnx"
    for name in ("m.onnx", "m.onnx.0123456789abcdef.data", "claq.json", "claq.safetensors"):
        (tmp_path / name).write_text("of the artifact before")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise kind("no")

    monkeypatch.setattr(f"claq_export.{failing}", fail)
    with pytest.raises(kind):
        export(model, (x,), out, Config(calibration="none"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_verification_leaves_the_work_folder_to_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64)
    kept = []
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise VerificationError("no")

        patch.setattr("claq_export.verify.verify_artifact", fail)
        try:
            export(model, (x,), tmp_path / "m.onnx", Config(calibration="none"), work=tmp_path / "work")
        except VerificationError as error:
            kept.append(error)  # as a notebook does, and with it the traceback's frames
    assert kept
    export(model, (x,), tmp_path / "m.onnx", Config(calibration="none"), work=tmp_path / "work", verify=False)
    assert not (tmp_path / "work").exists()


def test_an_existing_artifact_survives_a_failed_export(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    arguments = [str(model), "--out", str(out), "--calibration", str(text), "--samples", "4", "--quiet"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    not_a_number(model)
    assert main(arguments) == 3
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before

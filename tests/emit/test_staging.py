"""An export's files take their places together, and what the export before left beside them goes."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from claq_export.emit.artifact import Artifact
from claq_export.emit.staging import StagedExport
from claq_export.errors import VerificationError
from claq_export.run_paths import check_targets

OLD_DATA, NEW_DATA = (f"model.onnx.{digit * 16}.data" for digit in "ab")


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def listing(files: dict[str, str]) -> dict[str, str]:
    """A ``claq.json`` of an export that wrote these files too."""
    return {
        "claq.json": json.dumps({"files": {name: hashlib.sha256(files[name].encode()).hexdigest() for name in files}})
    }


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def export(folder: Path, files: dict[str, str]) -> Artifact:
    with StagedExport(folder / "model.onnx") as staged:
        fill(staged.path.parent, files)
        written = tuple(staged.path.with_name(name) for name in ("model.onnx", NEW_DATA))
        return staged.publish(Artifact(staged.path, written, 1, (), (), ()))


NEW = {"model.onnx": "new", NEW_DATA: "new", "claq.json": "{}", "claq.safetensors": "new"}
OLD = {"model.onnx": "old", OLD_DATA: "old", "claq.json": "{}", "claq.safetensors": "old"}
COMPANIONS = {"config.json": "old", "tokenizer.json": "old", "genai_config.json": "{}", "1_Pooling/config.json": "{}"}


def test_companions_of_the_artifact_before_go(tmp_path: Path) -> None:
    fill(tmp_path, OLD | COMPANIONS | listing(COMPANIONS) | {"notes.txt": "mine"})
    artifact = export(tmp_path, NEW | {"config.json": "new"})
    assert contents(tmp_path) == NEW | {"config.json": "new", "notes.txt": "mine"}
    assert not (tmp_path / "1_Pooling").exists()
    assert artifact.path == tmp_path / "model.onnx"
    assert artifact.files == (tmp_path / "model.onnx", tmp_path / NEW_DATA)


def test_what_a_user_changed_or_added_stays(tmp_path: Path) -> None:
    mine = {"tokenizer.json": "mine", "vocab.txt": "mine"}
    fill(tmp_path, OLD | COMPANIONS | listing(COMPANIONS) | mine)
    export(tmp_path, NEW)
    assert contents(tmp_path) == NEW | mine


@pytest.mark.parametrize(
    "description",
    [None, "{}", "[", '{"files": ["config.json"]}', '{"files": {"config.json": 1}}'],
    ids=["no artifact", "lists nothing", "unreadable", "no object", "no digest"],
)
def test_files_of_others_stay(description: str | None, tmp_path: Path) -> None:
    fill(tmp_path, COMPANIONS | ({} if description is None else {"claq.json": description}))
    export(tmp_path, NEW)
    assert contents(tmp_path) == COMPANIONS | NEW


def test_a_listing_names_nothing_elsewhere(tmp_path: Path) -> None:
    others = {"notes.txt": "mine", "../elsewhere/config.json": "mine"}
    folder = tmp_path / "folder"
    fill(folder, OLD | others | listing(others))
    export(folder, NEW)
    assert contents(tmp_path) == {f"folder/{name}": text for name, text in (NEW | {"notes.txt": "mine"}).items()} | {
        "elsewhere/config.json": "mine"
    }


def test_what_is_read_beside_another_model_file_stays(tmp_path: Path) -> None:
    genai = {"genai_config.json": json.dumps({"model": {"decoder": {"filename": "other.onnx"}}})}
    others = COMPANIONS | genai | {"other.onnx": "kept"}
    fill(tmp_path, OLD | others | listing(COMPANIONS | genai))
    export(tmp_path, NEW)
    assert contents(tmp_path) == NEW | others


def test_a_second_artifact_of_a_folder_leaves_the_first_its_companions(tmp_path: Path) -> None:
    first = {"first.onnx": "1", f"first.onnx.{'a' * 16}.data": "1", **COMPANIONS}
    fill(tmp_path, first | listing(COMPANIONS) | {"claq.safetensors": "1"})
    export(tmp_path, NEW)
    assert contents(tmp_path) == first | NEW


def test_the_model_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target.name) or replace(source, target))
    export(tmp_path, NEW | {"tokenizer.json": "new"})
    assert len(moved) == 5
    assert moved[-1] == "model.onnx"


@pytest.mark.parametrize("kind", [VerificationError, KeyboardInterrupt])
def test_a_failure_leaves_all_as_it_was(kind: type[BaseException], tmp_path: Path) -> None:
    fill(tmp_path, OLD)

    def fail() -> None:
        with StagedExport(tmp_path / "model.onnx") as staged:
            fill(staged.path.parent, NEW)
            raise kind(f"{staged.path} deviates")

    with pytest.raises(kind) as error:
        fail()
    assert contents(tmp_path) == OLD
    if kind is VerificationError:
        assert str(error.value) == f"{tmp_path / 'model.onnx'} deviates"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".model.onnx.{2**22 + 1}.new"
    running = tmp_path / f".model.onnx.{os.getppid()}.new"
    for folder in (left, running):
        fill(folder, NEW)
    export(tmp_path, NEW)
    assert not left.exists()
    assert running.exists()


def test_what_a_killed_process_left_is_no_used_disk_of_the_next_run(tmp_path: Path) -> None:
    left = tmp_path / f".model.onnx.{2**22 + 1}.new"
    fill(left, NEW)
    check_targets(tmp_path / "model.onnx", None)
    assert not left.exists()

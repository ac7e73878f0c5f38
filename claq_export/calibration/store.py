"""Finished layers on disk, so that an interrupted run goes on where it stopped.

A work folder belongs to one run: its fingerprint covers the model's weights and graph, the calibration batches, the
settings and the versions. Whatever moment the process dies at, the folder is one that the same command goes on with: the marker
with the fingerprint is written before anything else and removed after everything else, and a layer is there whole or
not at all (temporary name, flush, rename).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..algorithm import ColumnPlan
from ..errors import FormatError, OutputError
from ..format.files import lock_file, write_atomically
from ..format.layer import QuantizedLinear
from ..inputs import SafetensorsFile, read_json_object
from .sensitivity import Guidance, Importance

_MARKER = "claq-run.json"
_LOCK = "claq-run.lock"
"""Locked by the process that the folder is for. The marker cannot be: it is replaced."""

_PLANS = "plans.safetensors"

_GRADIENTS = "gradients.safetensors"

_FINISHED = re.compile(r"(?:[0-9a-f]{24}|plans|gradients)\.safetensors")
"""Names of what a run keeps here: layers, the outcome of a bit budget, gradients."""

_DISCARDED = re.compile(
    rf"{_FINISHED.pattern}|(?:[0-9a-f]{{24}}|plans|gradients)\.tmp|\.{re.escape(_MARKER)}\.\d+\.tmp"
)
"""The same, and what a process that was killed left half-written. Nothing else in the folder is claq's to delete."""


def finished_bytes(folder: Path) -> int:
    """Bytes of finished layers in a work folder; 0 where there is none."""
    if not (folder / _MARKER).is_file():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if _FINISHED.fullmatch(path.name))


class LayerStore:
    """Layers of one run, by name.

    Args:
        folder: made if it does not exist. It is locked until :meth:`remove` or the end of the process.
        fingerprint: everything the layers depend on, by name ("model", "calibration data", ...); layers of
            another fingerprint are never returned.
        resume: False: discard whatever an earlier run left. True or None: go on with it, refuse one of another fingerprint.

    Raises:
        OutputError: the folder cannot be written, is not one of claq's, is in use by another process, or belongs to
            another run; the message names what changed.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str], resume: bool | None = None) -> None:
        self.folder = Path(folder)
        self._fingerprint = dict(fingerprint)
        self._lock: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._earlier_run()  # refuses a folder that is not one of claq's before a file is made in it
            self._lock = lock_file(self.folder / _LOCK)
            if self._lock is None:
                raise OutputError(f"work folder {str(self.folder)!r} is in use by another process")
            earlier = self._earlier_run()
            if earlier is not None and resume is False:
                self._discard_layers()
            elif earlier is not None and earlier != self._fingerprint:
                raise OutputError(
                    f"cannot resume from {str(self.folder)!r}: changed since that run: "
                    f"{'; '.join(_changes(earlier, self._fingerprint))}. --no-resume discards what is there and "
                    "starts afresh, --work names another folder"
                )
            if earlier != self._fingerprint:
                write_atomically(self.folder / _MARKER, json.dumps(self._fingerprint, indent=1).encode())
        except OSError as error:
            self.close()
            raise OutputError(f"work folder {str(self.folder)!r} cannot be used: {error}") from error
        except OutputError:
            self.close()
            raise

    def _earlier_run(self) -> dict[str, str] | None:
        """Fingerprint of the run the folder belongs to; None if the folder holds nothing yet."""
        marker = self.folder / _MARKER
        if not marker.is_file():
            # A process that died while it wrote the marker, or that is about to write it, has these files and no others.
            names = [path.name for path in self.folder.iterdir()]
            others = [name for name in names if name != _LOCK and not name.startswith(f".{_MARKER}.")]
            if others:
                raise OutputError(
                    f"{str(self.folder)!r} is not empty and is not a work folder of claq; name another with --work"
                )
            return None
        return {str(key): str(value) for key, value in read_json_object(marker, OutputError).items()}

    def _discard_layers(self) -> None:
        for path in self.folder.iterdir():
            if _DISCARDED.fullmatch(path.name):
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def load(self, name: str) -> tuple[QuantizedLinear, dict[str, Any]] | None:
        """The finished layer and what was recorded with it; None if there is none or the file is damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            file = SafetensorsFile(path, FormatError)
            record = json.loads(file.metadata["claq"])
            if record["name"] != name or record["fingerprint"] != self._fingerprint:
                return None
            tensors = {key: file.read(key) for key in file}
            return QuantizedLinear.from_parts(record["attributes"], tensors), record["extra"]
        except (FormatError, KeyError, TypeError, json.JSONDecodeError):
            # A damaged file is one that does not count as finished: the layer is quantized again.
            return None

    def read(self, name: str, tensor: str) -> torch.Tensor:
        """One tensor of a finished layer.

        Raises:
            FormatError: it is not there any more.
        """
        return SafetensorsFile(self._path(name), FormatError).read(tensor)

    def save(self, name: str, layer: QuantizedLinear, extra: dict[str, Any]) -> None:
        """Record a finished layer.

        Raises:
            OutputError: the layer cannot be written.
        """
        record = {"name": name, "fingerprint": self._fingerprint, "attributes": layer.attributes(), "extra": extra}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in layer.tensors().items()}
        self._write(self._path(name), tensors, record, f"layer {name!r}")

    def load_plans(self) -> dict[str, ColumnPlan] | None:
        """What :meth:`save_plans` recorded; None if nothing was, or the file is damaged."""
        found = self._read(_PLANS, ("bits", "reserve"))
        if found is None:
            return None
        return {name: ColumnPlan(bits, found["reserve"][name]) for name, bits in found["bits"].items()}

    def save_plans(self, plans: Mapping[str, ColumnPlan]) -> None:
        """Record the outcome of a bit budget, so that its walk over the model is not repeated.

        Raises:
            OutputError: it cannot be written.
        """
        kinds = {
            "bits": {name: plan.bits for name, plan in plans.items()},
            "reserve": {name: plan.reserve for name, plan in plans.items()},
        }
        self._save(_PLANS, kinds, "the bit budget")

    def load_guidance(self) -> Guidance | None:
        """What :meth:`save_guidance` recorded; None if nothing was, or the file is damaged."""
        found = self._read(_GRADIENTS, ("rows", "columns", "tokens"))
        return None if found is None else Guidance(Importance(found["rows"], found["columns"]), found["tokens"])

    def save_guidance(self, guidance: Guidance) -> None:
        """Record gradients, so that the passes over all calibration data are not repeated.

        Raises:
            OutputError: they cannot be written.
        """
        importance = guidance.importance
        kinds = {"rows": importance.rows, "columns": importance.columns, "tokens": guidance.tokens}
        self._save(_GRADIENTS, kinds, "gradients")

    def _read(self, file_name: str, kinds: Sequence[str]) -> dict[str, dict[str, torch.Tensor]] | None:
        """What :meth:`_save` recorded in this run; None if nothing was, or the file is damaged."""
        path = self.folder / file_name
        if not path.exists():
            return None
        try:
            file = SafetensorsFile(path, FormatError)
            record = json.loads(file.metadata["claq"])
            if record["fingerprint"] != self._fingerprint:
                return None
            return {
                kind: {name: file.read(f"{i}.{kind}") for i, name in enumerate(record["names"][kind])} for kind in kinds
            }
        except (FormatError, KeyError, TypeError, json.JSONDecodeError):
            return None

    def _save(self, file_name: str, kinds: Mapping[str, Mapping[str, torch.Tensor]], what: str) -> None:
        """Record tensors by their kinds and the names of layers."""
        tensors = {
            f"{i}.{kind}": tensor.cpu().contiguous()
            for kind, by_name in kinds.items()
            for i, tensor in enumerate(by_name.values())
        }
        names = {kind: list(by_name) for kind, by_name in kinds.items()}
        self._write(self.folder / file_name, tensors, {"names": names, "fingerprint": self._fingerprint}, what)

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any], what: str) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"claq": json.dumps(record)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{what} cannot be written to {str(self.folder)!r}: {error}") from error

    def remove(self) -> None:
        """Delete claq's files in the work folder (the run is complete), the marker after the layers, the lock last, and then the
        folder, unless it holds other files."""
        try:
            self._discard_layers()
            (self.folder / _MARKER).unlink(missing_ok=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            try:
                self.folder.rmdir()
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        except OSError as error:
            raise OutputError(f"work folder {str(self.folder)!r} cannot be removed: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.close()


def _changes(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``"setting bits (4.0 -> 3.0)"``; digests are named only."""
    changes = []
    for name in sorted(set(earlier) | set(now)):
        before, after = earlier.get(name), now.get(name)
        if before != after:
            short = all(value is not None and len(value) < 40 for value in (before, after))
            changes.append(f"{name} ({before} -> {after})" if short else name)
    return changes

"""Finished layers on disk, so that an interrupted run goes on where it stopped.

A work folder belongs to one run: its fingerprint covers the model's weights, the calibration batches, the settings
    and the
claq version. A layer is written whole or not at all (temporary name, then rename).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FormatError, OutputError
from ..format.layer import QuantizedLinear

_MARKER = "claq-run.json"


class LayerStore:
    """Layers of one run, by name.

    Args:
        folder: made if it does not exist.
        fingerprint: digests of everything the layers depend on, by name ("model", "calibration data", ...); layers of
            another fingerprint are never returned.
        resume: True: go on with what the folder holds. False: an earlier run of another fingerprint is discarded.

    Raises:
        OutputError: the folder cannot be written, is not one of claq's, or (with ``resume``) belongs to another run;
            the message names what changed.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str], resume: bool = False) -> None:
        self.folder = Path(folder)
        self._fingerprint = dict(fingerprint)
        try:
            earlier = self._earlier_run()
            if earlier is not None and earlier != self._fingerprint:
                if resume:
                    names = sorted(set(earlier) | set(self._fingerprint))
                    changed = [name for name in names if earlier.get(name) != self._fingerprint.get(name)]
                    raise OutputError(
                        f"cannot resume from {str(self.folder)!r}: changed since that run: {', '.join(changed)}; "
                        "run without --resume to start afresh"
                    )
                shutil.rmtree(self.folder)
                earlier = None
            self.folder.mkdir(parents=True, exist_ok=True)
            if earlier is None:
                _write_atomically(self.folder / _MARKER, json.dumps(self._fingerprint).encode())
        except OSError as error:
            raise OutputError(f"work folder {str(self.folder)!r} cannot be used: {error}") from error

    def _earlier_run(self) -> dict[str, str] | None:
        """Fingerprint of the run the folder belongs to; None if the folder is new or empty."""
        marker = self.folder / _MARKER
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return None
        if not marker.is_file():
            raise OutputError(
                f"{str(self.folder)!r} is not empty and is not a work folder of claq; name another with --work"
            )
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            found = None
        return found if isinstance(found, dict) else {}

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def load(self, name: str) -> tuple[QuantizedLinear, dict[str, Any]] | None:
        """The finished layer and what was recorded with it; None if there is none or the file is damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["claq"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if record["name"] != name or record["fingerprint"] != self._fingerprint:
                return None
            return QuantizedLinear.from_parts(record["attributes"], tensors), record["extra"]
        except (SafetensorError, FormatError, KeyError, TypeError, json.JSONDecodeError, OSError):
            # A damaged file is one that does not count as finished: the layer is quantized again.
            return None

    def save(self, name: str, layer: QuantizedLinear, extra: dict[str, Any]) -> None:
        """Record a finished layer.

        Raises:
            OutputError: the layer cannot be written.
        """
        record = {"name": name, "fingerprint": self._fingerprint, "attributes": layer.attributes(), "extra": extra}
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        try:
            tensors = {key: tensor.cpu().contiguous() for key, tensor in layer.tensors().items()}
            save_file(tensors, temporary, metadata={"claq": json.dumps(record)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"layer {name!r} cannot be written to {str(self.folder)!r}: {error}") from error

    def remove(self) -> None:
        """Delete the work folder (the run is complete)."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)

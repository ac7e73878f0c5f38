"""Carry a large wheel (onnxruntime-gpu is 255 MB) to a machine that takes only small files, and put it together there.

    python benchmarks/gpu/wheel_pieces.py fetch onnxruntime-gpu==1.31.1 pieces/      # pip download, then split
    python benchmarks/gpu/wheel_pieces.py split some.whl pieces/ [--megabytes 55]
    python benchmarks/gpu/wheel_pieces.py join pieces/ wheels/                       # checked by SHA-256
    python -m pip install --no-index --no-deps --target site wheels/*.whl

A piece is ``<wheel>.<number>``; ``<wheel>.json`` says how many there are and the digest of the whole. Needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEGABYTES = 55


class PiecesError(Exception):
    """A piece is missing or damaged."""


def split(wheel: Path, folder: Path, megabytes: float = MEGABYTES) -> list[Path]:
    """Write the pieces of a file, each at most ``megabytes`` (of 10^6 bytes), and their description last."""
    folder.mkdir(parents=True, exist_ok=True)
    room, digest, written = int(megabytes * 1e6), hashlib.sha256(), []
    with wheel.open("rb") as source:
        while piece := source.read(room):
            digest.update(piece)
            path = folder / f"{wheel.name}.{len(written):02}"
            path.write_bytes(piece)
            written.append(path)
    description = {"pieces": len(written), "bytes": wheel.stat().st_size, "sha256": digest.hexdigest()}
    path = folder / f"{wheel.name}.json"
    path.write_text(json.dumps(description) + "\n")
    return [*written, path]


def join(folder: Path, out: Path) -> list[Path]:
    """Put together every file whose pieces are in ``folder``.

    Raises:
        PiecesError: nothing is there, a piece is missing, or the whole has another digest.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for description in sorted(folder.glob("*.json")):
        told, name = json.loads(description.read_text()), description.name.removesuffix(".json")
        digest = hashlib.sha256()
        unfinished = out / f"{name}.unfinished"
        with unfinished.open("wb") as target:
            for number in range(told["pieces"]):
                piece = folder / f"{name}.{number:02}"
                if not piece.is_file():
                    raise PiecesError(f"{piece} is missing; {name} has {told['pieces']} pieces")
                data = piece.read_bytes()
                digest.update(data)
                target.write(data)
        if digest.hexdigest() != told["sha256"]:
            raise PiecesError(f"the pieces of {name} in {folder} are damaged: their SHA-256 is not that of the whole")
        os.replace(unfinished, out / name)
        made.append(out / name)
    if not made:
        raise PiecesError(f"{folder} holds no pieces of a file")
    return made


def fetch(requirement: str, folder: Path, megabytes: float, python: str, platforms: list[str]) -> list[Path]:
    """Download one wheel without what it requires, and split it."""
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", download]
        command += ["--python-version", python, "--implementation", "cp"]
        command += [part for platform in platforms for part in ("--platform", platform)]
        subprocess.run([*command, requirement], check=True)
        return [path for wheel in sorted(Path(download).iterdir()) for path in split(wheel, folder, megabytes)]


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fetch", "split", "join"))
    parser.add_argument("what", help="requirement, file, or folder of pieces")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=MEGABYTES)
    parser.add_argument("--python-version", default="3.12", help="of the other machine (fetch)")
    parser.add_argument(
        "--platform", nargs="+", default=["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64"]
    )
    options = parser.parse_args()
    try:
        if options.action == "join":
            made = join(Path(options.what), options.folder)
        elif options.action == "split":
            made = split(Path(options.what), options.folder, options.megabytes)
        else:
            made = fetch(options.what, options.folder, options.megabytes, options.python_version, options.platform)
    except (PiecesError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in made:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

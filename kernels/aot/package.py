"""The file of compiled kernels for one target, and the manifest of all: written here, read by a C++ loader.

``claq_sm90.kernels`` (little-endian): the magic ``CLAQKRN2``; uint32 number of records; uint32 compute capability; then
the records, sorted by name, then the images, each at a multiple of 16 bytes. A record is 256 bytes:

    char     name[64], entry[48]        zero-terminated
    char     parameters[32]             one letter a parameter: p = pointer, i = int32; zero-terminated
    uint32   num_warps, shared          threads = 32 * num_warps; bytes of dynamic shared memory
    uint32   tile[3]                    output features, vectors, blocks of 32 columns a program takes
    uint32   kind                       0 = cubin, 1 = PTX text, zero-terminated
    uint64   offset, size               of the image in this file
    uint8    sha256[32]                 of the image
    uint32   most_vectors, programs     of a matrix kernel: rows of x it is taken for; programs a multiprocessor aimed at
    zeros up to 256 bytes

Two null pointers follow the parameters in every launch. ``claq_ptx80.kernels`` holds PTX, for GPUs no cubin fits.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Reading a package needs no Triton.
    from .compile import CompiledKernel

MAGIC = b"CLAQKRN2"
RECORD_SIZE = 256
_HEADER = struct.Struct("<8sII")
_RECORD = struct.Struct("<64s48s32s2I3II2Q32s2I")
_ALIGNMENT = 16


def _letters(parameters: Sequence[tuple[str, str]]) -> str:
    return "".join("p" if kind.startswith("*") else "i" for _, kind in parameters)


def package_name(target: int, ptx: bool = False) -> str:
    """File name of a target's package."""
    return f"claq_{'ptx' if ptx else 'sm'}{target}.kernels"


def write_package(kernels: Sequence[CompiledKernel], path: Path, ptx: bool = False) -> None:
    """Write the kernels of one target; the same kernels give the same bytes.

    Args:
        ptx: store PTX text instead of cubins.

    Raises:
        ValueError: no kernels, kernels of two targets, or a name that does not fit a record.
    """
    if len({kernel.target for kernel in kernels}) != 1:
        raise ValueError("a package holds the kernels of exactly one target")
    kernels = sorted(kernels, key=lambda kernel: kernel.variant)
    offset = _HEADER.size + RECORD_SIZE * len(kernels)
    records, images = [], []
    for kernel in kernels:
        image = kernel.ptx.encode() + b"\0" if ptx else kernel.cubin
        texts = [text.encode() for text in (kernel.variant, kernel.entry, _letters(kernel.parameters))]
        for text, room in zip(texts, (64, 48, 32), strict=True):
            if len(text) >= room:
                raise ValueError(f"{text.decode()} does not fit {room - 1} characters")
        offset += -offset % _ALIGNMENT
        fields = (kernel.num_warps, kernel.shared, *kernel.tile, int(ptx), offset, len(image))
        record = _RECORD.pack(*texts, *fields, hashlib.sha256(image).digest(), kernel.most_vectors, kernel.programs)
        records.append(record.ljust(RECORD_SIZE, b"\0"))
        images.append((offset, image))
        offset += len(image)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, len(kernels), kernels[0].target))
        file.write(b"".join(records))
        for position, image in images:
            file.write(b"\0" * (position - file.tell()))
            file.write(image)


def manifest_entry(path: Path, kernels: Sequence[CompiledKernel]) -> dict[str, Any]:
    """What the manifest says of a written package: its hash, and each kernel's launch."""
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "target": kernels[0].target,
        "kernels": {
            kernel.variant: {
                "entry": kernel.entry,
                "num_warps": kernel.num_warps,
                "shared": kernel.shared,
                "parameters": [f"{name}: {kind}" for name, kind in kernel.parameters],
                "tile": list(kernel.tile),
            }
            for kernel in sorted(kernels, key=lambda kernel: kernel.variant)
        },
    }


def read_package(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a package by kernel name, with their images; what the C++ loader must do.

    Raises:
        ValueError: not a package, truncated, or an image whose hash is wrong.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise ValueError(f"{path.name} is not a package of claq kernels")
    _, count, target = _HEADER.unpack_from(data)
    if len(data) < _HEADER.size + RECORD_SIZE * count:
        raise ValueError(f"{path.name} is truncated")
    kernels = {}
    for i in range(count):
        fields = _RECORD.unpack_from(data, _HEADER.size + RECORD_SIZE * i)
        name, entry, parameters = (text.rstrip(b"\0").decode() for text in fields[:3])
        offset, size, digest, most_vectors, programs = fields[9:]
        image = data[offset : offset + size]
        if len(image) != size or hashlib.sha256(image).digest() != digest:
            raise ValueError(f"{path.name}: the image of {name} is damaged")
        kernels[name] = {
            "target": target,
            "entry": entry,
            "parameters": parameters,
            "num_warps": fields[3],
            "shared": fields[4],
            "tile": fields[5:8],
            "ptx": bool(fields[8]),
            "most_vectors": most_vectors,
            "programs": programs,
            "image": image,
        }
    return kernels


def write_manifest(packages: dict[str, dict[str, Any]], triton_version: str, path: Path) -> None:
    """Write the manifest: Triton's version and, by file name, what :func:`manifest_entry` says."""
    path.write_text(json.dumps({"triton": triton_version, "packages": packages}, indent=1, sort_keys=True) + "\n")

"""NumPy archives: what numpy writes is read, and nothing else is believed."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from claq_export.errors import CalibrationError
from claq_export.inputs import read_npz


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", ">f4", ">i2"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_all_shapes_come_back(tmp_path: Path, dtype: str, save) -> None:
    rng = np.random.default_rng(0)
    shapes = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3), (2, 3, 4, 5)]
    arrays = {f"a{i}": (100 * rng.random(shape)).astype(dtype) for i, shape in enumerate(shapes)}
    arrays["fortran"] = np.asfortranarray(rng.random((3, 5)).astype(dtype))
    save(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz", list(arrays), CalibrationError)
    for name, expected in arrays.items():
        assert found[name].dtype == expected.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(found[name], expected)


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", content)
    return path


def array_file(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "'x' is no array"),
        (
            array_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
            "takes 4000000000000 bytes",
        ),
        (array_file("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(7)), "takes 8 bytes"),
        (array_file("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "no numbers of a known kind"),
        (array_file("{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}", bytes(3)), "no numbers of a known kind"),
        (array_file("(" * 60_000), "header is damaged"),
        (array_file(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1,' * 40})}}", bytes(4)), "40 dimensions"),
    ],
    ids=["text", "larger than the file", "too short", "objects", "odd size", "nested", "rank"],
)
def test_what_a_header_says_is_not_believed(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_npz(archive(tmp_path / "x.npz", content), ["x"], CalibrationError)


def test_limits_and_names(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 20))
    with pytest.raises(CalibrationError, match="unpacks to more than 4 MiB"):
        read_npz(tmp_path / "x.npz", ["x"], CalibrationError, limit=4 << 20)
    with pytest.raises(CalibrationError, match="has no array 'y'; it has 'x'"):
        read_npz(tmp_path / "x.npz", ["y"], CalibrationError)
    with pytest.raises(CalibrationError, match="does not exist"):
        read_npz(tmp_path / "none.npz", ["x"], CalibrationError)


def test_damage_is_refused_in_claqs_words(tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = 0
    for save in (np.savez, np.savez_compressed):
        whole = io.BytesIO()
        save(whole, x=np.arange(64, dtype=np.float32).reshape(8, 8))
        for _ in range(400):
            data = bytearray(whole.getvalue())
            place = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[place] = rng.randrange(256)
            else:
                del data[place : place + rng.randint(1, 4)]
            (tmp_path / "x.npz").write_bytes(data)
            try:
                read_npz(tmp_path / "x.npz", ["x"], CalibrationError)
            except CalibrationError:
                refused += 1
    assert refused > 400

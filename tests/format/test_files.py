"""Writing files: in pieces of megabytes, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from claq_export.format.files import open_for_weights


def test_small_tensors_are_written_in_pieces_of_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    tensor = bytes(range(256)) * 17
    sizes = []
    with open_for_weights(path) as file:
        for _ in range(5000):
            file.write(tensor)
            sizes.append(path.stat().st_size)
    grown = {after - before for before, after in zip([0, *sizes], sizes, strict=False)} - {0}
    assert grown
    assert min(grown) > 4 << 20
    assert path.read_bytes() == tensor * 5000

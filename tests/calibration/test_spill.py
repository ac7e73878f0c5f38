"""Activations on disk: bytes come back as they were, places are used again, and no name is left in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_disk import files_limited_to

from claq_export.calibration.spill import ActivationSpill
from claq_export.errors import OutputError


def test_tensors_come_back_as_they_were(tmp_path):
    with ActivationSpill(0, tmp_path) as spill:
        tensors = [
            torch.randn(7, 33, dtype=dtype).t()
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        ]
        tensors += [torch.arange(13), torch.tensor([True, False]), torch.tensor(float("nan"))]
        spilled = [spill.put(tensor) for tensor in tensors]
        for tensor, put in zip(reversed(tensors), reversed(spilled), strict=True):
            back = put.read()
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
            assert torch.equal(back, tensor) or (back.isnan().all() and tensor.isnan().all())
        assert spill.spilled_bytes == sum(tensor.nbytes for tensor in tensors)


def test_the_file_grows_to_what_is_held_at_once(tmp_path):
    with ActivationSpill(0, tmp_path) as spill:
        kept = spill.put(torch.full((100,), 7.0))
        for step in range(50):
            assert torch.equal(spill.put(torch.full((100,), float(step))).read(), torch.full((100,), float(step)))
        assert torch.equal(kept.read(), torch.full((100,), 7.0))
        assert spill._file.seek(0, 2) == 2 * 400


def test_a_killed_process_can_leave_nothing(tmp_path):
    with ActivationSpill(0, tmp_path) as spill:
        spill.put(torch.zeros(1000))
        assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_is_named(tmp_path):
    with ActivationSpill(0, tmp_path) as spill:
        kept = spill.put(torch.full((100,), 7.0))
        with (
            files_limited_to(1000),
            pytest.raises(OutputError, match=rf"activations cannot be written in '{tmp_path}'.*"),
        ):
            spill.put(torch.zeros(1000))
        assert torch.equal(kept.read(), torch.full((100,), 7.0))
    with (
        pytest.raises(OutputError, match="activations cannot be written in '/nowhere'"),
        ActivationSpill(0, Path("/nowhere")),
    ):
        pass

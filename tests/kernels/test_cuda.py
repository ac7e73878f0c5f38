"""The check of a CUDA kernel's first call against the reference, on functions that stand for the two (no GPU needed)."""

from __future__ import annotations

import itertools

import pytest
import torch

from claq_export.kernels.cuda import checked

RIGHT = torch.tensor([1.0, -2.0, 4.0])
kinds = itertools.count()


def calls_of(result: torch.Tensor | Exception) -> tuple[list[str], object, object]:
    """A log of calls, a kernel that gives ``result`` and a reference that gives RIGHT."""
    log: list[str] = []

    def kernel() -> torch.Tensor:
        log.append("kernel")
        if isinstance(result, Exception):
            raise result
        return result

    def reference() -> torch.Tensor:
        log.append("reference")
        return RIGHT

    return log, kernel, reference


def test_a_right_kernel_is_checked_once() -> None:
    kind, result = next(kinds), RIGHT + 0.01
    log, kernel, reference = calls_of(result)
    for _ in range(3):
        assert checked(kind, kernel, reference, 0.01) is result
    assert log == ["reference", "kernel", "kernel", "kernel"]


@pytest.mark.parametrize("wrong", [RIGHT + 0.1, RIGHT * torch.nan, RuntimeError("no kernel image is available")])
def test_a_wrong_kernel_is_not_used(wrong: torch.Tensor | Exception) -> None:
    kind = next(kinds)
    log, kernel, reference = calls_of(wrong)
    with pytest.warns(RuntimeWarning, match="differs from the reference|no kernel image"):
        assert checked(kind, kernel, reference, 0.01) is RIGHT
    assert checked(kind, kernel, reference, 0.01) is RIGHT
    assert log == ["reference", "kernel", "reference"]


def test_values_that_tell_nothing_give_no_verdict() -> None:
    kind = next(kinds)
    for values in (torch.zeros(3), torch.tensor([1.0, torch.inf]), torch.zeros(0)):
        assert checked(kind, lambda: pytest.fail("not to be called"), lambda v=values: v, 0.01) is values
    log, kernel, reference = calls_of(RIGHT)
    checked(kind, kernel, reference, 0.01)
    assert log == ["reference", "kernel"]


def test_a_graph_capture_is_not_waited_for() -> None:
    kind = next(kinds)
    log, kernel, reference = calls_of(RIGHT)
    checked(kind, kernel, reference, 0.01, may_wait=False)
    checked(kind, kernel, reference, 0.01)
    assert log == ["kernel", "reference", "kernel"]

"""Timing a session among others while its threads are awake, as they are between the operators of a model that runs."""

from __future__ import annotations

import time
from collections.abc import Callable

SETTLE, TURN = 0.03, 0.05
"""Seconds of a turn that are not timed, and that are."""


def settled_turn(run: Callable[[], object]) -> list[float]:
    """Seconds of each run of a turn, from when the threads of the session before have stopped spinning.

    ONNX Runtime's idle threads spin for a while; until then they take the place of the threads of this session.
    """
    end = time.perf_counter() + SETTLE
    while time.perf_counter() < end:
        run()
    times: list[float] = []
    while not times or sum(times) < TURN:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times

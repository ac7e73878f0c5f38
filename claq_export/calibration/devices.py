"""The devices that one process quantizes on: work that depends on no other runs on all of them at once.

One worker thread a device. Layers that wait for one another (a calibrated layer for the one before it) cannot be spread;
what can are layers that read the same value, layers without calibration, embeddings, and the groups of tokens that a
Hessian sums over. Results do not depend on the number of devices: each piece of work is done as on a single one, and
sums are added up in the same order.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Devices:
    """Devices of one type, the first of which runs what cannot be spread.

    Args:
        names: as PyTorch names them; a name may come twice, for two workers on one device.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.all = tuple(torch.device(name) for name in names)
        self._free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
        for device in self.all:
            self._free.put(device)
        self._workers = ThreadPoolExecutor(len(self.all), "claq-device") if len(self.all) > 1 else None

    @property
    def first(self) -> torch.device:
        """Where the model's own forward passes run and Hessians are summed up."""
        return self.all[0]

    def map(self, work: Callable[[_Item, torch.device], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Results in the order of the items, which are taken as devices become free.

        Raises:
            Exception: what ``work`` raised; work that has begun is waited for, no other is begun.
        """
        if self._workers is None:
            yield from (work(item, self.first) for item in items)
            return
        running: deque[Future[_Result]] = deque()
        try:
            for item in items:
                if len(running) == len(self.all):
                    yield running.popleft().result()
                running.append(self._workers.submit(self._run, work, item))
            while running:
                yield running.popleft().result()
        finally:
            _stop(running)

    def each(
        self, work: Callable[[_Item, torch.device], _Result], items: Sequence[_Item]
    ) -> Iterator[tuple[int, _Result]]:
        """Number of an item and its result, as they are finished.

        Raises:
            Exception: as for :meth:`map`.
        """
        if self._workers is None:
            yield from ((number, work(item, self.first)) for number, item in enumerate(items))
            return
        running = {self._workers.submit(self._run, work, item): number for number, item in enumerate(items)}
        try:
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            _stop(running)

    def _run(self, work: Callable[[_Item, torch.device], _Result], item: _Item) -> _Result:
        device = self._free.get()
        try:
            # Whether gradients are recorded is a property of a thread.
            with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return work(item, device)
        finally:
            self._free.put(device)


def _stop(running: Iterable[Future[_Result]]) -> None:
    """Cancel what has not begun and wait for the rest, whose result nobody takes."""
    begun = [future for future in running if not future.cancel()]
    wait(begun)

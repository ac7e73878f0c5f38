"""Calibration data that can be read only once, such as a generator: what was read is kept while the compiled function lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import CalibrationError


class Replay:
    """An iterator that gives from the start what it gave before.

    The options that ``torch.compile`` keeps with the compiled function hold the iterator, sessions hold this: what was
    read goes when the iterator does. Those that cannot be watched for that (``map``, ``zip``) are read once.

    Args:
        source: the iterator.

    Raises:
        CalibrationError: when read: there is nothing in it, or nothing any more.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        items: list[Any] = []
        self._items = items
        self._unread: Iterator[Any] | None = source  # options may be gone before the first call
        self._keeps = True
        self._source: Callable[[], Iterator[Any] | None]
        try:
            self._source = weakref.ref(source, lambda _: items.clear())
        except TypeError:
            self._source, self._keeps = lambda: source, False

    def reads(self, source: Iterator[Any]) -> bool:
        """Whether it is this iterator's."""
        return self._source() is source

    def __iter__(self) -> Iterator[Any]:
        source, self._unread = self._source(), None
        given = list(self._items)
        yield from given
        found = bool(given)
        try:
            for item in source or ():
                found = True
                if self._keeps:
                    self._items.append(item)
                yield item
        except (
            Exception
        ):  # whatever the user's iterator raises: it goes on to the caller, and a part of the data is not the data
            self._items.clear()
            raise
        if not found:
            raise CalibrationError(
                "the calibration iterator gives nothing: it is empty, or was read before, for weights that have been changed "
                "since or for another model, and cannot be read again; give a list in its place"
            )


_replays: weakref.WeakValueDictionary[int, Replay] = weakref.WeakValueDictionary()


def replayed(data: Any) -> Any:
    """Calibration data that can be read several times: itself, or for an iterator its one :class:`Replay`."""
    if not isinstance(data, Iterator):
        return data
    known = _replays.get(id(data))
    if known is None or not known.reads(data):
        known = _replays[id(data)] = Replay(data)
    return known

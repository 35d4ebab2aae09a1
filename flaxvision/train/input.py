"""Reads batches in a separate thread, with a time limit."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flaxvision.train import stopping

logger = logging.getLogger(__name__)

TIMEOUT = 600.0  # seconds
_POLL = 0.1  # seconds between two looks at a request to stop
_GRACE = 5.0  # seconds for a batch that is being read when the run stops
_hung: list[threading.Thread] = []


class InputTimeoutError(RuntimeError):
    """The data did not give a batch within the time limit."""


def hung() -> bool:
    """Returns whether a `Reader` was closed while its iterator was hanging, and its thread still runs.

    Such a thread cannot be stopped. It can prevent the interpreter from exiting.
    """
    return any(thread.is_alive() for thread in _hung)


class Reader(Iterator[Any]):
    """Reads an iterator in a thread, so that the caller can stop waiting.

    It reads a batch only when the caller asks for one. Errors of the iterator are raised in the caller.

    Args:
        batches: The iterator.
        timeout: Seconds to wait for a batch; None waits forever.
        due: Function that returns the reason why the run must stop now, or None.
    """

    def __init__(self, batches: Iterator[Any], timeout: float | None, due: Callable[[], str | None] = lambda: None):
        self._batches, self._timeout, self._due = batches, timeout, due
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._waiting = self._late = False
        self._thread = threading.Thread(
            target=_read, args=(batches, self._asked, self._given), name="flaxvision-input", daemon=True
        )

    def __next__(self) -> Any:
        """Returns the next batch.

        Raises:
            InputTimeoutError: There was no batch within the time limit.
            Interrupted: The run must stop.
        """
        if self._thread.ident is None:
            self._thread.start()
        if not self._waiting:
            self._asked.put(True)
            self._waiting = True
        start = time.monotonic()
        while True:
            try:
                batch, error = self._given.get(timeout=_POLL)
                break
            except queue.Empty:
                if (reason := self._due()) is not None:
                    raise stopping.Interrupted(reason) from None
                if self._timeout is not None and time.monotonic() - start > self._timeout:
                    self._late = True
                    raise InputTimeoutError(
                        f"the data must give a batch within {self._timeout:g} s; got none"
                    ) from None
        self._waiting = False
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Ends the thread and closes the iterator, if it has a method `close`. If the thread hangs, logs a warning."""
        self._asked.put(False)
        if self._thread.ident is not None:
            self._thread.join(0 if self._late else _GRACE)
            if self._thread.is_alive():
                _hung.append(self._thread)
                logger.warning("the input pipeline hangs; it is not closed")
                return
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def _read(
    batches: Iterator[Any], asked: queue.SimpleQueue[bool], given: queue.SimpleQueue[tuple[Any, BaseException | None]]
) -> None:
    while asked.get():
        try:
            given.put((next(batches), None))
        except BaseException as error:
            given.put((None, error))

"""Ends one process of a run at once: its main thread may wait forever for a computation.

Nothing here waits for a lock that the main thread may hold, such as that of `sys.stderr`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_handlers: list[Any] = []  # keeps the handlers alive


def leave(message: str | None, status: int = 1) -> NoReturn:
    """Ends this process without waiting for anything.

    Args:
        message: Its last line on stderr; None for none.
        status: Its exit status.
    """
    if message is not None:
        say(message if status == 0 else f"error: {message}")
    flush()
    os._exit(status)


def say(line: str) -> None:
    """Writes a line to stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def flush() -> None:
    """Flushes the streams within a second."""

    # In a thread, because nobody may read a stream.
    def act() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(1.0)


def stacks() -> None:
    """Writes the stacks of all threads to stderr. It reads no file, since the file system may be what hangs."""
    faulthandler.dump_traceback(2)


def arm(seconds: float) -> None:
    """Ends this process with status 1 and its stacks unless it is armed again in time. It needs no Python thread.

    Args:
        seconds: Seconds from now.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def disarm() -> None:
    """Takes back the last `arm`."""
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def exit_on_abort(starting: str, ended: str) -> Iterator[Callable[[], None]]:
    """Turns C's `abort` into a message and exit status 1. JAX calls it when a process is dead or the coordinator gone.

    JAX calls it in a thread of its own, while the main thread may wait forever. JAX's callback for this case crashes
    too, because it cannot pass the reason to Python. Python's signal handlers run only in the main thread, so the
    handler is installed with ctypes.

    The handler has to be Python: C has no function that fits as a handler and exits with status 1. It may wait forever
    for the interpreter or for a lock of the allocator. Then the other threads do too, no one calls `arm` again, and
    the last call of it ends the process.

    Args:
        starting: The message in the block.
        ended: The message after the block.

    Yields:
        A function that brings back the handler from before.
    """
    messages = [ended, starting]
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = prototype(lambda number: leave(messages[-1]))
    _handlers.append(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield lambda: install(signal.SIGABRT, before)
    finally:
        messages.pop()

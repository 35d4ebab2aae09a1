"""The lock of a work directory: one run at a time.

The lock belongs to a process and ends with it, however it ends, so none has to be removed by hand. The file says who
holds it.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

__all__ = ["WorkdirInUseError", "acquire", "release"]

logger = logging.getLogger(__name__)

NAME = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_held: dict[Path, int] = {}  # the open file of each lock


class WorkdirInUseError(RuntimeError):
    """Another run uses the work directory; the message names it."""


def acquire(directory: Path) -> None:
    """Locks a work directory for this process, until `release` or the end of the process.

    Does nothing if this process holds the lock already. If the file system has no locks, it only logs that.

    Args:
        directory: The directory, which must exist.

    Raises:
        WorkdirInUseError: Another process holds the lock.
        OSError: The file cannot be written.
    """
    directory = directory.resolve()
    if directory in _held:
        return
    import fcntl  # not on Windows

    path = directory / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirInUseError(
                f"the work directory {directory} is in use by {_holder(path)}; wait for it or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("the file system of %s has no locks; only one run may use it", directory)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        text = {"host": socket.gethostname(), "pid": os.getpid(), "command": sys.argv, "time": now}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(text) + "\n").encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[directory] = descriptor


def release(directory: str | os.PathLike[str]) -> None:
    """Gives a lock back before the process ends; without a lock it does nothing.

    Args:
        directory: The work directory.
    """
    descriptor = _held.pop(Path(directory).resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        text: dict[str, Any] = json.loads(path.read_text())
        command = " ".join(text["command"])
        return f"process {text['pid']} on {text['host']} since {text['time']} ({command})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just writing the file
        return "another process"

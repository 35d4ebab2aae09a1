"""A lock that allows one run at a time in a work directory.

The operating system releases the lock when the process ends, even after a crash, so stale locks do not occur. The lock
file names the process that holds the lock.
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
    """Another run uses the work directory. The message names its process, host and command."""


def acquire(directory: Path) -> None:
    """Locks a work directory until `release` or the end of this process.

    It does nothing if this process already holds the lock. If the file system or the operating system has no
    locks, it logs a warning.

    Args:
        directory: The directory, which must exist.

    Raises:
        WorkdirInUseError: Another process holds the lock.
        OSError: The file cannot be written.
    """
    directory = directory.resolve()
    if directory in _held:
        return
    path = directory / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            logger.warning("this system has no file locks; only one run may use %s", directory)
        except BlockingIOError as error:
            raise WorkdirInUseError(
                f"the work directory {directory} is in use by {_holder(path)}; wait for it or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("the file system of %s has no locks; only one run may use the directory", directory)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        text = {"host": socket.gethostname(), "pid": os.getpid(), "command": sys.argv, "time": now}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(text) + "\n").encode())
    except BaseException:
        os.close(descriptor)
        raise
    _held[directory] = descriptor


def release(directory: str | os.PathLike[str]) -> None:
    """Releases a lock before the process ends. It does nothing if this process does not hold the lock.

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
    except (OSError, ValueError, KeyError, TypeError):  # the holder is writing the file at this moment
        return "another process"

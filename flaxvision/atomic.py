"""Atomic writes: a reader sees the old file or the complete new one, even after a crash or a power cut.

Every file and directory that the package replaces goes through this module.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["make_directory", "move", "replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write to and moves the file to `path` when the block ends without an error.

    The temporary file is in the same directory, which is created if needed. An error in the block removes the
    temporary file and leaves `path` as it was.

    Args:
        path: The file to create or replace.

    Yields:
        The temporary path, which does not exist yet.

    Raises:
        OSError: The file cannot be written. The error has the errno of its cause and names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        make_directory(path.parent)
        yield partial
        move(partial, path)
    except OSError as error:
        # A full disk names no file, and nobody knows the temporary one.
        if error.errno is None or error.filename not in (None, str(partial), str(path.parent)):
            raise
        raise OSError(error.errno, f"file cannot be written: {error.strerror}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # usually it has been moved
            partial.unlink()


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, durably; does nothing if it exists.

    Args:
        path: The directory.

    Raises:
        OSError: It cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_directory(folder.parent)


def move(source: Path, target: Path) -> None:
    """Renames a file or a directory within one file system, durably.

    The contents reach the disk before the rename, and the rename reaches it before this function returns. A file that
    has the name `target` is replaced; a directory with that name must be empty.

    Args:
        source: What to rename.
        target: The new name.

    Raises:
        OSError: The contents cannot be flushed to the disk, or the rename fails.
    """
    for folder, _, names in os.walk(source):  # nothing when `source` is a file
        for name in names:
            _flush(os.path.join(folder, name))
        _flush_directory(folder)
    if source.is_file():
        _flush(source)
    os.replace(source, target)
    _flush_directory(target.parent)


def _flush(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(path: str | os.PathLike[str]) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open or flush a directory
        _flush(path)

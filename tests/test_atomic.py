"""Files that are replaced: the old one or the complete new one, never a part."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxvision import atomic

ROOT = Path(__file__).parents[1]


def test_the_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("old", "new"):
        with atomic.replacing(path) as partial:
            assert partial.parent == path.parent
            assert not partial.exists()
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), ConnectionError("lost")])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic.replacing(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="file cannot be written: No space left") as caught, atomic.replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(FileNotFoundError, match="file cannot be written") as caught, atomic.replacing(path):
        pass  # nothing is written
    assert caught.value.filename == str(path)
    with atomic.replacing(path) as partial:
        partial.write_text("text")
    with pytest.raises(OSError, match="file cannot be written") as caught, atomic.replacing(path / "b.txt"):
        pass
    assert caught.value.filename == str(path / "b.txt")
    other = FileNotFoundError(errno.ENOENT, "No such file", "other.txt")
    with pytest.raises(FileNotFoundError) as caught, atomic.replacing(path):
        raise other
    assert caught.value is other


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append("rename")
        replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the names of open files are not known here")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "a").write_text("a")
    (tmp_path / "source" / "inner" / "b").write_text("b")
    atomic.move(tmp_path / "source", tmp_path / "target")
    assert events == ["a", "source", "b", "inner", "rename", tmp_path.name]
    assert (tmp_path / "target" / "inner" / "b").read_text() == "b"
    events.clear()
    atomic.move(tmp_path / "target" / "a", tmp_path / "c")
    assert events == ["a", "rename", tmp_path.name]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os; from flaxvision import atomic\n"
        f"with atomic.replacing({str(path)!r}) as partial:\n"
        "    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 9
    assert path.read_text() == "old"


def test_nothing_else_renames_files():
    """Whoever renames a file without this module loses it in a power cut."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("flaxvision", "experiments", "benchmarks", "parity")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(call in line for call in ("os.replace(", "os.rename(", ".rename(", "shutil.move("))
    ]
    assert len(found) == 1, found
    assert found[0].startswith("flaxvision/atomic.py")

"""benchmarks/machine.py: commits, and which files refuse records without a clean one. The recorded results."""

import json
import re
import subprocess
from pathlib import Path

import jax
import pytest

from benchmarks import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository in the place of this checkout."""
    root = tmp_path / "checkout"
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "file.py").write_text("a = 1\n")

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, "-C", root, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", root)
    monkeypatch.setattr(machine, "COMMITTED", (root / "benchmarks" / "results", root / "parity" / "ledger.jsonl"))
    return root


def test_recorded_results_need_a_clean_commit(checkout, tmp_path):
    results = checkout / "benchmarks" / "results" / "new.jsonl"
    clean = machine.commit(checkout)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    machine.check_output(None)
    for _ in range(2):  # the file of results, which now differs from the commit, does not count
        machine.append(results, {"commit": machine.commit(checkout)})
    (checkout / "file.py").write_text("a = 2\n")
    assert machine.commit(checkout) == f"{clean}+"
    assert machine.changed_files(checkout) == ["file.py"]
    message = r"working tree differs from the commit: .*; commit first, or pass --output PATH"
    with pytest.raises(ValueError, match=message):
        machine.append(results, {"commit": f"{clean}+"})
    assert len(results.read_text().splitlines()) == 2
    machine.append(tmp_path / "elsewhere.jsonl", {"commit": f"{clean}+"})


def test_without_git_the_commit_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert machine.commit(tmp_path) is None
    with pytest.raises(ValueError, match=r"commit is unknown: .*; set FLAXVISION_COMMIT"):
        machine.append(machine.RESULTS / "none.jsonl", {"commit": None})
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "a" * 40)
    assert machine.commit(tmp_path) == "a" * 40


def test_description():
    found = machine.describe(jax.devices()[0], 2)
    assert found["devices"] == 2
    assert found["cores"] >= 1
    for name in ("time", "device", "platform", "cpu", "matmul_precision", "python", "jax", "jaxlib", "flax"):
        assert found[name]
    assert machine.rounded({"a": [1.23456789, 2], "b": "c"}) == {"a": [1.23457, 2], "b": "c"}


@pytest.mark.parametrize("file", sorted(machine.RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_every_recorded_result_says_where_it_was_measured(file: Path):
    lines = list(map(json.loads, file.read_text().splitlines()))
    assert lines
    for line in lines:
        what = {name: line[name] for name in ("model", "case") if name in line}
        assert re.fullmatch("[0-9a-f]{40}", line["commit"]), (what, line["commit"])
        for name in ("device", "cpu", "cores", "python", "jax", "jaxlib", "flax", "time"):
            assert line[name], (what, name)
        assert line["load_before"] is not None, what

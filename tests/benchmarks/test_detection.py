import json
import sys

import pytest

from benchmarks import detection


def test_the_cases_without_torchvision(monkeypatch):
    names = [case.name for case in detection.select_cases(quick=True)]
    assert len(names) == len(set(names)) == 4
    assert {tuple(case.ours().boxes.shape[1:]) for case in detection.select_cases(quick=True)} == {(100, 4)}


@pytest.mark.reference
def test_a_quick_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    path = tmp_path / "found.jsonl"
    detection.main(detection.Config(quick=True, output=path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(capsys.readouterr().out.splitlines()) == 11
    assert all(record["flaxvision"]["ms"] > 0 for record in records)
    assert sum("torchvision" in record["speedup"] for record in records) == 7
    assert "torch" in sys.modules

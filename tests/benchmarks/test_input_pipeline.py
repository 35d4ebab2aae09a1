"""benchmarks/input_pipeline.py runs and writes a line per source and pipeline."""

import json

import pytest

from benchmarks import input_pipeline


@pytest.mark.reference
def test_a_line_per_source_and_pipeline(tmp_path):
    output = tmp_path / "new" / "results.jsonl"
    assert input_pipeline.main(input_pipeline.Config(rounds=2, quick=True, output=output)) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["pipeline"] for line in lines] == [
        *(list(input_pipeline.PIPELINES) * 2),
        "ours",
        "grain",
        "grain_threads",
    ]
    for line in lines:
        for name in ("images_per_s", "cpu_ms", "first_ms"):
            assert 0 < line[f"{name}_q1"] <= line[name] <= line[f"{name}_q3"]
        assert line["grain"]
        assert line["commit"]

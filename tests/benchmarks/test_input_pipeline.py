"""benchmarks/input_pipeline.py runs and writes a line per source and pipeline."""

import json

import pytest

from benchmarks import input_pipeline


@pytest.mark.slow
def test_a_line_per_source_and_pipeline(tmp_path):
    output = tmp_path / "new" / "results.jsonl"
    config = input_pipeline.Config(rounds=1, quick=True, output=output)
    assert input_pipeline.main(config) == 0
    folder, *lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert folder["case"] == "folder"
    assert folder["files"] == 2010
    assert 0 < folder["start_s"] < 10
    expected = [
        (case.name, pipeline)
        for case in input_pipeline.cases(config, tmp_path)
        for pipeline in case.pipelines
        if input_pipeline.is_installed(pipeline)
    ]
    assert [(line["case"], line["pipeline"]) for line in lines] == expected
    for line in lines:
        for name in ("images_per_s", "cpu_ms", "first_ms"):
            assert 0 <= line[f"{name}_q1"] <= line[name] <= line[f"{name}_q3"]
        assert line["images_per_s"] > 0
        assert line["commit"]
        if line["case"].startswith("sleeping") and line["pipeline"] == "ours":
            assert line["of_bare_threads"] > 0.3

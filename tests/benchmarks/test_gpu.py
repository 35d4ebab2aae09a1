"""benchmarks/gpu.sh and gpu.py: every stage as a dry run on the CPU."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu, machine

PARTS = {
    "1": {"tests", "agreement", "resume"},
    "2": {"train", "forward"},
    "3": {"lenet_dli"},
    "4": {"demo"},
    "5": {"kernels", "train"},
    "6": {"folder"},
    "7": {"mlp"},
}


def run(stage, tmp_path, **environment):
    environment = {
        **os.environ,
        "TINY": "1",
        "OUT": str(tmp_path),
        "RUNS": str(tmp_path / "runs"),
        "PYTHON": sys.executable,
        **environment,
    }
    environment |= {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    script = machine.ROOT / "benchmarks" / "gpu.sh"
    return subprocess.run([script, *stage.split()], capture_output=True, text=True, env=environment, cwd=tmp_path)


def read(file):
    return list(map(json.loads, file.read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", PARTS)
def test_a_dry_run_of_every_stage(stage, tmp_path):
    done = run(stage, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(tmp_path / f"{stage}.jsonl")
    modes = {mode for record in records for mode in ("train", "forward") if mode in record}
    names = {record["name"] if record["benchmark"] == "gpu" else record["model"] for record in records} | modes
    assert names >= PARTS[stage]
    for record in records:
        assert "problem" not in record, record
        assert record.get("passed", True), record
        for field in ("device", "cpu", "commit", "jax", "jaxlib", "flax", "python", "load_before"):
            assert field in record
        peers = [*record.get("left_out", {}), *(name for name in ("keras", "torch") if name in record)]
        assert record["benchmark"] != "throughput" or stage == "5" or {"keras", "torch"} <= set(peers)


def test_usage(tmp_path):
    done = run("9", tmp_path)
    assert done.returncode == 2
    assert "benchmarks/gpu.sh STAGE [PART]" in done.stderr
    assert "TINY=1" in done.stderr


def test_a_gpu_is_needed_without_tiny(tmp_path):
    done = run("2 train", tmp_path, TINY="", JAX_PLATFORMS="cpu")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.jsonl"))


def test_parts_are_left_out_when_the_time_is_up(tmp_path):
    done = run("3", tmp_path, LIMIT="1")
    assert done.returncode == 0, done.stderr
    (record,) = read(tmp_path / "3.jsonl")
    assert (record["name"], record["problem"]) == ("lenet_dli", "left out: no time")


def test_summary_of_kernels():
    ms = 1e6
    kernels = [("a", 0.0, 2 * ms), ("b", 1 * ms, 2 * ms), ("a", 6 * ms, 2 * ms)]
    found = gpu.summarize(kernels, steps=2, top=1)
    assert found["busy_ms"] == 2.5
    assert found["span_ms"] == 4
    assert found["idle_share"] == pytest.approx(3 / 8)
    assert found["kernels"] == [{"name": "a", "ms": 2.0, "share": 2 / 3, "count": 1.0}]
    assert gpu.summarize([], steps=1, top=0) == {"busy_ms": 0.0, "span_ms": 0.0, "idle_share": 1.0}


def test_the_profile_has_the_operations_of_the_device():
    square = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.ones((300, 300))
    square(x).block_until_ready()
    with gpu.profiled() as kernels:
        square(x).block_until_ready()
    assert kernels
    assert all(duration >= 0 for _, _, duration in kernels)


def test_tests_are_counted(tmp_path):
    file = tmp_path / "tests" / "test_example.py"
    file.parent.mkdir()
    file.write_text("def test_good():\n    pass\ndef test_bad():\n    assert False\n")
    part = gpu.Tests(tmp_path / "r.jsonl", arguments=f"-n 0 -p no:cacheprovider {file}", seconds=60)
    assert gpu.main(part) == 1
    (record,) = read(tmp_path / "r.jsonl")
    assert record["outcomes"] == {"passed": 1, "failed": 1}
    assert [name.rpartition("::")[2] for name in record["failed"]] == ["test_bad"]
    assert record["finished"]
    assert not record["passed"]


def test_a_training_that_takes_too_long_is_recorded(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    part = gpu.Training(tmp_path / "r.jsonl", command=str(tmp_path / "slow.py"), seconds=31)
    assert gpu.main(part) == 1
    (record,) = read(tmp_path / "r.jsonl")
    assert record["printed"] == ["begun", "exit status 124"] or record["printed"] == ["exit status 124"]
    assert record["seconds"] < 30
    assert not record["passed"]

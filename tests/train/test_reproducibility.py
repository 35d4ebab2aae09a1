"""The flags of deterministic runs reach XLA before it starts, or not at all."""

import os
import subprocess
import sys

import pytest

from flaxvision.train import deterministic


def run(program, flags=""):
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_it_sets_the_flag_and_xla_takes_it():
    program = "import os, jax, flaxvision as fv; fv.train.deterministic(); fv.train.deterministic(); jax.devices(); "
    program += "print(os.environ['XLA_FLAGS'], int(jax.numpy.ones(3).sum()), jax.device_count())"
    ended = run(program, "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=false")
    want = "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true 3 2\n"
    assert ended.stdout == want, ended.stderr


def test_it_is_too_late_once_jax_runs(monkeypatch):
    import jax

    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    with pytest.raises(RuntimeError, match=r"deterministic\(\) must be called before JAX is used; got a call after"):
        deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to="
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    deterministic()  # nothing to do

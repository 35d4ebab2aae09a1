"""Memory and time of checkpoints of a few hundred megabytes, measured in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEGABYTES = 320

COMMON = """
import json, resource, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from flaxvision.checkpoint import Checkpoints

def resident(peak=False):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM" if peak else "VmRSS")) * 1024

def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")

def warm_up(directory):  # imports, thread pools
    small = {"w": np.zeros(1000, np.float32)}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, small, progress={}, wait=True)
        checkpoints.restore(small)

megabytes, layers = int(sys.argv[2]), 40
shape = (megabytes * 250_000 // layers,)
"""

SAVE = """
warm_up(sys.argv[1] + "/small")
make = jax.jit(lambda key: jax.random.normal(key, shape))
state = {f"layer{i:02d}": make(key) for i, key in enumerate(jax.random.split(jax.random.key(0), layers))}
jax.block_until_ready(state)
size = sum(x.nbytes for x in state.values())
train = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5, state), donate_argnums=0)
state = jax.block_until_ready(train(state))
with Checkpoints(sys.argv[1] + "/big", keep_latest=1) as checkpoints:
    times, peaks = [], []
    for step in range(3):  # the quickest counts: the machine may be busy
        base = resident() - size
        reset_peak()
        start = time.perf_counter()
        checkpoints.save(step, state, progress={})
        stopped = time.perf_counter() - start
        for _ in range(2):
            state = jax.block_until_ready(train(state))
        checkpoints.wait()
        times.append((stopped, time.perf_counter() - start))
        peaks.append((resident(True) - base) / size)
stopped, total = min(times, key=lambda pair: pair[0] / pair[1])
print(json.dumps({"peak": max(peaks), "stopped": stopped, "total": total}))
"""

RESTORE = """
warm_up(sys.argv[1] + "/small")
base = resident()
reset_peak()
template = {f"layer{i:02d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(layers)}
start = time.perf_counter()
state = Checkpoints(sys.argv[1] + "/big").restore(template).state
total = time.perf_counter() - start
size = sum(x.nbytes for x in state.values())
print(json.dumps({"peak": (resident(True) - base) / size, "live": sum(x.nbytes for x in jax.live_arrays()) / size,
                  "total": total}))
"""


def measure(program, *arguments):
    # Freed arrays go back to the system at once, so that the peak is what is held and not what the allocator keeps.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    command = [sys.executable, "-c", COMMON + program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is not known here")
def test_saving_and_restoring_hold_little_more_than_the_state(tmp_path):
    saved = measure(SAVE, tmp_path, MEGABYTES)
    assert saved["peak"] < 2.2, saved
    assert saved["stopped"] < 0.05 * saved["total"], saved
    restored = measure(RESTORE, tmp_path, MEGABYTES)
    assert restored["peak"] < 2.2, restored
    assert restored["live"] < 1.01, restored

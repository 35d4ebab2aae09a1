"""Eight virtual CPU devices, strict ranks, quick compilation, and a compilation cache that outlives the run.

Most of the time of the tests is compilation. LLVM therefore compiles without optimization, and even the smallest
program is kept in the cache. `FLAXVISION_OPTIMIZED=1` compiles as users do. Tests of rounding do so in every run: they
pass `AS_USERS` to `jax.jit` as `compiler_options`.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

if not os.environ.get("FLAXVISION_OPTIMIZED"):
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import pytest

CACHE = Path(os.environ.get("FLAXVISION_TEST_CACHE", Path(tempfile.gettempdir()) / f"flaxvision-jax-{os.getuid()}"))
FLAGS = os.environ["XLA_FLAGS"]
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a program in another process, which compiles and caches as this one does."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # some processors log a long line for each program from the cache
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",  # the last one counts
    }


@pytest.fixture
def rng():
    return jax.random.key(0)

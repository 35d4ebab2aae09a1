"""Options of `jax.jit` for tests whose results depend on how LLVM compiles; see `conftest.py`."""

# As users compile: with fused multiply-adds, and the same arithmetic for every element of an array.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

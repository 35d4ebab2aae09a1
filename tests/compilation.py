"""Options of `jax.jit` for tests whose results depend on how LLVM compiles; see `conftest.py`."""

# As users compile. The bits of recorded results depend on fused multiply-adds.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

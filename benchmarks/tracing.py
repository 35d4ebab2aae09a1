"""Times `create_model` and `jax.eval_shape` of `init`: the cost of a model before anything is compiled.

    python -m benchmarks.tracing                                                  # every classifier, three times
    python -m benchmarks.tracing --models 'inception*' --output benchmarks/results/tracing.jsonl

Each repetition starts with empty caches. The figure is the median.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

import flaxvision as fv
from benchmarks import machine


@dataclass(frozen=True)
class Config:
    """Time the tracing of registered models."""

    models: str = "*"
    """Shell pattern of registry names."""
    repetitions: int = 3
    """Repetitions of each model."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File of JSON lines that the records are appended to, one per model."""


def seconds(name: str) -> float:
    """Returns the time of one tracing with empty caches."""
    jax.clear_caches()
    for module in [m for key, m in sys.modules.items() if key.startswith("flaxvision.layers")]:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):  # a functools cache, which JAX does not know of
                value.cache_clear()
    info = fv.model_info(name)
    x = jax.ShapeDtypeStruct((1, *info.input_size, info.channels), jnp.float32)
    start = time.perf_counter()
    jax.eval_shape(fv.create_model(name).init, jax.random.key(0), x)
    return time.perf_counter() - start


def main(config: Config) -> None:
    """Times every model, and appends the records to the output file.

    Raises:
        ValueError: A setting is out of range, or the output is a recorded result and the commit is not clean.
    """
    if config.repetitions < 1:
        raise ValueError(f"--repetitions must be at least 1; got {config.repetitions}")
    names = fv.list_models(config.models)
    if not names:
        raise ValueError(f"--models must match a name of flaxvision.list_models(); got {config.models!r}")
    machine.check_output(config.output)
    seconds(names[0])  # fills what is imported or looked up only once
    where = machine.describe(jax.devices()[0])
    for name in names:
        times = [seconds(name) for _ in range(config.repetitions)]
        print(f"{name:24} {statistics.median(times):6.2f} s", flush=True)
        if config.output:
            record = {"benchmark": "tracing", "model": name, "seconds": [round(t, 3) for t in times], **where}
            machine.append(config.output, record)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.tracing"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

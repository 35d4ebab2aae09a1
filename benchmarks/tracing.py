"""How long `create_model` and `jax.eval_shape` of its `init` take: what a model costs before anything is compiled.

    python benchmarks/tracing.py                                                  # every classifier, three times
    python benchmarks/tracing.py --models 'inception*' --output benchmarks/results/tracing.jsonl

Every repetition starts with empty caches; the figure is the median.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from machine import describe

import flaxvision as fv
from flaxvision.layers import lowering


@dataclass(frozen=True)
class Config:
    """Time the tracing of models."""

    models: str = "*"
    """A shell pattern of registry names."""
    repetitions: int = 3
    """Times that each is traced."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A .jsonl file to which one line per model is appended."""


def seconds(name: str) -> float:
    """The time of one tracing with empty caches."""
    jax.clear_caches()
    lowering._checked.cache_clear()
    info = fv.model_info(name)
    x = jax.ShapeDtypeStruct((1, *info.input_size, info.channels), jnp.float32)
    start = time.perf_counter()
    jax.eval_shape(fv.create_model(name).init, jax.random.key(0), x)
    return time.perf_counter() - start


def main(config: Config) -> int:
    """Times every model; returns the process's exit status."""
    names = fv.list_models(config.models)
    if config.repetitions < 1:
        raise ValueError(f"--repetitions must be at least 1; got {config.repetitions}")
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    if not names:
        raise ValueError(f"no model has a name like {config.models!r}; see flaxvision.list_models()")
    seconds(names[0])  # what is imported and looked up once
    machine = describe(jax.devices()[0])
    for name in names:
        times = [seconds(name) for _ in range(config.repetitions)]
        print(f"{name:24} {statistics.median(times):6.2f} s", flush=True)
        if config.output:
            line = {"benchmark": "tracing", "model": name, "seconds": [round(t, 3) for t in times], **machine}
            with config.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""Times the forward pass and the train step of a registered classifier, alone or beside Keras and torch.

    python benchmarks/throughput.py --model lenet_dli
    python benchmarks/throughput.py --model lenet_dli --vs keras torch     # wants: pip install -e ".[reference]"

Every run appends one JSON line to benchmarks/results/throughput.jsonl. It takes a minute with the small models.

What is timed: the forward pass in evaluation, and the whole train step (`fv.train.train_step` under `jit_step`:
forward, backward, SGD with momentum, donated state) with cross-entropy. Each step is waited for, so that it includes
the call from Python; the batch of random pixels lies on the device already. The libraries of `--vs` get the same batch,
weights, loss and optimizer, and all are timed in one process in turns of `--block` steps, whose order changes every
round: whatever else the machine does hits all alike. Trust the ratios first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import flax
import jax
import jax.numpy as jnp
import machine
import numpy as np
import published
import references
import tyro

import flaxvision as fv

Library = Literal["keras", "torch"]
RESULTS = Path(__file__).parent / "results" / "throughput.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a registered classifier."""

    model: str = "lenet_dli"
    """A registered classifier."""
    batch_size: int = 128
    """Images a step, over all devices."""
    image_size: int | None = None
    """Height and width of the images; the published size by default."""
    mode: Literal["forward", "train", "both"] = "both"
    """What to time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""
    steps: int = 30
    """Timed steps of each library."""
    warmup: int = 3
    """Steps of each before, of which the first compiles."""
    block: int = 3
    """Steps of one library before the next has its turn."""
    vs: Annotated[tuple[tuple[Library, ...], ...], tyro.conf.UseAppendAction] = ()
    """Libraries to time beside ours: keras, torch, or both (--vs keras torch, or --vs twice)."""
    devices: int = 1
    """Devices that share the batch; --vs wants one."""
    output: Path = RESULTS
    """File of JSON lines that the result is appended to."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Those of `vs`, each once."""
        return tuple(dict.fromkeys(library for group in self.vs for library in group))


@dataclasses.dataclass
class Contender:
    """One library's step.

    Attributes:
        run: Does one step and waits for its end.
        first: Seconds of the first one, compilation included.
        times: Seconds of the timed ones.
    """

    run: Callable[[], Any]
    first: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)

    def warm_up(self, steps: int) -> None:
        """Does the first steps, untimed but for the very first."""
        self.first = _seconds(self.run)
        for _ in range(steps - 1):
            self.run()

    def result(self, batch_size: int) -> dict[str, float]:
        """Medians and quartiles of the timed steps; `compile_s` is what the first step took beyond the median one."""
        q1, median, q3 = np.percentile(self.times, (25, 50, 75))
        return {
            "images_per_s": batch_size / median,
            "ms": 1e3 * median,
            "ms_q1": 1e3 * q1,
            "ms_q3": 1e3 * q3,
            "compile_s": max(0.0, self.first - median),
        }


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and appends one result.

    Args:
        config: What to measure.

    Returns:
        The result as written.

    Raises:
        ValueError: No such model or not a classifier, a number that is not positive, too many devices, or a model that
            `--vs` does not have.
        ImportError: A library of `--vs` is not installed.
        RuntimeError: A library's network is not the same network.
    """
    check(config)
    info = fv.model_info(config.model)
    mesh = fv.train.make_mesh(jax.devices()[: config.devices])
    record = {
        "benchmark": "throughput",
        "model": config.model,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "optimizer": f"sgd {references.LEARNING_RATE}, momentum {references.MOMENTUM}",
        "steps": config.steps,
        "warmup": config.warmup,
        "block": config.block,
        **machine.describe(jax.devices()[0], config.devices),
    }
    fields = {} if config.model in references.CHAINS else published.fields(config.model, config.libraries)
    model = fv.create_model(config.model, dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None, **fields)
    random = np.random.default_rng(0)
    size = (config.image_size,) * 2 if config.image_size else info.input_size
    shape = size if len(size) == 1 else (*size, info.channels)
    images = random.standard_normal((config.batch_size, *shape), np.float32)
    weights, classes = initial_weights(model, images)
    labels = random.integers(0, classes, config.batch_size).astype(np.int32)
    params = sum(w.size for w in weights)
    record.update(params=params, input=list(images.shape), fields=fields)

    batch = jax.device_put(
        {"image": images, "label": labels}, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    modes = ("forward", "train") if config.mode == "both" else (config.mode,)
    makers = {"forward": make_forward, "train": make_train}
    contenders: dict[str, dict[str, Contender]] = {mode: {} for mode in modes}
    for mode in modes:  # all of ours before the others are imported: the process's peak memory is ours so far
        run, flops = makers[mode](model, batch, mesh)
        contenders[mode]["flaxvision"] = ours = Contender(run)
        ours.warm_up(config.warmup)
        peak, record["peak_memory"] = machine.peak_memory(jax.devices()[0])
        record[mode] = {"flaxvision": {"peak_memory_bytes": peak, "flops": flops}}

    if config.libraries:
        forward, _ = make_forward(model, batch, mesh)
        bfloat16 = config.dtype == "bfloat16"
        variables = published.variables_of(model, images.shape[1:])
        logits = np.asarray(forward())
        problem = references.Problem(config.model, images, labels, bfloat16, weights, logits, variables, fields)
        for library in config.libraries:
            reference = references.LOADERS[library](problem)
            if config.model in references.CHAINS and reference.params != params:
                raise RuntimeError(f"the {library} network has {reference.params:,} parameters, ours has {params:,}")
            record[library] = reference.version
            for mode in modes:
                contenders[mode][library] = Contender(getattr(reference, mode))
                contenders[mode][library].warm_up(config.warmup)

    for mode in modes:
        time_in_turns(list(contenders[mode].values()), config.steps, config.block)
        for name, contender in contenders[mode].items():
            record[mode].setdefault(name, {}).update(contender.result(config.batch_size))
        ours = record[mode]["flaxvision"]
        ours["flops_per_s"] = 1e3 * ours["flops"] / ours["ms"] if ours["flops"] else None
        record[mode]["speedup"] = {name: speedup(contenders[mode], name, config.block) for name in config.libraries}

    record = _rounded(record)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.output.open("a") as file:
        file.write(json.dumps(record) + "\n")
    show(record, modes)
    return record


def check(config: Config) -> None:
    """Refuses what can't be measured; see `main`."""
    info = fv.model_info(config.model)
    if info.task != "classification":
        names = ", ".join(fv.list_models(task="classification"))
        raise ValueError(f"{config.model} does {info.task}; this benchmark is for classifiers: {names}")
    for name in ("batch_size", "steps", "warmup", "block", "devices"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}")
    if config.devices > jax.device_count():
        raise ValueError(f"devices must be at most {jax.device_count()}, as many as there are; got {config.devices}")
    if config.libraries and config.devices > 1:
        raise ValueError(f"--vs compares on one device; got devices={config.devices}")
    for library in config.libraries:
        references.check_available(library, config.model)


def initial_weights(model: Any, images: np.ndarray) -> tuple[list[np.ndarray], int]:
    """The parameters in the order in which the model makes them, and the number of its outputs.

    The values are those of `_create_state`; a traced pytree would have its keys sorted.
    """
    paths: list[tuple[str, ...]] = []

    def init(x):
        logits, variables = model.init_with_output(jax.random.key(0), x)
        paths.extend(flax.traverse_util.flatten_dict(variables["params"]))
        return logits

    logits = jax.eval_shape(init, jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))
    params = flax.traverse_util.flatten_dict(_create_state(model, images).params)
    return [np.array(params[path]) for path in paths], logits.shape[-1]


def make_forward(model: Any, batch: dict[str, jax.Array], mesh: jax.sharding.Mesh) -> tuple[Callable[[], Any], Any]:
    """The forward pass in evaluation, and its FLOPs."""
    state = jax.device_put(
        _create_state(model, batch["image"]), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    step = fv.train.jit_step(lambda state, batch: state.apply_fn(state.variables, batch["image"], train=False), mesh)
    return lambda: jax.block_until_ready(step(state, batch)), _flops(step, state, batch)


def make_train(model: Any, batch: dict[str, jax.Array], mesh: jax.sharding.Mesh) -> tuple[Callable[[], Any], Any]:
    """The train step, which goes on from its own last state, and its FLOPs."""
    state, rng = _create_state(model, batch["image"]), jax.random.key(1)
    step = fv.train.jit_step(functools.partial(fv.train.train_step, objective=fv.train.classification()), mesh)
    flops = _flops(step, state, batch, rng)

    def run():
        nonlocal state
        state, metrics = step(state, batch, rng)
        return jax.block_until_ready((state, metrics))[1]

    return run, flops


def time_in_turns(contenders: list[Contender], steps: int, block: int) -> None:
    """Times `steps` steps of each, `block` at a time, round-robin; each round another one begins."""
    for done in range(0, steps, block):
        turn = done // block % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            contender.times.extend(_seconds(contender.run) for _ in range(min(block, steps - done)))


def speedup(contenders: dict[str, Contender], library: str, block: int) -> dict[str, float]:
    """How many times faster ours is: the ratio of the median times, and quartiles of the rounds' own ratios."""
    ours, theirs = np.asarray(contenders["flaxvision"].times), np.asarray(contenders[library].times)
    starts = range(0, len(ours), block)
    rounds = [np.median(theirs[i : i + block]) / np.median(ours[i : i + block]) for i in starts]
    q1, q3 = np.percentile(rounds, (25, 75))
    return {"ratio": float(np.median(theirs) / np.median(ours)), "q1": float(q1), "q3": float(q3)}


def show(record: dict[str, Any], modes: tuple[str, ...]) -> None:
    """Prints the result for people."""
    print(f"{record['model']}, {record['params']:,} parameters, batch {record['batch_size']}, {record['dtype']}")
    print(f"{record['device']}, {record['cores']} cores; load {record['load_before']} before")
    for mode in modes:
        for name, r in record[mode].items():
            if name == "speedup":
                continue
            line = f"{mode:8}{name:11}{r['ms']:9.2f} ms [{r['ms_q1']:.2f}, {r['ms_q3']:.2f}]"
            line += f"{r['images_per_s']:12.1f} img/s"
            line += f"  compile {r['compile_s']:5.2f} s"
            if name == "flaxvision":
                memory = r["peak_memory_bytes"]
                line += f"  {(r['flops_per_s'] or 0) / 1e9:.1f} GFLOP/s"
                line += f"  {memory / 2**20:.0f} MiB ({record['peak_memory']})" if memory else ""
            else:
                ratio = record[mode]["speedup"][name]
                line += f"  ours is {ratio['ratio']:.2f} times as fast [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
            print(line)


def _create_state(model: Any, images: Any) -> fv.train.TrainState:
    tx = fv.train.optimizer("momentum", references.LEARNING_RATE, momentum=references.MOMENTUM)
    sample = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    variables = published.variables_of(model, images.shape[1:])
    return fv.train.create_state(model, tx, jax.random.key(0), sample, variables=variables)


def _flops(step: Any, *arguments: Any) -> float | None:
    # Of the plain form of the program, by XLA's count: the CPU's own forms of the convolutions do other work for the
    # same result, and XLA counts the body of a loop once.
    cost = step.lower(*arguments, lowering_platforms=("tpu",)).cost_analysis() or {}
    return float(cost["flops"]) if cost.get("flops", 0) > 0 else None


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _rounded(value: Any) -> Any:
    """Six digits: more are noise."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")

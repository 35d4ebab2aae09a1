"""Times the forward pass and the train step of a registered classifier, alone or beside other libraries.

    python -m benchmarks.throughput --model lenet_dli
    python -m benchmarks.throughput --model lenet_dli --vs keras torch       # needs: pip install -e ".[reference]"
    python -m benchmarks.throughput --model resnet50 --batch-size 8 --against ../other-checkout

Run it from the root of the checkout. Each run appends one JSON line to benchmarks/results/throughput.jsonl, which needs
a clean commit; `--output` writes elsewhere. Small models take a minute.

The forward pass is timed in evaluation mode. The train step is the whole of `fv.train.train_step` under `jit_step`:
forward, backward and SGD with momentum on the cross-entropy, with a donated state. The batch of random pixels is on the
device already. Every step is waited for, unless `--chain` is above 1. The libraries of `--vs` get the same batch,
weights, loss and optimizer. All contenders run in one process and take turns of `--block` steps, so other load on the
machine affects all of them; with `--against` there are two processes, one for each checkout. Trust the ratios more than
the times.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv
from benchmarks import against, machine, timing
from benchmarks.timing import Contender
from parity import peers, published

Lower = Callable[..., Any]
Library = Literal["keras", "torch", "torch_compile"]
RESULTS = machine.RESULTS / "throughput.jsonl"

# Dense bfloat16 FLOP/s that a large matrix product reaches, measured.
PEAK_FLOPS = {"NVIDIA H200": 790e12}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a registered classifier."""

    model: str = "lenet_dli"
    """Name of a registered classifier."""
    batch_size: int = 128
    """Images per step, over all devices."""
    image_size: int | None = None
    """Height and width of the images. Default: the published size."""
    mode: Literal["forward", "train", "both"] = "both"
    """What to time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Parameters are float32."""
    steps: int = 30
    """Timed steps of each contender."""
    warmup: int = 3
    """Untimed steps of each contender; the first one compiles."""
    block: int = 3
    """Consecutive steps of one contender before the next one's turn."""
    chain: int = 1
    """Steps started before waiting for the last one; hides the dispatch from Python, as a training loop does."""
    fuse: int = 1
    """Train steps in one compiled program (flaxvision only)."""
    donate: bool = True
    """Donate the train state to the step (flaxvision only)."""
    uint8: bool = False
    """Keep the pixels as uint8 and normalise them in the step (flaxvision only)."""
    vs: Annotated[tuple[tuple[Library, ...], ...], tyro.conf.UseAppendAction] = ()
    """Libraries to time beside flaxvision: keras (on JAX), torch (eager), torch_compile (torch.compile, channels last,
    fused optimizer). Give several (--vs keras torch) or repeat the flag."""
    lenient: bool = False
    """Record a library of --vs that is missing or fails, instead of stopping."""
    against: Path | None = None
    """Root of another checkout of flaxvision to time beside this one."""
    devices: int = 1
    """Devices that share the batch. --vs and --against need 1."""
    output: Path = RESULTS
    """File of JSON lines that the result is appended to."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries of `vs`, each once."""
        return tuple(dict.fromkeys(library for group in self.vs for library in group))

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to time."""
        return ("forward", "train") if self.mode == "both" else (self.mode,)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and appends one result.

    Args:
        config: What to measure.

    Returns:
        The record that was appended.

    Raises:
        ValueError: A setting is out of range, the model is no classifier, `--vs` does not have it, or the output is a
            recorded result and the commit is not clean.
        ImportError: A library of `--vs` is not installed.
        RuntimeError: A library's network differs from ours, or a worker of `--against` failed.
    """
    check(config)
    record: dict[str, Any] = {
        "benchmark": "throughput",
        **{name: getattr(config, name) for name in ("model", "batch_size", "dtype", "steps", "warmup", "block")},
        **{name: getattr(config, name) for name in ("chain", "fuse", "donate", "uint8")},
        "optimizer": f"sgd {peers.LEARNING_RATE}, momentum {peers.MOMENTUM}",
        **machine.describe(jax.devices()[0], config.devices),
    }
    record |= _against(config) if config.against else _beside_libraries(config)
    record = machine.rounded(record)
    machine.append(config.output, record)
    show(record, config.modes)
    return record


def check(config: Config) -> None:
    """Checks the settings before anything is measured; see `main`."""
    info = fv.model_info(config.model)
    if info.task != "classification":
        names = ", ".join(fv.list_models(task="classification"))
        raise ValueError(f"--model must be a classifier ({names}); got {config.model!r}, which does {info.task}")
    for name in ("batch_size", "steps", "warmup", "block", "chain", "fuse", "devices"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}")
    if config.devices > jax.device_count():
        raise ValueError(f"devices must be at most {jax.device_count()}, the devices here; got {config.devices}")
    if (config.libraries or config.against) and config.devices > 1:
        raise ValueError(f"devices must be 1 with --vs or --against; got {config.devices}")
    if config.libraries and config.against:
        raise ValueError(f"--vs must be empty with --against; got {', '.join(config.libraries)}")
    for library in config.libraries:
        if not config.lenient:
            peers.check_available(library, config.model)
    machine.check_output(config.output)


class Workload:
    """Our model with its batch, and the steps that are timed.

    Args:
        config: What to measure.

    Attributes:
        fields: Fields of the model that differ from the defaults, so that all libraries compute the same network.
        images: Float32 `[N, H, W, C]`.
        labels: Int32 `[N]`.
        variables: Variables of the model as numpy arrays.
    """

    def __init__(self, config: Config):
        self.config = config
        info = fv.model_info(config.model)
        self.fields = {} if config.model in peers.CHAINS else published.fields(config.model, config.libraries)
        dtype = jnp.bfloat16 if config.dtype == "bfloat16" else None
        self.model: Any = fv.create_model(config.model, dtype=dtype, **self.fields)
        self.mesh = fv.train.make_mesh(jax.devices()[: config.devices])
        random = np.random.default_rng(0)
        size = (config.image_size,) * 2 if config.image_size else info.input_size
        shape = size if len(size) == 1 else (*size, info.channels)
        self.images = random.standard_normal((config.batch_size, *shape), np.float32)
        self.variables = variables_of(self.model, shape)
        logits = jax.eval_shape(self.model.apply, self.variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        self.labels = random.integers(0, logits.shape[-1], config.batch_size).astype(np.int32)
        pixels = (self.images.clip(-3, 3) * 40 + 128).astype(np.uint8) if config.uint8 else self.images
        sharding = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec("data"))
        self.batch = jax.device_put({"image": pixels, "label": self.labels}, sharding)

    def state(self) -> fv.train.TrainState:
        """Makes a new train state."""
        tx = optax.sgd(peers.LEARNING_RATE, momentum=peers.MOMENTUM)
        sample = jax.ShapeDtypeStruct((1, *self.images.shape[1:]), jnp.float32)
        return fv.train.create_state(self.model, tx, jax.random.key(0), sample, variables=self.variables)

    def contender(self, mode: str) -> tuple[Contender, Lower]:
        """Returns the step of a mode, "forward" or "train", and a function that lowers it."""
        return self.forward() if mode == "forward" else self.train()

    def forward(self) -> tuple[Contender, Lower]:
        """The forward pass in evaluation mode."""
        state = jax.device_put(self.state(), jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()))
        apply = lambda state, batch: state.apply_fn(state.variables, self._normalise(batch)["image"], train=False)
        step = fv.train.jit_step(apply, self.mesh)
        lower = functools.partial(step.lower, *jax.eval_shape(lambda: (state, self.batch)))
        return Contender(lambda: step(state, self.batch), chain=self.config.chain), lower

    def train(self) -> tuple[Contender, Lower]:
        """The train step, which continues from its own last state. The lowered program is one step."""
        state, rng = self.state(), jax.random.key(1)
        body = functools.partial(fv.train.train_step, objective=fv.train.classification())
        once = lambda state, batch, rng: body(state, self._normalise(batch), rng)

        def fused(state, batch, rng):
            again = lambda _, carry: once(carry[0], batch, rng)
            return jax.lax.fori_loop(1, self.config.fuse, again, once(state, batch, rng))

        whole = fused if self.config.fuse > 1 else once
        step = fv.train.jit_step(whole, self.mesh)
        if not self.config.donate:
            everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            state, step = jax.device_put(state, everywhere), jax.jit(whole, out_shardings=everywhere)
        shapes = jax.eval_shape(lambda: (state, self.batch, rng))
        lower = functools.partial(fv.train.jit_step(once, self.mesh).lower, *shapes)

        def run():
            nonlocal state
            state, metrics = step(state, self.batch, rng)
            return state, metrics

        return Contender(run, chain=self.config.chain), lower

    def _normalise(self, batch: Any) -> Any:
        if not self.config.uint8:
            return batch
        return {**batch, "image": batch["image"].astype(jnp.float32) / 40 - 3.2}

    def problem(self) -> peers.Problem:
        """What the libraries of `--vs` compute."""
        logits = np.asarray(jax.jit(self.model.apply)(self.variables, self.images[:2]))
        bfloat16 = self.config.dtype == "bfloat16"
        weights = ordered_weights(self.model, self.variables, self.images.shape[1:])
        return peers.Problem(
            self.config.model, self.images, self.labels, bfloat16, weights, logits, self.variables, self.fields
        )


def prepare(mode: str, **settings: Any) -> Contender:
    """Makes the contender of a worker of `--against`."""
    return Workload(Config(**settings)).contender(mode)[0]


def flops_of(lower: Lower) -> float | None:
    """Returns the FLOPs of a program as XLA counts them."""
    # Counted for a TPU, where convolutions lower to plain XLA ones: the CPU forms do other work for the same result,
    # and XLA counts the body of a loop once.
    cost = lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    return float(cost["flops"]) if cost.get("flops", 0) > 0 else None


def variables_of(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns random variables made by numpy, which is much faster than compiling `init`."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        if kind in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape, np.float32) * (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5

    return jax.tree_util.tree_map_with_path(fill, shapes)


def ordered_weights(model: Any, variables: Any, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Returns the parameters in the order in which the model creates them, which a pytree does not keep."""
    paths: list[tuple[str, ...]] = []

    def init(x):
        created = model.init(jax.random.key(0), x)
        paths.extend(flax.traverse_util.flatten_dict(created["params"]))
        return created

    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    params = flax.traverse_util.flatten_dict(variables["params"])
    return [np.asarray(params[path]) for path in paths]


def show(record: dict[str, Any], modes: tuple[str, ...]) -> None:
    """Prints a record."""
    print(f"{record['model']}, {record['params']:,} parameters, batch {record['batch_size']}, {record['dtype']}")
    print(f"{record['device']}, {record['cores']} cores; load {record['load_before']} before")
    for mode in modes:
        for name, r in record[mode].items():
            if name == "speedup":
                continue
            line = f"{mode:8}{name:14}{r['ms']:9.2f} ms [{r['ms_q1']:.2f}, {r['ms_q3']:.2f}]"
            line += f"{r['images_per_s']:12.1f} images/s  first step {r['compile_s']:.1f} s more"
            if r.get("share_of_peak"):
                line += f"  {100 * r['share_of_peak']:.1f} % of peak"
            if r.get("peak_memory_bytes"):
                line += f"  {r['peak_memory_bytes'] / 2**20:.0f} MiB"
            if name in record[mode]["speedup"]:
                speedup = record[mode]["speedup"][name]
                line += f"  flaxvision is {speedup['ratio']:.2f}x [{speedup['q1']:.2f}, {speedup['q3']:.2f}]"
            print(line)
    for library, problem in record.get("left_out", {}).items():
        print(f"without {library}: {problem}")


def _beside_libraries(config: Config) -> dict[str, Any]:
    """Times this checkout in this process, beside the libraries of `--vs`."""
    work = Workload(config)
    params = sum(w.size for w in jax.tree.leaves(work.variables["params"]))
    record: dict[str, Any] = {"params": params, "input": list(work.images.shape), "fields": work.fields}
    contenders: dict[str, dict[str, Contender]] = {mode: {} for mode in config.modes}
    facts: dict[str, dict[str, Any]] = {mode: {"flaxvision": {}} for mode in config.modes}
    for mode in config.modes:  # before the libraries are imported, so that the process's peak memory is ours
        contenders[mode]["flaxvision"], lower = work.contender(mode)
        contenders[mode]["flaxvision"].warm_up(config.warmup)
        peak, record["peak_memory"] = machine.peak_memory(jax.devices()[0])
        facts[mode]["flaxvision"] = {"peak_memory_bytes": peak, "flops": flops_of(lower)}
    problem = work.problem() if config.libraries else None
    for library in config.libraries:
        assert problem is not None
        try:
            peers.check_available(library, config.model)
            peer = peers.LOADERS[library](problem)
            if config.model in peers.CHAINS and peer.params != params:
                raise RuntimeError(f"{library}'s network must have {params:,} parameters; got {peer.params:,}")
            for mode in config.modes:
                step = Contender(getattr(peer, mode), peer.wait, config.chain)
                step.warm_up(config.warmup)
                contenders[mode][library] = step
                facts[mode][library] = {"peak_memory_bytes": peer.peak_memory()}
            record[library] = peer.version
        except Exception as error:
            if not config.lenient:
                raise
            for mode in config.modes:
                contenders[mode].pop(library, None)
                facts[mode].pop(library, None)
            record.setdefault("left_out", {})[library] = f"{type(error).__name__}: {error}"[:500]
    for mode in config.modes:
        timing.take_turns(list(contenders[mode].values()), config.steps, config.block)
        _per_step(contenders[mode]["flaxvision"], config.fuse if mode == "train" else 1)
        found = timing.summary(contenders[mode], config.block, config.batch_size)
        flops = facts[mode]["flaxvision"]["flops"]
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        for name, more in facts[mode].items():
            rate = 1e3 * flops / found[name]["ms"] if flops else None
            found[name] |= more | {"flops_per_s": rate, "share_of_peak": rate / peak if rate and peak else None}
        record[mode] = found
    return record


def _against(config: Config) -> dict[str, Any]:
    """Times this checkout and another one, each in a process of its own."""
    assert config.against is not None
    keep = ("model", "batch_size", "image_size", "dtype", "chain", "fuse", "donate", "uint8")
    settings = {name: getattr(config, name) for name in keep}
    record: dict[str, Any] = {"params": fv.model_info(config.model).params}
    record["against"] = {"commit": machine.commit(config.against)}
    with against.workers(config.against, "benchmarks.throughput") as found:
        for mode in config.modes:
            contenders = {name: against.Remote(worker, mode=mode, **settings) for name, worker in found.items()}
            for contender in contenders.values():
                contender.warm_up(config.warmup)
            timing.take_turns(list(contenders.values()), config.steps, config.block)
            for contender in contenders.values():
                _per_step(contender, config.fuse if mode == "train" else 1)
            record[mode] = timing.summary(contenders, config.block, config.batch_size)
    return record


def _per_step(contender: Contender, fuse: int) -> None:
    contender.times = [t / fuse for t in contender.times]


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.throughput"))
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")

"""Times every layer of flaxvision against plain Linen or lax: forward, and forward with all gradients.

    python -m benchmarks.layers                                               # about ten minutes on 2 cores
    python -m benchmarks.layers --output benchmarks/results/layers.jsonl      # appends one JSON line per case
    python -m benchmarks.layers --against ../other-checkout --processes 3     # this checkout against another one
    python -m benchmarks.layers --quick --only pool                           # a few small cases

The two forms of a case take turns, so other load on the machine affects both. The figures are medians with quartiles.
A ratio is the other form's time divided by ours: above 1, flaxvision is faster. With `--against` it is the other
checkout's time divided by this one's. Where a process happens to place its memory can change the time of a case, so
`--processes` measures everything again in fresh processes, and the ratio is the median of theirs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from benchmarks import against, machine, timing
from benchmarks.timing import Contender
from flaxvision import layers

MODES = ("forward", "train")


class LinenTrainableAvgPool(nn.Module):
    """`layers.TrainableAvgPool` of 2x2 written with Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H // 2, W // 2, C]`."""
        coefficient = self.param("coefficient", nn.initializers.constant(0.25), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        shape = (1, 1, 1, -1)
        return 4 * nn.avg_pool(x, (2, 2), (2, 2)) * coefficient.reshape(shape) + bias.reshape(shape)


@dataclass(frozen=True)
class Config:
    """Time the layers of flaxvision."""

    quick: bool = False
    """Batch 1 and three repetitions, to check that everything runs."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File of JSON lines that the records are appended to, one per case."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Root of another checkout of flaxvision; its layers are timed instead of the plain forms."""
    only: str = ""
    """Only time the cases with this text in their name."""
    seconds: float = 4.0
    """Time to spend on the repetitions of a case; there are at least three, unless one takes longer than that."""
    steps: int = 200
    """Most repetitions of a case."""
    processes: int = 1
    """Pairs of processes that time every case, one pair after the other; needs `--against` if there are several."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Name of the case.
        shape: Shape of the input.
        ours: Module or function of flaxvision.
        reference: The plain Linen or lax form, with the same variables.
    """

    name: str
    shape: tuple[int, ...]
    ours: Any
    reference: Any


def pool(fn: Callable[..., jax.Array], window: int, stride: int, padding: str) -> Callable[..., jax.Array]:
    """Binds the window of a pooling function."""
    return lambda x: fn(x, (window, window), strides=(stride, stride), padding=padding)


def normed(norm: type[nn.Module]) -> Callable[[jax.Array], jax.Array]:
    """Batch normalization in training mode, followed by a ReLU."""
    layer = norm(use_running_average=False)

    def apply(x):
        params, zeros = {name: jnp.ones(x.shape[-1:]) for name in ("scale", "bias")}, jnp.zeros(x.shape[-1:])
        variables = {"params": params, "batch_stats": {"mean": zeros, "var": zeros}}
        return nn.relu(layer.apply(variables, x, mutable=["batch_stats"])[0])

    return apply


def cases() -> Iterator[Case]:
    """Cases with the sizes of LeNet, VGG, ResNet, ResNeXt, MobileNet, DeepLab, FCN, U-Net and DCGAN."""
    both = lambda name, shape, *args, **kwargs: Case(
        name, shape, layers.Conv(*args, **kwargs), nn.Conv(*args, **kwargs)
    )
    three, one = (3, 3), (1, 1)
    yield both("conv 3x3 1-32 valid", (128, 28, 28, 1), 32, three, padding="VALID")
    yield both("conv 3x3 32-64 valid", (128, 26, 26, 32), 64, three, padding="VALID")
    yield both("conv 5x5 6-16 valid", (128, 14, 14, 6), 16, (5, 5), padding="VALID")
    yield both("conv 7x7 1-64", (32, 28, 28, 1), 64, (7, 7))
    yield both("conv 7x7 3-64 stride 2", (8, 224, 224, 3), 64, (7, 7), 2)
    yield both("conv 3x3 64-64", (8, 56, 56, 64), 64, three)
    yield both("conv 3x3 128-128", (8, 28, 28, 128), 128, three)
    yield both("conv 3x3 256-256", (8, 14, 14, 256), 256, three)
    yield both("conv 3x3 512-512", (8, 7, 7, 512), 512, three)
    yield both("conv 3x3 128-128 stride 2", (8, 56, 56, 128), 128, three, 2)
    yield both("conv 9x9 256-256 stride 2 valid", (8, 20, 20, 256), 256, (9, 9), 2, padding="VALID")
    yield both("conv 3x3 64-64 large", (2, 224, 224, 64), 64, three)
    yield both("conv 3x3 64-64 atrous 2", (8, 28, 28, 64), 64, three, kernel_dilation=2)
    yield both("conv 3x3 512-512 atrous 4", (2, 32, 32, 512), 512, three, kernel_dilation=4)
    yield both("conv 3x3 2048-256 atrous 12", (2, 32, 32, 2048), 256, three, kernel_dilation=12)
    yield both("conv 1x1 64-256", (8, 56, 56, 64), 256, one)
    yield both("conv 1x1 256-64", (8, 56, 56, 256), 64, one)
    yield both("conv 1x1 256-512 stride 2", (8, 56, 56, 256), 512, one, 2)
    yield both("conv 1d 5 32-64", (16, 512, 32), 64, (5,))
    yield both("conv 3d 3x3x3 16-32", (4, 16, 16, 16, 16), 32, (3, 3, 3))
    yield both("grouped 32 128-128", (8, 56, 56, 128), 128, three, feature_group_count=32)
    yield both("grouped 32 256-256", (8, 28, 28, 256), 256, three, feature_group_count=32)
    yield both("grouped 2 5x5 96-256", (8, 27, 27, 96), 256, (5, 5), feature_group_count=2)
    depthwise = lambda c, m=1, k=3, **kwargs: (
        layers.DepthwiseConv((k, k), channel_multiplier=m, **kwargs),
        nn.Conv(c * m, (k, k), feature_group_count=c, **kwargs),
    )
    yield Case("depthwise 3x3 128", (8, 56, 56, 128), *depthwise(128))
    yield Case("depthwise 3x3 128 stride 2", (8, 56, 56, 128), *depthwise(128, strides=2))
    yield Case("depthwise 3x3 512", (8, 14, 14, 512), *depthwise(512))
    yield Case("depthwise 5x5 128", (8, 28, 28, 128), *depthwise(128, k=5))
    yield Case("depthwise 3x3 32 multiplier 2", (8, 28, 28, 32), *depthwise(32, 2))
    yield Case(
        "separable 3x3 128-128",
        (8, 56, 56, 128),
        layers.SeparableConv(128, three, use_bias=False),
        nn.Sequential(
            [nn.Conv(128, three, feature_group_count=128, use_bias=False), nn.Conv(128, one, use_bias=False)]
        ),
    )
    transposed = lambda *args: (layers.ConvTranspose(*args), nn.ConvTranspose(*args))
    yield Case("transposed 2x2 stride 2 128-64", (8, 28, 28, 128), *transposed(64, (2, 2), (2, 2)))
    yield Case("transposed 3x3 stride 2 128-64", (8, 28, 28, 128), *transposed(64, three, (2, 2)))
    yield Case("transposed 4x4 stride 2 128-64", (8, 28, 28, 128), *transposed(64, (4, 4), (2, 2)))
    yield Case("transposed 2x2 stride 2 1024-512", (2, 16, 16, 1024), *transposed(512, (2, 2), (2, 2)))
    yield Case("transposed 16x16 stride 8 21-21", (2, 34, 34, 21), *transposed(21, (16, 16), (8, 8)))
    yield Case("transposed 64x64 stride 32 21-21", (2, 10, 10, 21), *transposed(21, (64, 64), (32, 32)))
    for window, stride, padding in ((2, 2, "VALID"), (3, 2, "SAME"), (3, 1, "SAME")):
        name = f"{window}x{window} stride {stride}"
        for kind in ("max", "avg"):
            ours, reference = (getattr(m, f"{kind}_pool") for m in (layers, nn))
            how = (window, stride, padding)
            yield Case(f"{kind} pool {name}", (8, 56, 56, 128), pool(ours, *how), pool(reference, *how))
    for shape in ((8, 112, 112, 64), (8, 56, 56, 256), (8, 14, 14, 256), (8, 7, 7, 512)):
        yield Case(f"batch norm {shape[1]} {shape[3]}", shape, normed(layers.BatchNorm), normed(nn.BatchNorm))
    yield from others()


def others() -> Iterator[Case]:
    """Cases of the layers that Linen lacks, against their shortest form."""
    shape = (8, 56, 56, 120)
    pooled = lambda x, f: f(x.reshape((*x.shape[:-1], -1, 3)), axis=-1)
    yield Case("depthwise max pool 3", shape, lambda x: layers.depthwise_max_pool(x, 3), lambda x: pooled(x, jnp.max))
    yield Case("depthwise avg pool 3", shape, lambda x: layers.depthwise_avg_pool(x, 3), lambda x: pooled(x, jnp.mean))
    yield Case("global avg pool", shape, layers.global_avg_pool, lambda x: x.mean((1, 2)))
    yield Case("global max pool", shape, layers.global_max_pool, lambda x: x.max((1, 2)))
    yield Case(
        "adaptive avg pool 7", shape, lambda x: layers.adaptive_avg_pool(x, 7), lambda x: nn.avg_pool(x, (8, 8), (8, 8))
    )
    squares = lambda x: 4 * nn.avg_pool(x * x, (2, 2), (2, 2))
    yield Case("l2 norm pool 2x2", shape, lambda x: layers.l2_norm_pool(x, 2), lambda x: jnp.sqrt(squares(x)))
    yield Case("trainable avg pool 2x2", shape, layers.TrainableAvgPool(), LinenTrainableAvgPool())
    neighbours = lambda x: lax.reduce_window(x * x, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME")
    yield Case(
        "local response norm 5",
        (16, 27, 27, 256),
        lambda x: layers.local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0),
        lambda x: x / (2.0 + 1e-4 * neighbours(x)) ** 0.75,
    )
    codes = layers.random_codes(1000)
    difference = lambda x: x[:, None, :] - codes[None]
    yield Case("rbf 84-1000", (128, 84), layers.RBF(1000, codes=codes), lambda x: (difference(x) ** 2).sum(-1))


def functions(layer: Any) -> dict[str, Callable[..., Any]]:
    """Returns the layer's forward pass, and its forward pass with the gradients of variables and input."""
    forward = layer.apply if isinstance(layer, nn.Module) else lambda _, x: layer(x)

    def train(variables: Any, x: jax.Array, gradient: jax.Array) -> Any:
        y, pull = jax.vjp(forward, variables, x)
        return y, pull(gradient)

    return {"forward": lambda variables, x, gradient: forward(variables, x), "train": train}


def contender(layer: Any, mode: str, shape: tuple[int, ...]) -> Contender:
    """Compiles one mode of a layer, "forward" or "train", for an input shape."""
    x = jax.random.normal(jax.random.key(0), shape)
    variables = layer.init(jax.random.key(1), x) if isinstance(layer, nn.Module) else {}
    fns = functions(layer)
    gradient = jax.tree.map(jnp.ones_like, jax.eval_shape(fns["forward"], variables, x, x))
    compiled = jax.jit(fns[mode]).lower(variables, x, gradient).compile()
    return Contender(partial(compiled, variables, x, gradient))


def prepare(case: str, mode: str, quick: bool) -> Contender:
    """Makes the contender of a worker of `--against`."""
    found = next(c for c in cases() if c.name == case)
    return contender(found.ours, mode, input_shape(found, quick))


def input_shape(case: Case, quick: bool) -> tuple[int, ...]:
    """Returns the shape of a case's input; `--quick` has a batch of 1."""
    return (1, *case.shape[1:]) if quick else case.shape


def measure(case: Case, config: Config, workers: dict[str, against.Worker] | None = None) -> dict[str, Any]:
    """Times one case.

    Args:
        case: The layer.
        config: How long to time it.
        workers: The processes of the two checkouts, for `--against`.

    Returns:
        The record: `case`, `input`, and for each mode what `timing.summary` returns.
    """
    shape = input_shape(case, config.quick)
    record: dict[str, Any] = {"case": case.name, "input": shape}
    for mode in MODES:
        if workers:
            request = {"case": case.name, "mode": mode, "quick": config.quick}
            contenders: dict[str, Contender] = {name: against.Remote(w, **request) for name, w in workers.items()}
        else:
            layers_by_name = {"flaxvision": case.ours, "reference": case.reference}
            contenders = {name: contender(layer, mode, shape) for name, layer in layers_by_name.items()}
        for each in contenders.values():
            each.warm_up(1)
        timing.take_turns(list(contenders.values()), 3 if config.quick else config.steps, seconds=config.seconds / 2)
        record[mode] = timing.summary(contenders)
    return record


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Combines the records of one case from several processes.

    Args:
        records: What `measure` returned in each process.

    Returns:
        A record whose figures are medians over the processes, for a ratio with the quartiles over the processes. Under
        `processes_ms` it has the times of each process, by mode.
    """
    first, *others = records
    if not others:
        return first
    merged = {key: first[key] for key in ("case", "input")}
    for mode in MODES:
        merged[mode] = jax.tree.map(lambda *values: float(np.median(values)), *(record[mode] for record in records))
        for other, found in merged[mode]["speedup"].items():
            ratios = [record[mode]["speedup"][other]["ratio"] for record in records]
            found["q1"], found["q3"] = map(float, np.percentile(ratios, (25, 75)))
    times = lambda found: {name: value["ms"] for name, value in found.items() if name != "speedup"}
    return merged | {"processes_ms": {mode: [times(record[mode]) for record in records] for mode in MODES}}


def main(config: Config) -> None:
    """Prints a table, and appends the records to the output file.

    Raises:
        ValueError: No case's name contains `only`, `processes` is out of range, or the output is a recorded result and
            the commit is not clean.
        RuntimeError: A worker of `--against` failed.
    """
    machine.check_output(config.output)
    chosen = [case for case in cases() if config.only in case.name]
    if not chosen:
        raise ValueError(
            f"--only must be part of a case's name ({', '.join(c.name for c in cases())}); got {config.only!r}"
        )
    if not 1 <= config.processes <= (32 if config.against else 1):
        raise ValueError(f"--processes must be 1 without --against, and from 1 to 32 with it; got {config.processes}")
    where = {"benchmark": "layers", "quick": config.quick} | machine.describe(jax.devices()[0])
    if config.against:
        where["against"] = {"commit": machine.commit(config.against)}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    other = "against" if config.against else "reference"
    print(
        f"{'case':32}{'input':>20}" + "".join(f"{mode:>10}{other:>11}{'ratio':>8}{'quartiles':>17}" for mode in MODES)
    )
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in chosen}
    for process in range(config.processes):
        with against.workers(config.against, "benchmarks.layers") if config.against else nullcontext() as workers:
            for case in chosen:
                found[case.name].append(measure(case, config, workers))
                if process == config.processes - 1:
                    record = machine.rounded(merge(found[case.name]))
                    report(record, other)
                    if config.output is not None:
                        machine.append(config.output, record | where)


def report(record: dict[str, Any], other: str) -> None:
    """Prints one line of the table."""
    print(f"{record['case']:32}{'x'.join(map(str, record['input'])):>20}", end="")
    for mode in MODES:
        ours, theirs, ratio = record[mode]["flaxvision"], record[mode][other], record[mode]["speedup"][other]
        quartiles = f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
        print(f"{ours['ms']:10.2f}{theirs['ms']:11.2f}{ratio['ratio']:8.2f}{quartiles:>17}", end="")
    print(flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.layers"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")

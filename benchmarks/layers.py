"""Every layer of flaxvision against the plain Linen or lax form: forward, and forward with all gradients.

    python benchmarks/layers.py                                               # about ten minutes on 2 cores
    python benchmarks/layers.py --output benchmarks/results/layers.jsonl      # appends one JSON line per case
    python benchmarks/layers.py --quick --only pool                           # a few small cases

The two forms of a case run by turns, so that whatever else the machine does meets both; the figures are medians.
Where a ratio is over 1, flaxvision is faster.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax import lax
from machine import describe

from flaxvision import layers


class PlainTrainableAvgPool(nn.Module):
    """`layers.TrainableAvgPool` of 2x2 in Linen's words."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H // 2, W // 2, C]`."""
        coefficient = self.param("coefficient", nn.initializers.constant(0.25), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        shape = (1, 1, 1, -1)
        return 4 * nn.avg_pool(x, (2, 2), (2, 2)) * coefficient.reshape(shape) + bias.reshape(shape)


@dataclass(frozen=True)
class Config:
    """Time the layers against their plain forms."""

    quick: bool = False
    """Batch 1 and few repetitions: a check that everything runs."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A .jsonl file to which one line per case is appended."""
    only: str = ""
    """Run only the cases whose name contains this."""
    seconds: float = 4.0
    """Time to spend on the repetitions of a case; there are at least three."""


@dataclass(frozen=True)
class Case:
    """A layer of ours, the plain form with the same variables, and the input's shape."""

    name: str
    shape: tuple[int, ...]
    ours: Any
    plain: Any


def pool(fn: Callable[..., jax.Array], window: int, stride: int, padding: str) -> Callable[..., jax.Array]:
    """A pooling function of ours or of Linen's with its window."""
    return lambda x: fn(x, (window, window), strides=(stride, stride), padding=padding)


def normed(norm: type[nn.Module]) -> Callable[[jax.Array], jax.Array]:
    """A batch normalization in training, with its ReLU."""
    layer = norm(use_running_average=False)

    def apply(x):
        params, zeros = {name: jnp.ones(x.shape[-1:]) for name in ("scale", "bias")}, jnp.zeros(x.shape[-1:])
        variables = {"params": params, "batch_stats": {"mean": zeros, "var": zeros}}
        return nn.relu(layer.apply(variables, x, mutable=["batch_stats"])[0])

    return apply


def cases() -> Iterator[Case]:
    """Sizes that networks have: LeNet, VGG, ResNet, ResNeXt, MobileNet, U-Net and DCGAN."""
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
    for window, stride, padding in ((2, 2, "VALID"), (3, 2, "SAME"), (3, 1, "SAME")):
        name = f"{window}x{window} stride {stride}"
        for kind in ("max", "avg"):
            ours, plain = (getattr(m, f"{kind}_pool") for m in (layers, nn))
            how = (window, stride, padding)
            yield Case(f"{kind} pool {name}", (8, 56, 56, 128), pool(ours, *how), pool(plain, *how))
    for shape in ((8, 112, 112, 64), (8, 56, 56, 256), (8, 14, 14, 256), (8, 7, 7, 512)):
        yield Case(f"batch norm {shape[1]} {shape[3]}", shape, normed(layers.BatchNorm), normed(nn.BatchNorm))
    yield from others()


def others() -> Iterator[Case]:
    """The layers that Linen lacks, against the shortest way to write them."""
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
    yield Case("trainable avg pool 2x2", shape, layers.TrainableAvgPool(), PlainTrainableAvgPool())
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


def functions(layer: Any, x: jax.Array, variables: Any) -> tuple[Callable, Callable]:
    """The layer's forward pass, and its forward pass with the gradients of variables and input."""
    forward = layer.apply if isinstance(layer, nn.Module) else lambda _, x: layer(x)

    def train(variables: Any, x: jax.Array, gradient: jax.Array) -> Any:
        y, pull = jax.vjp(forward, variables, x)
        return y, pull(gradient)

    return lambda variables, x, gradient: forward(variables, x), train


def medians(compiled: list[Callable], args: tuple, seconds: float, most: int) -> list[float]:
    """Milliseconds of each function, run by turns."""
    times: list[list[float]] = [[] for _ in compiled]
    start = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - start < seconds and len(times[0]) < most):
        for fn, record in zip(compiled, times, strict=True):
            before = time.perf_counter()
            jax.block_until_ready(fn(*args))
            record.append((time.perf_counter() - before) * 1e3)
            if record[0] > 5e3:  # one run of some plain forms is a long time
                break
        if any(record[0] > 5e3 for record in times if record):
            for fn, record in zip(compiled, times, strict=True):
                if not record:
                    before = time.perf_counter()
                    jax.block_until_ready(fn(*args))
                    record.append((time.perf_counter() - before) * 1e3)
            break
    return [statistics.median(record) for record in times]


def measure(case: Case, config: Config) -> dict[str, Any]:
    """Time one case; the record that is printed and stored."""
    shape = (1, *case.shape[1:]) if config.quick else case.shape
    x = jax.random.normal(jax.random.key(0), shape)
    variables = [m.init(jax.random.key(1), x) if isinstance(m, nn.Module) else {} for m in (case.ours, case.plain)]
    record: dict[str, Any] = {"case": case.name, "input": shape}
    forms = [functions(m, x, v) for m, v in zip((case.ours, case.plain), variables, strict=True)]
    for k, mode in enumerate(("forward", "train")):
        compiled = []
        for form, v in zip(forms, variables, strict=True):
            gradient = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), jax.eval_shape(form[0], v, x, x))
            ready = jax.jit(form[k]).lower(v, x, gradient).compile()
            compiled.append(partial(ready, v, x, gradient))
        for fn in compiled[: 1 if mode == "train" else 2]:
            jax.block_until_ready(fn())
        ours, plain = medians(compiled, (), 0.2 if config.quick else config.seconds / 2, 3 if config.quick else 15)
        record |= {f"{mode}_ms": round(ours, 3), f"{mode}_plain_ms": round(plain, 3)}
        record[f"{mode}_ratio"] = round(plain / ours, 2)
    return record


def main(config: Config) -> None:
    """Print a table; append the records to the output file."""
    where = {"benchmark": "layers"} | describe(jax.devices()[0])
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    chosen = [case for case in cases() if config.only in case.name]
    if not chosen:
        sys.exit(f"no case's name contains {config.only!r}")
    columns = f"{'forward':>9s} {'plain':>9s} {'ratio':>6s} {'train':>9s} {'plain':>9s} {'ratio':>6s}"
    print(f"{'case':32s} {'input':>20s} {columns}")
    for case in chosen:
        record = measure(case, config)
        cells = "".join(
            f" {record[f'{m}_ms']:9.2f} {record[f'{m}_plain_ms']:9.2f} {record[f'{m}_ratio']:6.2f}"
            for m in ("forward", "train")
        )
        print(f"{case.name:32s} {'x'.join(map(str, record['input'])):>20s}{cells}", flush=True)
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            with config.output.open("a") as file:
                file.write(json.dumps(record | where | {"quick": config.quick}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

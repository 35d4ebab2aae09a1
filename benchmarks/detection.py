"""Times the detection operators against torchvision's, and the selection of detections in `fv.detect`.

    pip install -e ".[reference]"
    python -m benchmarks.detection                                                # a few minutes on 2 cores
    python -m benchmarks.detection --output benchmarks/results/detection.jsonl    # appends one JSON line per case
    python -m benchmarks.detection --quick --only nms

The two libraries are interleaved, so other load on the machine affects both. Times are medians; ratios have quartiles.
A ratio is torchvision's time divided by ours: above 1, flaxvision is faster. Before the timing, the benchmark checks
that both give the same result.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxvision as fv
from benchmarks import machine, timing
from benchmarks.timing import Contender
from flaxvision import ops

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Config:
    """Time the detection operators."""

    quick: bool = False
    """Small arrays and three repetitions, to check that everything runs."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File to which one JSON line per case is appended."""
    only: str = ""
    """Only time the cases whose name contains this text."""
    seconds: float = 8.0
    """Seconds for the repetitions of a case. At least three are run, unless one takes longer than that."""
    steps: int = 100
    """Maximum number of repetitions of a case."""
    threads: int = 2
    """Number of threads of torch."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Name of the case.
        ours: Runs flaxvision, on arrays that are on the device.
        theirs: Runs torchvision; None if it has no counterpart.
        same: Returns whether the two results are the same.
    """

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None = None
    same: Callable[[Any, Any], bool] = lambda ours, theirs: True


def uniform_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns boxes with sides of 10 to 300 pixels and their first corner anywhere in 800x800 pixels."""
    corner = rng.uniform(0, 800, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(10, 300, (count, 2))], axis=1).astype(np.float32)


def clustered_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns boxes of about 100 pixels around 40 objects, similar to the proposals of a detector."""
    corner = rng.uniform(0, 800, (40, 2))[rng.integers(0, 40, count)] + rng.normal(0, 8, (count, 2))
    return np.concatenate([corner, corner + 100 + rng.normal(0, 10, (count, 2))], axis=1).astype(np.float32)


def nms_cases(count: int) -> Iterator[Case]:
    """Yields cases of non-maximum suppression, with boxes that overlap little and boxes that overlap much."""
    import torch
    from torchvision.ops import nms

    rng = np.random.default_rng(0)
    scores = rng.random(count, np.float32)
    for name, draw in (("uniform", uniform_boxes), ("clustered", clustered_boxes)):
        boxes = draw(rng, count)
        arrays, tensors = (jnp.asarray(boxes), jnp.asarray(scores)), (torch.tensor(boxes), torch.tensor(scores))
        for threshold in (0.5, 0.7):
            run = jax.jit(partial(ops.nms, iou_threshold=threshold, max_outputs=count))
            yield Case(
                f"nms {count} {name} boxes, threshold {threshold}",
                partial(run, *arrays),
                partial(nms, *tensors, threshold),
                lambda ours, theirs: ours[0][ours[1]].tolist() == theirs.tolist(),
            )


def roi_cases(count: int, size: tuple[int, int], channels: int) -> Iterator[Case]:
    """Yields RoIAlign on four levels, forward and with the gradient of the features, and RoI max-pooling."""
    import torch
    from torchvision.ops import MultiScaleRoIAlign, roi_pool

    rng = np.random.default_rng(1)
    maps = [rng.standard_normal((size[0] // s, size[1] // s, channels), np.float32) for s in STRIDES]
    corner = rng.uniform(0, 0.85, (count, 2)) * size[::-1]
    side = np.exp(rng.uniform(np.log(16), np.log(500), (count, 2)))
    boxes = np.concatenate([corner, np.minimum(corner + side, size[::-1])], axis=1).astype(np.float32)
    features, rois = [jnp.asarray(x) for x in maps], jnp.asarray(boxes)
    tensors = {str(i): torch.tensor(x).permute(2, 0, 1)[None].contiguous() for i, x in enumerate(maps)}
    pool, rows = MultiScaleRoIAlign(list(tensors), 7, 2), [torch.tensor(boxes)]

    def close(ours, theirs):
        return np.allclose(ours, theirs.detach().permute(0, 2, 3, 1), atol=1e-4)

    def both(ours, theirs):
        pairs = zip(ours, theirs, strict=True)
        return all(np.allclose(a, b[0].permute(1, 2, 0), atol=1e-3 * float(b.abs().max())) for a, b in pairs)

    def run(features, rois):
        return ops.multiscale_roi_align(features, STRIDES, rois, 7)

    name = f"{count} rois, {channels} channels, {size[0]}x{size[1]}"
    forward, pooled = jax.jit(run), jax.jit(partial(ops.roi_max_pool, output_size=7, spatial_scale=1 / 16))
    gradient = jax.jit(jax.grad(lambda features, rois: jnp.sum(jnp.square(run(features, rois)))))
    leaves = {key: x.clone().requires_grad_() for key, x in tensors.items()}

    def their_gradient():
        return torch.autograd.grad(pool(leaves, rows, [size]).square().sum(), list(leaves.values()))

    yield Case(f"roi_align {name}", partial(forward, features, rois), lambda: pool(tensors, rows, [size]), close)
    yield Case(f"roi_align gradient {name}", partial(gradient, features, rois), their_gradient, both)
    theirs = partial(roi_pool, tensors["2"], rows, 7, 1 / 16)
    yield Case(f"roi_max_pool {name} stride 16", partial(pooled, features[2], rois), theirs, close)


def select_cases(quick: bool) -> Iterator[Case]:
    """Yields selections as in Faster R-CNN (boxes per class) and YOLOv3 (shared boxes), for one and two images."""
    rng = np.random.default_rng(2)
    for images, count, classes, per_class in (
        (1, 1000, 90, True),
        (2, 1000, 90, True),
        (1, 10647, 80, False),
        (2, 10647, 80, False),
    ):
        count = 50 if quick else count
        shape = (images, count, classes) if per_class else (images, count)
        boxes = jnp.asarray(uniform_boxes(rng, int(np.prod(shape))).reshape(*shape, 4))
        scores = jnp.asarray(rng.random((images, count, classes), np.float32) ** 3)
        candidates = fv.Candidates(boxes, scores, jnp.ones((images, count), bool))
        name = f"select_detections of {images} x {count} candidates x {classes} classes"
        yield Case(name, partial(jax.jit(fv.select_detections), candidates))


def measure(case: Case, config: Config) -> dict[str, Any]:
    """Times one case and returns what `timing.summary` returns.

    Raises:
        RuntimeError: The two results differ.
    """
    contenders = {"flaxvision": Contender(case.ours)}
    if case.theirs is not None:
        if not case.same(case.ours(), case.theirs()):
            raise RuntimeError(f"{case.name}: the results differ")
        contenders["torchvision"] = Contender(case.theirs, wait=lambda result: result)
    for contender in contenders.values():
        contender.warm_up(2)
    timing.take_turns(list(contenders.values()), 3 if config.quick else config.steps, seconds=config.seconds)
    return timing.summary(contenders)


def main(config: Config) -> None:
    """Times every case and prints one line per case."""
    import torch
    import torchvision

    machine.check_output(config.output)
    torch.set_num_threads(config.threads)
    quick = config.quick
    size, channels = ((64, 96), 8) if quick else ((800, 1088), 256)
    groups = nms_cases(100 if quick else 2000), roi_cases(20 if quick else 1000, size, channels), select_cases(quick)
    where = machine.describe(jax.devices()[0]) | {"torch_threads": config.threads}
    where |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for case in itertools.chain(*groups):
        if config.only not in case.name:
            continue
        found = measure(case, config)
        times = [f"{name} {value['ms']:.2f} ms" for name, value in found.items() if name != "speedup"]
        ratios = [f"ratio {r['ratio']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})" for r in found["speedup"].values()]
        print(f"{case.name}: {'  '.join(times + ratios)}", flush=True)
        if config.output is not None:
            record = {"benchmark": "detection", "case": case.name, "quick": quick, **found, **where}
            machine.append(config.output, machine.rounded(record))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except RuntimeError as error:
        sys.exit(f"error: {error}")

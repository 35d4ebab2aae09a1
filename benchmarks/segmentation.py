"""Times segmenters against torch, interleaved, with the same weights and images.

    pip install -e ".[reference]"
    python -m benchmarks.segmentation                                # all cases; about ten minutes on two cores
    python -m benchmarks.segmentation --output benchmarks/results/segmentation.jsonl

* `unet_same/train`: a train step of the padded U-Net with BatchNorm, two grey images of 256x256. torch's network is
  `parity/torch_unet.py`.
* `deeplabv3_resnet50/forward` and `/train`: two images of 256x256, against torchvision.

A train step is one of SGD with momentum on the cross-entropy of every pixel. torch runs eagerly. Each record holds the
median times in milliseconds, their ratio (above 1: ours is faster) with its quartiles, the time of our first call,
which includes compilation, and the largest relative difference of the logits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv
from benchmarks import machine
from benchmarks.timing import Contender, summary, take_turns
from parity import comparison, drawing

Case = Literal["unet_same/train", "deeplabv3_resnet50/forward", "deeplabv3_resnet50/train"]
CASES: tuple[Case, ...] = ("unet_same/train", "deeplabv3_resnet50/forward", "deeplabv3_resnet50/train")
BATCH, SIDE, RATE, MOMENTUM = 2, 256, 1e-3, 0.9


def networks(name: str, images: np.ndarray) -> tuple[Any, dict[str, Any], Any]:
    """Returns our model, its variables, and torch's network with the same weights."""
    if name == "deeplabv3_resnet50":
        pair = comparison.Pair(name, "torchvision", (SIDE, SIDE), classes=21, batch=BATCH)
        theirs = pair.theirs()
        _, tensors = comparison.weights(pair, theirs)
        theirs.load(tensors)
        return pair.ours(), pair.variables(tensors), theirs.module
    from parity import torch_unet

    model = fv.create_model(name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images[:1]))
    module = torch_unet.UNet(images.shape[-1], model.num_classes, padded=True)
    torch_unet.load(module, variables)
    return model, dict(variables), module


def contenders(case: str) -> tuple[dict[str, Contender], float]:
    """Returns the contenders of a case, ours first, and the relative difference of their logits."""
    import torch

    name, _, kind = case.partition("/")
    channels = fv.model_info(name).channels
    images = drawing.draw_images(case, (BATCH, SIDE, SIDE, channels))
    model, variables, module = networks(name, images)
    labels = drawing.draw_labels(case, (BATCH, SIDE, SIDE), model.num_classes)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    target = torch.from_numpy(labels.astype(np.int64))

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        found = module(x)
        return found["out"] if isinstance(found, dict) else found

    def their_forward() -> torch.Tensor:
        module.eval()
        with torch.inference_mode():
            return logits_of(pixels)

    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=MOMENTUM)

    def their_step() -> None:
        module.train()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits_of(pixels), target).backward()
        optimizer.step()

    forward = jax.jit(model.apply)
    images, labels = jax.device_put(images), jax.device_put(labels)
    wanted = their_forward().permute(0, 2, 3, 1).numpy()
    apart = comparison.error(np.asarray(forward(variables, images)), wanted)
    if kind == "forward":
        ours = Contender(lambda: forward(variables, images))
        return {"flaxvision": ours, "torch": Contender(their_forward, wait=lambda _: None)}, apart

    sgd = optax.sgd(RATE, MOMENTUM)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        params, statistics, slots = state

        def loss(params):
            logits, changed = model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(entropy), changed["batch_stats"]

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, slots = sgd.update(gradient, slots, params)
        return (optax.apply_updates(params, updates), statistics, slots), value

    start = jax.tree.map(jnp.array, (variables["params"], variables["batch_stats"]))
    state = [(*start, sgd.init(start[0]))]

    def our_step() -> jax.Array:
        state[0], value = step(state[0])
        return value

    return {"flaxvision": Contender(our_step), "torch": Contender(their_step, wait=lambda _: None)}, apart


def main(cases: tuple[Case, ...] = CASES, steps: int = 15, output: Path | None = None) -> None:
    """Times the segmenters.

    Args:
        cases: Cases to time.
        steps: Number of timed steps of each library.
        output: File to which one JSON line per case is appended.
    """
    import torch

    machine.check_output(output)
    torch.set_num_threads(machine.cores())
    where = machine.describe(jax.devices()[0]) | {"torch": torch.__version__}
    for case in cases:
        both, apart = contenders(case)
        for contender in both.values():
            contender.warm_up(2)
        take_turns([*both.values()], steps)
        record: dict[str, Any] = {"case": case, "batch": BATCH, "side": SIDE, "steps": steps, "difference": apart}
        record |= {"first_call_s": both["flaxvision"].first, **summary(both)}
        record = machine.rounded(record | where)
        print({key: value for key, value in record.items() if key not in where}, flush=True)
        if output is not None:
            machine.append(output, record)


if __name__ == "__main__":
    tyro.cli(main)

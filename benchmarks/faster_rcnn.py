"""Times Faster R-CNN (ResNet-50, FPN) against torchvision's, interleaved, with the same weights and images.

    pip install -e ".[reference]"
    python -m benchmarks.faster_rcnn                       # both cases; about ten minutes on two cores
    python -m benchmarks.faster_rcnn --output benchmarks/results/faster_rcnn.jsonl

* `detect`: one image of 800x1088 pixels, from normalized pixels to detections.
* `train`: a step of SGD with momentum on two images of 512x512 with ten objects each. BatchNorm, the stem and the first
  stage are frozen, as when torchvision's model is fine-tuned.

Each record holds the wall and processor time of both in seconds, their ratios (above 1: ours is faster), and the time
of our first call, which includes compilation. On a shared machine, processor times are more reliable.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv
from benchmarks import machine
from benchmarks.timing import Contender, take_turns
from parity import detection, drawing, rcnn

NETWORK = rcnn.Network()
SIZES = {"detect": (1, 800, 1088), "train": (2, 512, 512)}
RATE, MOMENTUM, DECAY = 1e-5, 0.9, 1e-4


@dataclasses.dataclass
class Timed(Contender):
    """A contender whose processor time is measured too.

    Attributes:
        cpu: Processor time of each timed step in seconds, summed over all threads.
    """

    cpu: list[float] = dataclasses.field(default_factory=list)

    def measure(self, count: int) -> None:
        """Times `count` steps and appends the results."""
        for _ in range(count):
            start = time.process_time()
            super().measure(1)
            self.cpu.append(time.process_time() - start)


def prepare(case: str) -> dict[str, Timed]:
    """Returns the contenders of a case; ours comes first."""
    import torch

    rows, height, width = SIZES[case]
    images = drawing.draw_images(case, (rows, height, width, 3))
    model = NETWORK.theirs()
    tensors = rcnn.draw(rcnn.shapes_of(model), rcnn.calibrate(model, images[:1]))
    rcnn.load(model, tensors)
    variables = jax.tree.map(jnp.asarray, NETWORK.variables(tensors))
    inputs = rcnn.torch_images(list(images))
    if case == "detect":
        run = jax.jit(functools.partial(fv.detect, NETWORK.ours()))
        model.eval()

        def theirs():
            with torch.no_grad():
                return model(inputs)

        return {"flaxvision": Timed(lambda: run(variables, images)), "torchvision": Timed(theirs, wait=lambda _: None)}

    targets = detection.targets(case, [(height, width)] * rows, NETWORK.classes, count=11)
    batch = {"image": images, **targets}
    ours = NETWORK.ours(frozen_stages=2)
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))
    constants = {"batch_stats": variables["batch_stats"]}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        params, slots = state

        def loss(params):
            found = ours.apply({**constants, "params": params}, batch, key, method="losses")
            return sum(jnp.mean(value) for value in found.values())

        value, gradient = jax.value_and_grad(loss)(params)
        updates, slots = optimizer.update(gradient, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    state = [(variables["params"], optimizer.init(variables["params"]))]

    def train():
        state[0], value = step(state[0], jax.random.key(0))
        return value

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("backbone.body.conv1", "backbone.body.layer1")))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, RATE, momentum=MOMENTUM, weight_decay=DECAY)
    truths = [rcnn.torch_truth(truth) for truth in detection.real(batch)]

    def fit():
        sgd.zero_grad()
        sum(model(inputs, truths).values()).backward()
        sgd.step()

    return {"flaxvision": Timed(train), "torchvision": Timed(fit, wait=lambda _: None)}


def measure(case: str, steps: int) -> dict[str, Any]:
    """Times a case and returns its record."""
    contenders = prepare(case)
    ours, theirs = contenders.values()
    start = time.process_time()
    ours.warm_up(1)
    first = {"first_call_s": ours.first, "first_call_cpu_s": time.process_time() - start}
    theirs.warm_up(1)
    take_turns([ours, theirs], steps)
    record: dict[str, Any] = {"case": case, "size": SIZES[case], "steps": steps, **first}
    for name, contender in contenders.items():
        record[name] = {"s": np.median(contender.times), "cpu_s": np.median(contender.cpu)}
    record["ratio"] = np.median(theirs.times) / np.median(ours.times)
    record["ratio_cpu"] = np.median(theirs.cpu) / np.median(ours.cpu)
    return record


def main(
    cases: tuple[Literal["detect", "train"], ...] = ("detect", "train"), steps: int = 7, output: Path | None = None
) -> None:
    """Times Faster R-CNN.

    Args:
        cases: Cases to time.
        steps: Number of timed steps of each library.
        output: File to which one JSON line per case is appended.
    """
    import torch

    machine.check_output(output)
    torch.set_num_threads(machine.cores())
    where = machine.describe(jax.devices()[0]) | {"version": rcnn.version()}
    for case in cases:
        record = machine.rounded(measure(case, steps) | where)
        print({key: value for key, value in record.items() if key not in where}, flush=True)
        if output is not None:
            machine.append(output, record)


if __name__ == "__main__":
    tyro.cli(main)

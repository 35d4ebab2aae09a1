"""Batches of images on canvases: all images of a batch are padded to the same size.

They keep the guarantees of `flaxvision.data.pipeline`. A batch depends only on the seed and the step. Iteration can
start at any step. The global batches are the same for any number of processes. An evaluation has every image exactly
once.
"""

import functools
from typing import Any

import numpy as np

from flaxvision.data import pipeline
from flaxvision.data.canvas import CanvasSource


class CanvasTrainBatches(pipeline.TrainBatches):
    """The batches of a training run, created by `train_batches` for a `CanvasSource`.

    They also have `seen` int32 [N], the number of images of the run before each, for the warm-up of YOLOv2.

    Attributes:
        source: The images.
        batch_size: Rows per batch, summed over all processes.
        steps_per_epoch: Number of batches after which every image was seen once, on average.
    """

    source: CanvasSource

    def __init__(self, reading: Any, seed: int, shuffle: bool, transform: Any, drop_remainder: bool):
        super().__init__(reading, seed, shuffle, transform, drop_remainder)
        _check_workers(reading)
        self.steps_per_epoch = max(1, round(len(self.source) / self.batch_size))
        self._members = [np.flatnonzero(self.source.canvas == k) for k in range(len(self.source.canvases.sizes))]
        # Every canvas has its own epochs. If a canvas has few images, a batch spans several epochs.
        self._order = functools.lru_cache(maxsize=64)(self._ordered)

    def canvas_of(self, step: int) -> int:
        """Returns the index of the canvas of the images of a step."""
        if self.source.multiscale is not None:
            return self._draw(step // self.source.multiscale)
        return int(self._cycle[0][step % len(self.source)])

    def _plan(self, step: int) -> Any:
        positions = self._reading.positions(step)
        canvas = self.canvas_of(step)
        if self.source.multiscale is not None:
            within = positions
            members, key = np.arange(len(self.source)), len(self._members)
        else:
            # In a cycle of N steps, a canvas with m images has m batches, so every image is seen `batch_size` times.
            cycles, place = divmod(step, len(self.source))
            members, key = self._members[canvas], canvas
            turn = cycles * len(members) + int(self._cycle[1][place])
            within = turn * self.batch_size + positions - step * self.batch_size
        epochs, offsets = np.divmod(within, len(members))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = members[self._order(key, int(epoch), len(members))[offsets[here]]]
        if self.source.multiscale is not None:
            indices = (1 + canvas) * len(self.source) + indices
        seen = np.minimum(positions, np.iinfo(np.int32).max).astype(np.int32)
        return pipeline._Plan(indices, positions, {"seen": seen})

    def _ordered(self, key: int, epoch: int, length: int) -> np.ndarray:
        if not self._identity["shuffle"]:
            return np.arange(length)
        return np.argsort(_raw(self._identity["seed"], 1 + key, epoch, length), kind="stable")

    def _draw(self, period: int) -> int:
        raw = _raw(self._identity["seed"], 0, period, 1)[0]
        return int(raw % np.uint64(len(self._members)))

    @functools.cached_property
    def _cycle(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the canvas of each of N steps, and the number of steps before it with the same canvas."""
        canvases, turns, times = [], [], []
        for k, members in enumerate(self._members):
            count = len(members)
            raw = _raw(self._identity["seed"], 1 + len(self._members) + k, 0, count) >> np.uint64(11)
            # Divide the cycle into `count` equal parts. Each part has one step of this canvas, at a random time.
            times.append((np.arange(count) + raw * 2.0**-53) / max(count, 1))
            canvases.append(np.full(count, k))
            turns.append(np.arange(count))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(canvases)[order], np.concatenate(turns)[order]


class CanvasEvalBatches(pipeline.EvalBatches):
    """The batches of one pass over a `CanvasSource`, canvas by canvas. The last batch of each canvas is padded."""

    source: CanvasSource

    def __init__(self, reading: Any):
        super().__init__(reading)
        _check_workers(reading)
        self._indices = [np.flatnonzero(self.source.canvas == k) for k in range(len(self.source.canvases.sizes))]
        counts = [-(-len(members) // self.batch_size) for members in self._indices]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _plan(self, step: int) -> Any:
        canvas = int(np.searchsorted(self._starts, step, side="right")) - 1
        members = self._indices[canvas]
        positions = self._reading.positions(step)
        within = positions - int(self._starts[canvas]) * self.batch_size
        real = within < len(members)
        indices = members[np.where(real, within, 0)]
        return pipeline._Plan(indices, positions, {"mask": real.astype(np.float32)})


def _raw(seed: int, key: int, part: int, length: int) -> np.ndarray:
    """Returns raw uint64 random numbers, which NumPy keeps stable across versions."""
    return np.random.Philox(np.random.SeedSequence([seed, 1 + key, part])).random_raw(length)


def _check_workers(reading: Any) -> None:
    sizes = reading.source.canvases.sizes
    if reading.num_workers and len(sizes) > 1:  # worker processes only share memory for batches of one shape
        raise ValueError(f"num_workers must be 0 for images on {len(sizes)} canvases; got {reading.num_workers}")

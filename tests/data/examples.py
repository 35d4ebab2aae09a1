"""A source and transforms that worker processes can import quickly."""

import os
import time

import numpy as np


class Numbers:
    """A source that is read example by example: images of their index. `read(index)` is called before."""

    name, classes, fingerprint = "numbers", ("a", "b"), "numbers"

    def __init__(self, length, read=None, shape=(2, 2, 1)):
        self.length, self.read, self.shape = length, read, shape

    def __len__(self):
        return self.length

    def __getitem__(self, index, /):
        if self.read is not None:
            self.read(index)
        return {"image": np.full(self.shape, index % 256, np.uint8), "label": np.int32(index % 2)}


def nap(index, seconds=0.01):
    time.sleep(seconds)


def fail_at(index, wrong):
    if index == wrong:
        raise KeyError(f"example {index}")


def send(index, numbers):
    if index in numbers:
        os.kill(os.getpid(), numbers[index])


def hang(index, wrong):
    if index >= wrong:
        time.sleep(1000)


def ragged(example, rng):
    return {**example, "image": example["image"][: 1 + example["label"]]}


def with_text(example, rng):
    return {**example, "text": np.array(["a"], object)}


def crop(example, rng):
    from flaxvision.data.cropping import random_resized_crop

    return {**example, "image": random_resized_crop(example["image"], rng, size=16), "noise": rng.normal(size=3)}

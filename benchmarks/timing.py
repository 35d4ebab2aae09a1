"""Interleaved timing: several contenders take turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Contender:
    """One implementation of the step that is timed.

    Attributes:
        run: Starts one step. Its result is handed to `wait`.
        wait: Waits until the step is done.
        chain: Number of steps that are started before waiting for the last one. A time is that of one step.
        first: Seconds of the first step, including compilation.
        times: Seconds of each timed step.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    chain: int = 1
    first: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)

    def warm_up(self, steps: int) -> None:
        """Runs `steps` untimed steps; only the duration of the first one is kept."""
        start = time.perf_counter()
        self.wait(self.run())
        self.first = time.perf_counter() - start
        for _ in range(steps - 1):
            self.wait(self.run())

    def measure(self, count: int) -> None:
        """Appends `count` times."""
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(self.chain):
                result = self.run()
            self.wait(result)
            self.times.append((time.perf_counter() - start) / self.chain)

    def result(self, batch_size: int | None = None) -> dict[str, float]:
        """Summarises the times.

        Args:
            batch_size: Images per step, for `images_per_s`.

        Returns:
            `ms`, `ms_q1` and `ms_q3` (median and quartiles), `compile_s` (the first step's time minus the median), and
            `images_per_s` if there is a batch size.
        """
        q1, median, q3 = np.percentile(self.times, (25, 50, 75))
        found = {"ms": 1e3 * median, "ms_q1": 1e3 * q1, "ms_q3": 1e3 * q3}
        found["compile_s"] = max(0.0, self.first - median)
        return found | ({"images_per_s": batch_size / median} if batch_size else {})


def take_turns(contenders: list[Contender], steps: int, block: int = 1, seconds: float = math.inf) -> None:
    """Times the contenders in turns, round by round; each round starts with the next one.

    Args:
        contenders: What to time, warmed up.
        steps: Timed steps of each contender.
        block: Consecutive steps of one contender in a round.
        seconds: Stop after the round in which this time is exceeded, but not before the third round unless a single
            round takes longer than that.
    """
    start = time.perf_counter()
    for number, done in enumerate(range(0, steps, block), start=1):
        turn = (number - 1) % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            contender.measure(min(block, steps - done))
        elapsed = time.perf_counter() - start
        if elapsed > seconds and (number >= 3 or elapsed > seconds * number):
            break


def ratio(ours: Contender, theirs: Contender, block: int = 1) -> dict[str, float]:
    """Returns their median time divided by ours, and the quartiles `q1` and `q3` of that ratio over the rounds."""
    a, b = np.asarray(ours.times), np.asarray(theirs.times)
    starts = range(0, len(a), block)
    rounds = [np.median(b[i : i + block]) / np.median(a[i : i + block]) for i in starts]
    q1, q3 = np.percentile(rounds, (25, 75))
    return {"ratio": float(np.median(b) / np.median(a)), "q1": float(q1), "q3": float(q3)}


def summary(contenders: Mapping[str, Contender], block: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """Returns the result of every contender by name, and under "speedup" the first one's ratio to each of the others.

    A ratio is the other's time divided by the first one's: above 1, the first one is faster.
    """
    first, *others = contenders
    found: dict[str, Any] = {name: contender.result(batch_size) for name, contender in contenders.items()}
    found["speedup"] = {name: ratio(contenders[first], contenders[name], block) for name in others}
    return found

"""Training records, and checks that metrics and state are finite."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import metrics as fm
from flaxvision.train.objectives import explain_loss
from flaxvision.train.state import TrainState
from flaxvision.train.step import check_loss

_NEVER = np.iinfo(np.int32).max


class Window:
    """The training metrics since the last record, merged on the device, and the first step that was not finite."""

    def __init__(self):
        self.metrics: dict[str, fm.Accumulator] | None = None
        self.stored: dict[str, Any] | None = None  # from a checkpoint; its types are known at the first step
        self.bad: Any = np.int32(_NEVER)
        self.images = 0

    def add(self, metrics: dict[str, fm.Accumulator], step: int, images: int) -> None:
        """Merges the metrics of one step without waiting for them."""
        if self.stored:
            self.metrics, self.stored = fm.from_json(self.stored, metrics), None
        self.metrics, self.bad = _merge(self.metrics, self.bad, metrics, np.int32(step))
        self.images += images

    def to_json(self) -> dict[str, Any]:
        """Returns the metrics as JSON values for a checkpoint."""
        return self.stored or fm.to_json(self.metrics)

    def check(self, saved: int | None) -> None:
        """Raises `FloatingPointError` if a loss was not finite. Waits for the last step."""
        if int(self.bad) != _NEVER:
            cause = explain_loss(self.metrics or {})
            raise FloatingPointError(f"the loss is not finite at step {int(self.bad)}{cause}; {_last_good(saved)}")


class Log:
    """Writes training records without making the loop wait for the device.

    If the loop fetched the values itself, it would wait at every record and the device would become idle. Instead, a
    thread fetches them. The loop writes a record once its values are available, and at the latest before the next
    record, an evaluation, a checkpoint or the end. The order of the records does not change, and the records up to a
    checkpoint are written before it. The thread also notes when the device finished, so `images_per_second` is exact.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], thread: ThreadPoolExecutor):
        self.write, self.thread = write, thread
        self.clock = time.perf_counter()
        self._pending: tuple[int, Window, Future[Any]] | None = None

    def begin(self, step: int, window: Window, learning_rate: Any) -> None:
        """Starts to fetch the values of a window and the learning rate, which is computed on the device."""
        self._pending = step, window, self.thread.submit(_fetch, window, learning_rate)

    def settle(self, saved: int | None, wait: bool = True) -> None:
        """Writes the pending record, if any. Without `wait`, returns if its values are not available yet."""
        if self._pending is None or not (wait or self._pending[2].done()):
            return
        step, window, future = self._pending
        metrics, learning_rate, now = future.result()  # an interrupt here leaves the record pending for `close`
        self._pending = None
        window.check(saved)
        record = {"step": step, "split": "train", **fm.compute(metrics)}
        if learning_rate is not None:
            record["learning_rate"] = float(learning_rate)
        record["images_per_second"] = window.images / (now - self.clock)
        self.clock = now
        self.write(record)

    def close(self, error: BaseException | None, saved: int | None) -> None:
        """Writes the pending record at the end of a run. A failure after an `error` becomes a note of that error."""
        try:
            self.settle(saved)
        except BaseException as failure:
            if error is None:
                raise
            if failure is not error:
                error.add_note(f"the last training record was not written: {failure!r}")


def check_metrics(metrics: dict[str, fm.Accumulator], shapes: dict[str, Any] | None) -> dict[str, Any]:
    """Checks that the metrics of a step have the same names and shapes as at the first step, also when merged.

    Otherwise, merging would be compiled again at every step, and a run could not be resumed from a checkpoint.

    Args:
        metrics: The metrics of a step.
        shapes: The result of this function for the first step; None at the first step.

    Returns:
        The shapes.

    Raises:
        ValueError: The names or shapes differ, or the metrics include no loss.
    """

    def shapes_of(metrics: Any) -> dict[str, Any]:
        return {name: [np.shape(x) for x in jax.tree.leaves(metric)] for name, metric in metrics.items()}

    found = shapes_of(metrics)
    if shapes is None:
        check_loss(metrics)
        shapes, found = found, shapes_of(jax.eval_shape(fm.merge, metrics, metrics))
    if found != shapes:
        before, after = ({k: v for k, v in x.items() if v != y.get(k)} for x, y in ((shapes, found), (found, shapes)))
        raise ValueError(f"training metrics must keep their names and shapes; got {before} and then {after}")
    return shapes


def check_state(state: TrainState, step: int, saved: int | None) -> None:
    """Checks that a state is finite before it is saved. Waits for the state.

    Args:
        state: The state.
        step: Its step, for the error.
        saved: Step of the last checkpoint, for the error.

    Raises:
        FloatingPointError: A part of the state is not finite. The message names the part.
    """
    finite = jax.device_get(_finite(state))
    for part, ok in finite.items():
        if not ok:
            raise FloatingPointError(f"{part} is not finite after step {step}; {_last_good(saved)}")


@jax.jit
def _finite(state: TrainState) -> dict[str, jax.Array]:
    def every(tree: Any, test: Callable[[jax.Array], jax.Array] = jnp.isfinite) -> jax.Array:
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.all(jnp.asarray([jnp.all(test(x)) for x in leaves]))

    def start_is_infinite(x: jax.Array) -> jax.Array:
        # Some optimizers begin with a scalar of infinity, such as the best loss so far.
        return jnp.isfinite(x) if x.ndim else ~jnp.isnan(x)

    return {
        "a parameter": every(state.params),
        "a value of the model's collections": every(state.collections),
        "the optimizer's state": every(state.opt_state, start_is_infinite),
        "the moving average": every(state.ema),
    }


def _fetch(window: Window, learning_rate: Any) -> tuple[dict[str, Any], Any, float]:
    learning_rate, _ = jax.device_get((learning_rate, window.bad))
    return fm.to_host(window.metrics or {}), learning_rate, time.perf_counter()


@jax.jit
def _merge(total, bad, metrics, step):
    losses = [x for x in jax.tree.leaves(metrics["loss"]) if jnp.issubdtype(x.dtype, jnp.inexact)]
    finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in losses]))
    return fm.merge(total, metrics), jnp.minimum(bad, jnp.where(finite, bad, step))


def _last_good(saved: int | None) -> str:
    return "there is no checkpoint yet" if saved is None else f"the last checkpoint is step {saved}"

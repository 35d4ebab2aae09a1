"""Compares one of our models with a library's, given the same weights: forward, gradients and a training trajectory.

Errors are relative, `||ours - theirs|| / ||theirs||`, over all elements at once. The forward passes are in float32, the
gradients and the trajectory in float64 on both sides. In float32, a ReLU or a max-pool that rounds to the other side in
one library changes single elements of the gradient by several per cent.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import flaxvision as fv
from flaxvision.weights.convert import layout_of
from parity import drawing, libraries

Tensors = dict[str, np.ndarray]
Size = tuple[int, int]

STEPS, MOMENTUM = 10, 0.9
FORWARD_TOLERANCE, TRAINING_TOLERANCE = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model, and the library that it is compared with.

    Attributes:
        model: Registry name.
        source: The library.
        size: Height and width of the images for the forward passes.
        training_size: Height and width of the images for the gradients and the trajectory.
        aux: Include the auxiliary classifiers in training.
        classes: Number of classes.
        batch: Batch size.
    """

    model: str
    source: str
    size: Size = (97, 131)
    training_size: Size = (65, 81)
    aux: bool = False
    classes: int = 1000
    batch: int = 2

    def images(self, name: str, size: Size | None = None) -> np.ndarray:
        """Draws a batch of images by name; the default size is that of the forward passes."""
        return drawing.draw_images(name, (self.batch, *(size or self.size), 3))

    def batches(self) -> list[libraries.Batch]:
        """Returns the images and labels of the trajectory, two batches in turn."""
        images = [self.images(f"images {i}", self.training_size) for i in range(2)]
        dense = fv.model_info(self.model).task == "segmentation"
        shape = (self.batch, *self.training_size) if dense else (self.batch,)
        labels = [drawing.draw_labels(f"labels {i}", shape, self.classes) for i in range(2)]
        return [(images[step % 2], labels[step % 2]) for step in range(STEPS)]

    def theirs(self, *, double: bool = False) -> Any:
        """Builds the library's network."""
        size = self.training_size if double else self.size
        return libraries.build(self.source, self.model, size, classes=self.classes, double=double, aux=self.aux)

    def ours(self) -> Any:
        """Builds our module."""
        return fv.create_model(self.model, **self._fields)

    def variables(self, tensors: Tensors) -> dict[str, Any]:
        """Converts the library's tensors to our variables, `params` and `batch_stats` (possibly empty)."""
        variables = fv.weights.convert(self.model, tensors, source=self.source, **self._fields)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def frozen(self, params: Any) -> set[str]:
        """Returns the paths of those of our parameters that are constants in the library."""
        return {path for path in _flat(params) if any(fnmatch.fnmatchcase(path, p) for p in self._layout.constant)}

    def folded(self, tensors: Tensors) -> int:
        """Returns how many of the library's parameters the conversion folds into others."""
        left = self._layout.adapt(dict(tensors)) if self._layout.adapt else tensors
        return sum(value.size for value in tensors.values()) - sum(value.size for value in left.values())

    @property
    def _layout(self) -> Any:
        return layout_of(self.model, self.source)

    @property
    def _overrides(self) -> dict[str, Any]:
        given: dict[str, Any] = {"num_classes": self.classes}
        for field in dataclasses.fields(fv.create_model(self.model)):
            if field.name.endswith("dropout_rate"):
                given[field.name] = 0.0
            elif field.name == "aux_heads":
                given[field.name] = self.aux
        return given

    @property
    def _fields(self) -> dict[str, Any]:
        return {**fv.weights.fields(self.model, self.source), **self._overrides}


def error(ours: Any, theirs: Any) -> float:
    """Returns `||ours - theirs|| / ||theirs||` over arrays, or over trees of the same structure."""
    a, b = (jax.tree.leaves(tree) for tree in (ours, theirs))
    return _apart(a, b) / _norm(b)


def weights(pair: Pair, theirs: Any) -> tuple[dict[str, tuple[float, float]], Tensors]:
    """Draws the library's tensors with statistics that suit its activations, and returns the statistics and tensors."""
    theirs.load(drawing.draw(theirs.shapes))
    size = pair.training_size if theirs.double else pair.size
    statistics = theirs.statistics(pair.images("calibration", size))
    return statistics, drawing.draw(theirs.shapes, statistics)


def forward(pair: Pair) -> dict[str, Any]:
    """Compares the logits in float32, in evaluation and in training mode.

    Returns:
        `version`, `params_theirs`, `params_ours` and `params_folded` (theirs that the conversion folds into others),
        `forward_eval`, `forward_train`, and for pairs with auxiliary classifiers `forward_aux`, the largest error.
    """
    theirs = pair.theirs()
    _, tensors = weights(pair, theirs)
    theirs.load(tensors)
    images = pair.images("images")
    wanted = {train: theirs.forward(images, train=train) for train in (False, True)}
    variables = pair.variables(tensors)
    frozen = pair.frozen(variables["params"])
    ours = outputs(pair.ours(), variables, images)
    ours_train = outputs(pair.ours(), variables, images, train=True)
    result = {
        "version": theirs.version,
        "params_theirs": theirs.params,
        "params_folded": pair.folded(tensors),
        "params_ours": sum(v.size for k, v in _flat(variables["params"]).items() if k not in frozen),
        "forward_eval": error(ours.logits, wanted[False].logits),
        "forward_train": error(ours_train.logits, wanted[True].logits),
    }
    if pair.aux:
        assert set(ours_train.aux) == set(wanted[True].aux), (set(ours_train.aux), set(wanted[True].aux))
        result["forward_aux"] = max(error(ours_train.aux[name], value) for name, value in wanted[True].aux.items())
    return result


def outputs(model: Any, variables: dict[str, Any], images: np.ndarray, train: bool = False) -> libraries.Outputs:
    """Returns our logits and those of the auxiliary classifiers."""
    apply = jax.jit(lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats", "aux_logits"]))
    logits, changed = apply(variables, images)
    aux = {name: np.asarray(value[0]) for name, value in changed.get("aux_logits", {}).items()}
    return libraries.Outputs(np.asarray(logits), aux)


def training(pair: Pair, *, trajectory: bool = True) -> dict[str, Any]:
    """Compares gradients, and `STEPS` steps of SGD with momentum, in float64 with batch statistics.

    The learning rate is such that, to first order, the first step reduces the loss by 5 %.

    Returns:
        `gradient`, `gradient_worst` (the largest error of one tensor; tensors with almost no gradient count little),
        `loss_first`, `loss_last`, and the drift over the trajectory: `drift_loss` (the worst step), `drift_params` and
        `drift_statistics`, both relative to the distance from their start.
    """
    batches = pair.batches()
    theirs = pair.theirs(double=True)
    # Images and weights are float32 numbers; the arithmetic is float64.
    start = {name: value.astype(np.float64) for name, value in weights(pair, theirs)[1].items()}
    theirs.load(start)
    loss, tensors = theirs.gradients(batches[0])
    gradient = pair.variables(start | tensors)["params"]
    rate = 0.05 * loss / _norm(jax.tree.leaves(gradient)) ** 2
    theirs.load(start)
    trained = theirs.train(batches, rate, MOMENTUM) if trajectory else None
    del theirs
    before = pair.variables(start)
    frozen = pair.frozen(before["params"])
    del start, tensors
    with jax.enable_x64(True):
        ours = _Trainer(pair, before, frozen)
        losses = [ours.step(batches[0], 0.0)]
        ours_gradient = ours.velocity
        for path in frozen:
            _flat(gradient)[path][...] = 0
        result = {
            "gradient": error(ours_gradient, gradient),
            "gradient_worst": worst(ours_gradient, gradient),
            "loss_first": loss,
        }
        if trained is None:
            return result | {"drift_first_loss": abs(losses[0] / loss - 1)}
        del ours_gradient, gradient
        ours.restart(before)
        losses = [ours.step(batch, rate) for batch in batches]
        after = pair.variables(trained.tensors)
        result |= {
            "loss_last": losses[-1],
            "rate": rate,
            "drift_loss": max(abs(a / b - 1) for a, b in zip(losses, trained.losses, strict=True)),
            "drift_params": _drift(ours.params, after["params"], before["params"]),
        }
        if before["batch_stats"]:
            result["drift_statistics"] = _drift(ours.statistics, after["batch_stats"], before["batch_stats"])
        return result


class _Trainer:
    """SGD with momentum for our model. One compiled step serves the gradient and the trajectory."""

    def __init__(self, pair: Pair, variables: dict[str, Any], frozen: set[str]):
        self._model, self._frozen = pair.ours(), frozen
        self.restart(variables)

    def restart(self, variables: dict[str, Any]) -> None:
        self.params, self.statistics = jax.tree.map(jnp.array, (variables["params"], variables["batch_stats"]))
        self.velocity = jax.tree.map(jnp.zeros_like, self.params)

    def step(self, batch: libraries.Batch, rate: float) -> float:
        images, labels = np.asarray(batch[0], np.float64), batch[1]
        state = (self.params, self.velocity, self.statistics)
        loss, (self.params, self.velocity, self.statistics) = self._compiled(state, images, labels, rate)
        return float(loss)

    @functools.cached_property
    def _compiled(self) -> Any:
        def loss_of(params, statistics, images, labels):
            variables = {"params": params, "batch_stats": statistics}
            logits, changed = self._model.apply(variables, images, train=True, mutable=["batch_stats", "aux_logits"])
            aux = [value[0] for value in changed.get("aux_logits", {}).values()]
            loss = _cross_entropy(logits, labels)
            loss = loss + libraries.AUX_WEIGHT * sum(_cross_entropy(value, labels) for value in aux)
            return loss, changed.get("batch_stats", {})

        def step(state, images, labels, rate):
            params, velocity, statistics = state
            (loss, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, statistics, images, labels)
            gradient = jax.tree.map_with_path(self._moving, gradient)
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
            params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
            return loss, (params, velocity, statistics)

        return jax.jit(step, donate_argnums=0)

    def _moving(self, path: Any, gradient: jax.Array) -> jax.Array:
        return jnp.zeros_like(gradient) if "/".join(str(key.key) for key in path) in self._frozen else gradient


def _cross_entropy(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))


def _drift(ours: Any, theirs: Any, start: Any) -> float:
    """Returns the distance of two states, relative to the distance from their start."""
    a, b, c = (jax.tree.leaves(tree) for tree in (ours, theirs, start))
    return _apart(a, b) / _apart(b, c)


def worst(ours: Any, theirs: Any) -> float:
    """Returns the largest error of one tensor; tensors with almost no gradient count little."""
    a, b = _flat(ours), _flat(theirs)
    norms = {path: _norm([value]) for path, value in b.items()}
    # The gradient of a bias before a BatchNorm is nothing but rounding error.
    least = 1e-6 * max(norms.values())
    return max(_apart([a[path]], [b[path]]) / max(norms[path], least) for path in b)


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


# One leaf at a time, because a VGG has 1.1 GB of float64 parameters.
def _norm(arrays: list[Any]) -> float:
    return math.sqrt(sum(float(np.linalg.norm(np.asarray(value, np.float64))) ** 2 for value in arrays))


def _apart(a: list[Any], b: list[Any]) -> float:
    assert [np.shape(x) for x in a] == [np.shape(y) for y in b]  # broadcasting could hide a difference
    return math.sqrt(sum(_norm([np.asarray(x, np.float64) - y]) ** 2 for x, y in zip(a, b, strict=True)))

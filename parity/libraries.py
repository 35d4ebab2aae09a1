"""The networks of torchvision, timm, pytorchcv, smp and Keras behind one interface, for parity comparisons.

`build` makes a network in float32 or float64, without pretrained weights and with every dropout off. Batches are like
ours: images `[N, H, W, C]` and integer labels, one per image or one per pixel. Tensors have the library's names. "smp"
is segmentation_models_pytorch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity import drawing

Tensors = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]

AUX_WEIGHT = 0.3

# Names that differ from ours.
NAMES = {
    "torchvision": {"alexnet_tv": "alexnet", "googlenet_bn": "googlenet"},
    "timm": {
        "xception": "legacy_xception",
        "mobilenet_v1": "mobilenetv1_100",
        "mobilenet_v2": "mobilenetv2_100",
        "senet154": "legacy_senet154",
        **{f"se_resnet{n}": f"legacy_seresnet{n}" for n in (18, 34, 50, 101, 152)},
    },
    "pytorchcv": {"bn_inception": "bninception", "alexnet_ungrouped": "alexnet"},
    "keras": {
        "vgg16": "VGG16",
        "vgg19": "VGG19",
        "inception_v3": "InceptionV3",
        "inception_resnet_v2": "InceptionResNetV2",
        "xception": "Xception",
        "mobilenet_v1": "MobileNet",
        "mobilenet_v2": "MobileNetV2",
        **{f"resnet{n}": f"ResNet{n}" for n in (50, 101, 152)},
    },
}
AUX_HEADS = {
    "deeplabv3_resnet50": ("aux",),
    "fcn_resnet50": ("aux",),
    "googlenet_bn": ("aux1", "aux2"),
    "inception_v3": ("aux1",),
}
_PACKAGES = {"smp": "segmentation_models_pytorch"}


class Outputs(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: Logits `[N, K]`, or `[N, H, W, K]` of a segmenter.
        aux: Logits of the auxiliary classifiers, by our names.
    """

    logits: np.ndarray
    aux: dict[str, np.ndarray]


class Trained(NamedTuple):
    """Result of a few SGD steps.

    Attributes:
        losses: The loss before each step.
        tensors: The state after the last step, with biased running variances, as ours are.
    """

    losses: list[float]
    tensors: Tensors


def build(
    source: str, model: str, size: tuple[int, int], *, classes: int = 1000, double: bool = False, aux: bool = False
) -> TorchNetwork | KerasNetwork:
    """Builds a library's network.

    Args:
        source: "torchvision", "timm", "pytorchcv", "smp" or "keras".
        model: Our registry name.
        size: Height and width of the images.
        classes: Number of classes.
        double: Compute in float64.
        aux: Include the auxiliary classifiers of `AUX_HEADS`.

    Returns:
        The network, with arbitrary weights.

    Raises:
        ValueError: There is no such source.
    """
    name = NAMES.get(source, {}).get(model, model)
    if source == "keras":
        return KerasNetwork(name, size, classes, double)
    return TorchNetwork(_torch_module(source, name, classes, aux), source, double, AUX_HEADS[model] if aux else ())


def _torch_module(source: str, name: str, classes: int, aux: bool) -> Any:
    _import_torchvision()  # timm and pytorchcv import it too
    if source == "torchvision":
        import torchvision

        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": aux, "init_weights": False}
        elif name in ("fcn_resnet50", "deeplabv3_resnet50"):
            options = {"aux_loss": aux, "weights_backbone": None}
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    if source == "timm":
        import timm

        return timm.create_model(name, pretrained=False, num_classes=classes, drop_rate=0.0)
    if source == "pytorchcv":
        from pytorchcv.model_provider import get_model

        return get_model(name, pretrained=False, num_classes=classes)
    if source == "smp":
        import segmentation_models_pytorch as smp

        return smp.Unet(name.removeprefix("unet_"), encoder_weights=None, classes=classes)
    raise ValueError(f"source must be 'torchvision', 'timm', 'pytorchcv', 'smp' or 'keras'; got {source!r}")


@functools.cache
def _import_torchvision() -> None:
    """Imports torchvision, through a helper for a torch without CUDA if there is one on the path."""
    try:
        import torchvision_on_cpu  # noqa: F401
    except ImportError:
        import torchvision  # noqa: F401


class TorchNetwork:
    """A torch module.

    Attributes:
        module: The module.
        version: Versions of its library and of torch.
        shapes: Shapes of the state's tensors, by name.
        params: Number of trainable parameters.
        double: Whether it computes in float64.
    """

    def __init__(self, module: Any, source: str, double: bool, aux: tuple[str, ...]):
        import torch

        self._torch, self._aux, self.double = torch, aux, double
        self.module = module.double() if double else module
        for part in self.module.modules():
            if isinstance(part, torch.nn.modules.dropout._DropoutNd):
                part.p = 0.0
        version = importlib.metadata.version(_PACKAGES.get(source, source))
        self.version = f"{source} {version}, torch {torch.__version__.partition('+')[0]}"
        self.shapes = {name: tuple(value.shape) for name, value in self.module.state_dict().items()}
        self.params = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        self._norms = {
            name: part
            for name, part in self.module.named_modules()
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        }

    def load(self, tensors: Tensors) -> None:
        """Sets the whole state."""
        self.module.load_state_dict({name: self._torch.from_numpy(value) for name, value in tensors.items()})

    def state(self) -> Tensors:
        """Returns a copy of the whole state."""
        return {name: value.detach().numpy().copy() for name, value in self.module.state_dict().items()}

    def statistics(self, images: np.ndarray) -> dict[str, tuple[float, float]]:
        """Returns mean and variance of each BatchNorm's input in training mode; resets the running statistics."""
        momenta = {name: part.momentum for name, part in self._norms.items()}
        for part in self._norms.values():
            part.reset_running_stats()
            part.momentum = None  # a cumulative average; after one batch, that batch's statistics
        self._run(images, train=True)
        for name, part in self._norms.items():
            part.momentum = momenta[name]
        seen = {name: part for name, part in self._norms.items() if part.num_batches_tracked > 0}
        return drawing.statistics_of(
            {name: part.running_mean.numpy() for name, part in seen.items()},
            {name: part.running_var.numpy() for name, part in seen.items()},
        )

    def forward(self, images: np.ndarray, *, train: bool = False) -> Outputs:
        """Returns the logits and leaves the state unchanged."""
        kept = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        logits, aux = self._run(images, train)
        with self._torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(kept[name])
        return Outputs(logits.detach().numpy(), {name: value.detach().numpy() for name, value in aux.items()})

    def gradients(self, batch: Batch) -> tuple[float, Tensors]:
        """Returns the loss in training mode and its gradient by name; updates the running statistics."""
        loss = self._loss(batch)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in self.module.named_parameters() if p.grad is not None}
        return loss.item(), gradients

    def train(self, batches: Sequence[Batch], rate: float, momentum: float) -> Trained:
        """Runs SGD with momentum, one step per batch."""
        torch = self._torch
        optimizer = torch.optim.SGD(self.module.parameters(), rate, momentum=momentum)
        start = {name: (p.running_mean.clone(), p.running_var.clone()) for name, p in self._norms.items()}
        counts: dict[str, int] = {}

        def count(name: str, images: Any) -> None:
            counts[name] = images.numel() // images.shape[1]

        hooks = [
            part.register_forward_pre_hook(lambda _, inputs, name=name: count(name, inputs[0]))
            for name, part in self._norms.items()
        ]
        losses = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        for hook in hooks:
            hook.remove()
        # torch's running variance is unbiased: n / (n - 1) times the variance of each batch.
        for name, part in self._norms.items():
            if name in counts:
                old = start[name][1] * (1 - part.momentum) ** len(batches)
                n = counts[name]
                part.running_var.copy_(old + (part.running_var - old) * ((n - 1) / n))
        return Trained(losses, self.state())

    def _run(self, images: np.ndarray, train: bool) -> tuple[Any, dict[str, Any]]:
        torch = self._torch
        self.module.train(train)
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        x = x.to(next(self.module.parameters()).dtype)
        with torch.set_grad_enabled(train):
            y = self.module(x)
        if isinstance(y, dict):  # a segmenter of torchvision
            y = {name: value.movedim(1, -1) for name, value in y.items()}
            return y.pop("out"), y
        if isinstance(y, torch.Tensor) and y.ndim == 4:
            return y.movedim(1, -1), {}
        if train and self._aux:  # GoogLeNet returns the logits, then its heads from the last to the first
            return y[0], dict(zip(self._aux, reversed(y[1:]), strict=True))
        return (y[0] if isinstance(y, tuple) else y), {}

    def _loss(self, batch: Batch) -> Any:
        images, labels = batch
        target = self._torch.from_numpy(labels.astype(np.int64))
        logits, aux = self._run(images, train=True)

        def criterion(logits: Any) -> Any:
            return self._torch.nn.functional.cross_entropy(logits.movedim(-1, 1), target)

        return criterion(logits) + AUX_WEIGHT * sum(criterion(value) for value in aux.values())


class KerasNetwork:
    """A network of `keras.applications` on the JAX backend, with the interface of `TorchNetwork`."""

    def __init__(self, name: str, size: tuple[int, int], classes: int, double: bool):
        os.environ["KERAS_BACKEND"] = "jax"
        import jax
        import keras

        if keras.backend.backend() != "jax":
            raise RuntimeError(f"Keras backend must be jax; got {keras.backend.backend()}")
        self._jax, self._config, self.double = jax, keras.config, double
        keras.backend.clear_session()  # restarts the numbering of unnamed layers
        with self._settings():
            self.model = getattr(keras.applications, name)(
                weights=None, input_shape=(*size, 3), classes=classes, classifier_activation=None
            )
        for layer in self.model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        self.version = f"keras {keras.__version__}, jax {jax.__version__}"
        self.shapes = {w.path: tuple(w.shape) for w in self.model.weights}
        self.params = sum(math.prod(w.shape) for w in self.model.trainable_weights)
        self._momenta = {
            variable.path: layer.momentum
            for layer in self.model.layers
            if isinstance(layer, keras.layers.BatchNormalization)
            for variable in layer.non_trainable_variables
        }
        self._trainable = [v.path for v in self.model.trainable_variables]
        self._others = [v.path for v in self.model.non_trainable_variables]
        self._apply = jax.jit(self.model.stateless_call, static_argnames="training")

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        # On JAX, Keras' type promotion turns float64 into float32, for example in every BatchNorm.
        from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE as narrower

        floatx, narrow = self._config.floatx(), narrower["float64"]
        if self.double:
            self._config.set_floatx("float64")
            narrower["float64"] = "float64"
        try:
            with self._jax.enable_x64(self.double), self._jax.numpy_rank_promotion("allow"):
                yield
        finally:
            self._config.set_floatx(floatx)
            narrower["float64"] = narrow

    def load(self, tensors: Tensors) -> None:
        """Sets the whole state."""
        with self._settings():
            for variable in self.model.weights:
                variable.assign(tensors[variable.path])

    def state(self) -> Tensors:
        """Returns a copy of the whole state."""
        return {w.path: np.array(w.value) for w in self.model.weights}

    def _variables(self) -> tuple[list[Any], list[Any]]:
        return [v.value for v in self.model.trainable_variables], [v.value for v in self.model.non_trainable_variables]

    def statistics(self, images: np.ndarray) -> dict[str, tuple[float, float]]:
        """Returns mean and variance of each BatchNorm's input in training mode."""
        with self._settings():
            trainable, others = self._variables()
            zeros = [self._jax.numpy.zeros_like(v) for v in others]
            _, after = self._apply(trainable, zeros, self._images(images), training=True)
        batch = {
            path: np.asarray(value) / (1 - self._momenta[path])
            for path, value in zip(self._others, after, strict=True)
            if path in self._momenta
        }
        means = {path.rpartition("/")[0]: v for path, v in batch.items() if path.endswith("moving_mean")}
        return drawing.statistics_of(means, {name: batch[f"{name}/moving_variance"] for name in means})

    def forward(self, images: np.ndarray, *, train: bool = False) -> Outputs:
        """Returns the logits and leaves the state unchanged."""
        with self._settings():
            logits, _ = self._apply(*self._variables(), self._images(images), training=train)
        return Outputs(np.asarray(logits), {})

    def gradients(self, batch: Batch) -> tuple[float, Tensors]:
        """Returns the loss in training mode and its gradient by name."""
        with self._settings():
            trainable, others = self._variables()
            (loss, _), gradients = self._value_and_grad(trainable, others, self._images(batch[0]), batch[1])
        return float(loss), {path: np.asarray(g) for path, g in zip(self._trainable, gradients, strict=True)}

    def train(self, batches: Sequence[Batch], rate: float, momentum: float) -> Trained:
        """Runs SGD with momentum, one step per batch."""
        losses = []
        with self._settings():
            trainable, others = self._variables()
            velocity = [0 * value for value in trainable]
            for images, labels in batches:
                (loss, others), gradients = self._value_and_grad(trainable, others, self._images(images), labels)
                velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
                trainable = [p - rate * v for p, v in zip(trainable, velocity, strict=True)]
                losses.append(float(loss))
        paths, values = self._trainable + self._others, [*trainable, *others]
        # `_others` includes the seeds of dropout layers, which are no weights.
        state = {path: np.asarray(v) for path, v in zip(paths, values, strict=True) if path in self.shapes}
        return Trained(losses, state)

    def _images(self, images: np.ndarray) -> Any:
        return self._jax.numpy.asarray(images, "float64" if self.double else "float32")

    @functools.cached_property
    def _value_and_grad(self) -> Any:
        def loss_of(trainable, others, images, labels):
            logits, others = self.model.stateless_call(trainable, others, images, training=True)
            logs = self._jax.nn.log_softmax(logits)
            return -self._jax.numpy.mean(logs[np.arange(len(images)), labels]), others

        return self._jax.jit(self._jax.value_and_grad(loss_of, has_aux=True))

"""The networks of `flaxvision` in Keras 3 and in torch, for `throughput.py --vs`.

`load_keras` and `load_torch` give the two steps that are timed: what a user of that library writes, with the weights of
our model in it. They refuse a network that is not the same one: other parameter shapes, or other logits.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

import flaxvision as fv
from parity import published

LEARNING_RATE, MOMENTUM = 0.01, 0.9

# A chain of layers: (kind, *arguments). Convolutions are (features, kernel size, padding, activation), dense layers
# (features, activation).
CHAINS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "mlp": (("flatten",), ("dense", 300, "relu"), ("dense", 100, "relu"), ("dense", 10, None)),
    "lenet5_modern": (
        ("conv", 6, 5, "valid", "tanh"),
        ("avg_pool", 2),
        ("conv", 16, 5, "valid", "tanh"),
        ("avg_pool", 2),
        ("conv", 120, 5, "valid", "tanh"),
        ("flatten",),
        ("dense", 84, "tanh"),
        ("dense", 10, None),
    ),
    "lenet_dli": (
        ("conv", 32, 3, "valid", "relu"),
        ("conv", 64, 3, "valid", "relu"),
        ("max_pool", 2),
        ("dropout", 0.25),
        ("flatten",),
        ("dense", 128, "relu"),
        ("dropout", 0.5),
        ("dense", 10, None),
    ),
    "fashion_cnn": (
        ("conv", 64, 7, "same", "relu"),
        ("max_pool", 2),
        ("conv", 128, 3, "same", "relu"),
        ("conv", 128, 3, "same", "relu"),
        ("max_pool", 2),
        ("conv", 256, 3, "same", "relu"),
        ("conv", 256, 3, "same", "relu"),
        ("max_pool", 2),
        ("flatten",),
        ("dense", 128, "relu"),
        ("dropout", 0.5),
        ("dense", 64, "relu"),
        ("dropout", 0.5),
        ("dense", 10, None),
    ),
}


class Problem(NamedTuple):
    """What every library is given.

    Attributes:
        model: The registry name.
        images: `[N, H, W, C]` float32.
        labels: `[N]` int32.
        bfloat16: Compute in bfloat16, with float32 parameters.
        weights: Our parameters in the order of their creation: kernels HWIO and `[in, out]`, biases.
        logits: Ours in evaluation, `[N, K]`.
        variables: All of our variables, for the published networks.
        fields: Of our model, where they are not the defaults.
    """

    model: str
    images: np.ndarray
    labels: np.ndarray
    bfloat16: bool
    weights: list[np.ndarray]
    logits: np.ndarray
    variables: Mapping[str, Any] = MappingProxyType({})
    fields: Mapping[str, Any] = MappingProxyType({})


class Peer(NamedTuple):
    """A library's network.

    Attributes:
        version: Of the library.
        params: Trainable parameters.
        forward: Starts one forward pass in evaluation mode.
        train: Starts one train step.
        wait: Waits for the result of `forward` or `train`.
        peak_memory: Returns the peak device memory in bytes since the network was built, or None if it is not known.
    """

    version: str
    params: int
    forward: Callable[[], Any]
    train: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda result: result
    peak_memory: Callable[[], int | None] = lambda: None


def check_available(library: str, model: str) -> None:
    """Checks, before anything is timed, that `--vs library` can work.

    Raises:
        ValueError: The model has no counterpart here.
        ImportError: The library is not installed.
    """
    if model not in CHAINS and not published.has(library, model):
        names = [*CHAINS, *filter(lambda name: published.has(library, name), fv.list_models())]
        raise ValueError(f"--vs has no network for {model!r} in {library}; it has {', '.join(sorted(names))}")
    if importlib.util.find_spec(library) is None:
        raise ImportError(f'--vs {library} needs {library}, which is not installed: pip install -e ".[reference]"')


def load_keras(problem: Problem) -> Peer:
    """The network in Keras 3 on the JAX backend, channels last.

    Its train step is `train_on_batch` after `compile(optimizer, loss, jit_compile=True)`, its forward pass
    `predict_on_batch`: both compiled, both waiting for their result.

    Args:
        problem: What to compute.

    Returns:
        The `Peer`.

    Raises:
        RuntimeError: Keras runs on another backend, or the network is not ours.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError(f"--vs keras is for the JAX backend; Keras was imported with {keras.backend.backend()}")
    if problem.model in CHAINS:
        model = _keras_chain(problem)
    else:
        model = published.keras_model(
            problem.model, problem.variables, problem.images.shape[1:], bfloat16=problem.bfloat16
        )
    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    images, labels = jax.device_put(problem.images), jax.device_put(problem.labels)
    peer = Peer(
        version=keras.__version__,
        params=sum(math.prod(w.shape) for w in model.trainable_weights),
        forward=lambda: model.predict_on_batch(images),
        train=lambda: model.train_on_batch(images, labels),
    )
    source = "keras" if published.in_keras(problem.model) and problem.model not in CHAINS else None
    _check_logits("keras", np.asarray(model(images, training=False), np.float32), problem, source)
    return peer


def _keras_chain(problem: Problem) -> Any:
    import keras

    layers = keras.layers
    options: dict[str, Any] = {"dtype": "mixed_bfloat16" if problem.bfloat16 else "float32"}
    stack = [keras.Input(problem.images.shape[1:], dtype="float32")]
    for kind, *arguments in CHAINS[problem.model]:
        if kind == "conv":
            features, size, padding, activation = arguments
            layer = layers.Conv2D(
                features, size, padding=padding, activation=activation, data_format="channels_last", **options
            )
        elif kind == "dense":
            features, activation = arguments
            layer = layers.Dense(features, activation=activation, **options)
        else:
            plain = {
                "max_pool": layers.MaxPooling2D,
                "avg_pool": layers.AveragePooling2D,
                "dropout": layers.Dropout,
                "flatten": layers.Flatten,
            }
            layer = plain[kind](*arguments, **options)
        stack.append(layer)
    stack.append(layers.Activation("linear", dtype="float32"))
    model = keras.Sequential(stack)
    _check_shapes("keras", [tuple(w.shape) for w in model.trainable_weights], problem.weights)
    for variable, value in zip(model.trainable_weights, problem.weights, strict=True):
        variable.assign(value)
    return model


def load_torch(problem: Problem) -> Peer:
    """The network in eager torch, channels first, with torch's own number of threads; on CUDA where JAX is there too.

    Args:
        problem: What to compute.

    Returns:
        The `Peer`.

    Raises:
        RuntimeError: JAX has a GPU that torch does not see, or the network is not ours.
    """
    import torch
    from torch import nn

    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("--vs torch: JAX runs on a GPU and this torch has no CUDA; set JAX_PLATFORMS=cpu")
        # XLA's default on such GPUs is TF32 for products and convolutions; torch's for convolutions only.
        tf32 = jax.config.jax_default_matmul_precision in (None, "default", "tensorfloat32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
    if problem.model in CHAINS:
        model = _torch_chain(problem).to(device)
    else:
        stride = bool(problem.fields.get("stride_in_1x1"))
        model = published.torch_model(problem.model, problem.variables, problem.images.shape[1:], stride).to(device)
    images = torch.from_numpy(np.ascontiguousarray(problem.images.transpose(0, 3, 1, 2))).to(device)
    labels = torch.from_numpy(problem.labels.astype(np.int64)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    loss_of = nn.CrossEntropyLoss()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def logits_of() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=problem.bfloat16):
            return model(images).float()

    def forward() -> torch.Tensor:
        model.eval()
        with torch.inference_mode():
            logits = logits_of()
        wait()
        return logits

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits_of(), labels).backward()
        optimizer.step()
        wait()

    published_in = None if problem.model in CHAINS else published.torch_source(problem.model)
    _check_logits("torch", forward().cpu().numpy(), problem, published_in)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Peer(torch.__version__, params, forward, train)


def _torch_chain(problem: Problem) -> Any:
    import torch
    from torch import nn

    activations = {"relu": nn.ReLU, "tanh": nn.Tanh}
    _, side, _, channels = problem.images.shape
    stack: list[nn.Module] = []
    permutes: list[tuple[int, int] | None] = []  # of each layer with weights: (side, channels) of the map it flattens
    flattened = None
    for kind, *arguments in CHAINS[problem.model]:
        if kind == "conv":
            features, size, padding, activation = arguments
            stack.append(nn.Conv2d(channels, features, size, padding=size // 2 if padding == "same" else 0))
            side, channels = side if padding == "same" else side - size + 1, features
            permutes.append(None)
        elif kind == "dense":
            features, activation = arguments
            stack.append(nn.Linear(channels, features))
            channels = features
            permutes.append(flattened)
            flattened = None
        else:
            activation = None
            if kind == "flatten":
                flattened, channels = (side, channels), side * side * channels
            elif kind != "dropout":
                side //= arguments[0]
            plain = {"max_pool": nn.MaxPool2d, "avg_pool": nn.AvgPool2d, "dropout": nn.Dropout, "flatten": nn.Flatten}
            stack.append(plain[kind](*arguments))
        if activation:
            stack.append(activations[activation]())
    model = nn.Sequential(*stack)
    weights = []
    for i, value in enumerate(problem.weights):
        permute = permutes[i // 2]
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            if permute:  # rows come in the order H, W, C and torch flattens C, H, W
                side, channels = permute
                value = value.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(value.shape)
            value = value.T
        weights.append(np.ascontiguousarray(value))
    _check_shapes("torch", [tuple(p.shape) for p in model.parameters()], weights)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


LOADERS: dict[str, Callable[[Problem], Peer]] = {"keras": load_keras, "torch": load_torch}


def _check_shapes(library: str, theirs: list[tuple[int, ...]], weights: list[np.ndarray]) -> None:
    ours = [w.shape for w in weights]
    if theirs != ours:
        raise RuntimeError(f"the {library} network is another one: its parameters are {theirs}, ours are {ours}")


def _check_logits(library: str, theirs: np.ndarray, problem: Problem, source: str | None = None) -> None:
    ours = problem.logits
    if source is not None:  # a published network: ours as that library has it
        ours = published.our_logits(problem, source)
        theirs = theirs[: len(ours)]
    error = float(np.max(np.abs(theirs - ours)) / np.max(np.abs(ours)))
    limit = 1e-4 if jax.default_backend() == "cpu" and not problem.bfloat16 else 5e-2
    if not error <= limit:
        raise RuntimeError(
            f"the {library} network is another one: its logits are off by {error:.1e} with our weights, "
            f"more than {limit:.0e}"
        )

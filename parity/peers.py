"""The same networks in Keras 3 and in torch, for `python -m benchmarks.throughput --vs`.

`load_keras` and `load_torch` build a network with our weights and return its forward pass and its train step, written
as users of that library write them. They raise RuntimeError if the parameter shapes or the logits differ from ours.
"""

from __future__ import annotations

import functools
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

# Networks as a chain of layers (kind, *arguments). The arguments of "conv" are features, kernel size, padding and
# activation; those of "dense" are features and activation.
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
    """A network, its weights and its batch.

    Attributes:
        model: Registry name.
        images: Float32 `[N, H, W, C]`.
        labels: Int32 `[N]`.
        bfloat16: Compute in bfloat16, with float32 parameters.
        weights: Our parameters in the order of their creation: kernels HWIO and `[in, out]`, biases.
        logits: Our logits of the first two images in evaluation mode, `[2, K]`.
        variables: All of our variables, for the published networks.
        fields: Fields of our model that differ from the defaults.
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
    """A network in another library.

    Attributes:
        version: Version of the library.
        params: Number of trainable parameters.
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
    """Checks that a library can be timed, before anything is.

    Args:
        library: "keras", "torch" or "torch_compile".
        model: Registry name.

    Raises:
        ValueError: There is no such network in the library.
        ImportError: The library is not installed.
    """
    package = library.partition("_")[0]
    if model not in CHAINS and not published.has(package, model):
        names = [*CHAINS, *filter(lambda name: published.has(package, name), fv.list_models())]
        raise ValueError(f"--model with --vs {library} must be one of {', '.join(sorted(names))}; got {model!r}")
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{package} is not installed, and --vs {library} needs it; run pip install -e ".[reference]"')


def load_keras(problem: Problem) -> Peer:
    """Builds the network in Keras 3 on the JAX backend, channels last.

    The train step is `train_on_batch` after `compile(optimizer, loss, jit_compile=True)`, and the forward pass is
    `predict_on_batch`. Both are compiled, and both wait for their result.

    Args:
        problem: The network, its weights and its batch.

    Returns:
        The `Peer`.

    Raises:
        RuntimeError: Keras runs on another backend, or its network differs from ours.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras backend must be jax; got {keras.backend.backend()}")
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
    _check_logits("keras", np.asarray(model(images[:2], training=False), np.float32), problem, source)
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
            types = {
                "max_pool": layers.MaxPooling2D,
                "avg_pool": layers.AveragePooling2D,
                "dropout": layers.Dropout,
                "flatten": layers.Flatten,
            }
            layer = types[kind](*arguments, **options)
        stack.append(layer)
    stack.append(layers.Activation("linear", dtype="float32"))
    model = keras.Sequential(stack)
    _check_shapes("keras", [tuple(w.shape) for w in model.trainable_weights], problem.weights)
    for variable, value in zip(model.trainable_weights, problem.weights, strict=True):
        variable.assign(value)
    return model


def load_torch(problem: Problem, *, compiled: bool = False) -> Peer:
    """Builds the network in torch, on a GPU if JAX uses one.

    The eager form is channels first, with torch's own number of threads. In bfloat16 the forward pass runs under
    autocast.

    Args:
        problem: The network, its weights and its batch.
        compiled: Use `torch.compile`, channels-last memory and the fused optimizer.

    Returns:
        The `Peer`.

    Raises:
        RuntimeError: JAX has a GPU that torch does not see, or the network differs from ours.
    """
    import torch
    from torch import nn

    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    cuda = device.type == "cuda"
    if cuda:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch has no CUDA, and JAX runs on a GPU; set JAX_PLATFORMS=cpu or install torch for CUDA"
            )
        # By default XLA uses TF32 for products and convolutions on such GPUs; torch uses it for convolutions only.
        tf32 = jax.config.jax_default_matmul_precision in (None, "default", "tensorfloat32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    if problem.model in CHAINS:
        model = _torch_chain(problem).to(device)
    else:
        stride = bool(problem.fields.get("stride_in_1x1"))
        model = published.torch_model(problem.model, problem.variables, problem.images.shape[1:], stride).to(device)
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(problem.images, -1, 1))).to(device)
    labels = torch.from_numpy(problem.labels.astype(np.int64)).to(device)
    if compiled:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
    network: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, fused=compiled or None)
    loss_of = nn.CrossEntropyLoss()

    def logits_of(module: Any, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=problem.bfloat16):
            return module(pixels).float()

    def forward(module: Any = network, pixels: torch.Tensor = images) -> torch.Tensor:
        model.eval()
        with torch.inference_mode():
            return logits_of(module, pixels)

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits_of(network, images), labels).backward()
        optimizer.step()

    published_in = None if problem.model in CHAINS else published.torch_source(problem.model)
    _check_logits("torch", forward(model, images[:2]).cpu().numpy(), problem, published_in)
    return Peer(
        version=torch.__version__,
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        forward=forward,
        train=train,
        wait=(lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None),
        peak_memory=torch.cuda.max_memory_allocated if cuda else (lambda: None),
    )


def _torch_chain(problem: Problem) -> Any:
    import torch
    from torch import nn

    activations = {"relu": nn.ReLU, "tanh": nn.Tanh}
    _, side, _, channels = problem.images.shape
    stack: list[nn.Module] = []
    permutes: list[tuple[int, int] | None] = []  # for each layer with weights, side and channels of a flattened input
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
            types = {"max_pool": nn.MaxPool2d, "avg_pool": nn.AvgPool2d, "dropout": nn.Dropout, "flatten": nn.Flatten}
            stack.append(types[kind](*arguments))
        if activation:
            stack.append(activations[activation]())
    model = nn.Sequential(*stack)
    weights = []
    for i, value in enumerate(problem.weights):
        permute = permutes[i // 2]
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            if permute:  # our rows are in the order H, W, C; torch flattens C, H, W
                side, channels = permute
                value = value.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(value.shape)
            value = value.T
        weights.append(np.ascontiguousarray(value))
    _check_shapes("torch", [tuple(p.shape) for p in model.parameters()], weights)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


LOADERS: dict[str, Callable[[Problem], Peer]] = {
    "keras": load_keras,
    "torch": load_torch,
    "torch_compile": functools.partial(load_torch, compiled=True),
}


def _check_shapes(library: str, theirs: list[tuple[int, ...]], weights: list[np.ndarray]) -> None:
    ours = [w.shape for w in weights]
    if theirs != ours:
        raise RuntimeError(f"{library}'s parameters must have the shapes {ours}; got {theirs}")


def _check_logits(library: str, theirs: np.ndarray, problem: Problem, source: str | None = None) -> None:
    ours = problem.logits
    if source is not None:  # a published network: compare with ours as that library defines it
        ours = published.our_logits(problem, source)
    error = float(np.max(np.abs(theirs - ours)) / np.max(np.abs(ours)))
    limit = 1e-4 if jax.default_backend() == "cpu" and not problem.bfloat16 else 5e-2
    if not error <= limit:
        raise RuntimeError(
            f"{library}'s logits must be within {limit:.0e} of ours with the same weights; got an error of {error:.1e}"
        )

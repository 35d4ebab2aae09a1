"""The published networks of Keras, torchvision and timm with our weights, for `python -m benchmarks.throughput --vs`.

Where Keras is compared, our model is built with the fields of Keras' network (`fv.weights.fields`), and torch's ResNets
put the stride where Keras puts it, so that all compute the same network. The differences that remain cost no
measurable time: Keras' ResNets have biases before BatchNorm, torch's MobileNetV2 and timm's Xception pad differently,
and the other libraries' networks have no dropout. Each one is checked against ours with that library's fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxvision as fv
from flaxvision.weights.slots import canonical
from parity import libraries


def has(library: str, name: str) -> bool:
    """Returns whether the network exists in "keras" or "torch", published or built here."""
    if library == "keras":
        return in_keras(name) or name in ("resnet18", "resnet34")
    return library == "torch" and torch_source(name) is not None


def in_keras(name: str) -> bool:
    """Returns whether `keras.applications` has the model."""
    return "keras" in fv.weights.sources(name)


def torch_source(name: str) -> str | None:
    """Returns the library for torch that has the model, torchvision first, or None."""
    return next((source for source in ("torchvision", "timm") if source in fv.weights.sources(name)), None)


def fields(name: str, libraries: tuple[str, ...]) -> dict[str, Any]:
    """Returns the fields of our model when it is timed beside these libraries."""
    return fv.weights.fields(name, "keras") if "keras" in libraries and in_keras(name) else {}


def our_logits(problem: Any, source: str) -> np.ndarray:
    """Returns our logits of the first two images, with the fields of a library's network."""
    fields = fv.weights.fields(problem.model, source)
    if "stride_in_1x1" in problem.fields:
        fields["stride_in_1x1"] = problem.fields["stride_in_1x1"]
    model = fv.create_model(problem.model, dtype=jnp.bfloat16 if problem.bfloat16 else None, **fields)
    return np.asarray(jax.jit(model.apply)(problem.variables, problem.images[:2]))


def keras_model(name: str, variables: Mapping[str, Any], shape: tuple[int, ...], bfloat16: bool) -> Any:
    """Builds the network in Keras with our weights, without a softmax."""
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16" if bfloat16 else "float32")
    if not in_keras(name):
        return _keras_basic_resnet(name, variables, shape)
    model = libraries.build("keras", name, (shape[0], shape[1])).model
    fields = fv.weights.fields(name, "keras")
    tensors = fv.weights.export(name, variables, source="keras", input_size=(shape[0], shape[1]), **fields)
    names = canonical(variable.path for variable in model.weights)
    for variable in model.weights:
        variable.assign(tensors[names[variable.path]])
    return model


def torch_model(name: str, variables: Mapping[str, Any], shape: tuple[int, ...], stride_in_1x1: bool) -> Any:
    """Builds the network in torchvision or timm with our weights."""
    import torch

    source = torch_source(name)
    assert source is not None
    model = libraries.build(source, name, (shape[0], shape[1])).module
    fields = fv.weights.fields(name, source)
    tensors = fv.weights.export(name, variables, source=source, input_size=(shape[0], shape[1]), **fields)
    found = model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    odd = [k for k in (*found.missing_keys, *found.unexpected_keys) if not k.endswith("num_batches_tracked")]
    if odd:
        raise RuntimeError(f"{source}'s network must have the same tensors as ours; these differ: {', '.join(odd)}")
    if stride_in_1x1:
        for block in model.modules():
            if hasattr(block, "conv3") and block.stride == 2:
                block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return model


def _keras_basic_resnet(name: str, variables: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
    """Builds ResNet-18 or -34, which Keras does not publish. The layers have the names of our modules."""
    import keras
    from keras import layers

    def conv(x, features, size, strides, place):
        x = layers.ZeroPadding2D(size // 2)(x) if size > 1 else x
        return layers.Conv2D(features, size, strides, use_bias=False, name=place)(x)

    def norm(x, place):
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=place)(x)

    x = image = keras.Input(shape)
    x = layers.ReLU()(norm(conv(x, 64, 7, 2, "stem_conv"), "stem_bn"))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))  # after a ReLU, a border of zeros is never the maximum
    for stage, blocks in enumerate({"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}[name], start=1):
        for block in range(1, blocks + 1):
            here, features, strides = f"stage{stage}_block{block}", 32 * 2**stage, 2 if stage > 1 == block else 1
            y = layers.ReLU()(norm(conv(x, features, 3, strides, f"{here}_conv1"), f"{here}_bn1"))
            y = norm(conv(y, features, 3, 1, f"{here}_conv2"), f"{here}_bn2")
            if strides > 1:
                x = norm(conv(x, features, 1, strides, f"{here}_shortcut_conv"), f"{here}_shortcut_bn")
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Dense(1000, name="head")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    leaves = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    for layer in model.layers:
        for variable in layer.variables:
            tree = variables["batch_stats" if "moving" in variable.name else "params"]
            if layer.name != "head":
                tree = tree["backbone"]
                path = layer.name.split("_", 2) if layer.name.startswith("stage") else [layer.name]
                path = ["_".join(path[:2]), path[2]] if len(path) == 3 else path
            else:
                path = ["head"]
            for key in path:
                tree = tree[key]
            variable.assign(tree[leaves.get(variable.name, variable.name)])
    return model

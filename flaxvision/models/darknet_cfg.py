"""Networks that are defined by a list of layers, as in darknet's `.cfg` files.

`flaxvision.weights.read_cfg` builds these modules from a file. Every section is a `Layer`. Layers are numbered from 0,
as darknet prints them, and their variables are named after the number: `layer12_conv/kernel`, `layer12_bn/scale`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv
from flaxvision.layers.darknet import LocallyConnected, darknet_max_pool, reorg
from flaxvision.layers.normalization import BatchNormMode, check_mode
from flaxvision.models.backbone import Dtype, as_float32, check_images
from flaxvision.models.grid_detector import GridDetector, check_canvas
from flaxvision.models.yolo_heads import RegionHead, YoloHead

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "leaky": functools.partial(nn.leaky_relu, negative_slope=0.1),
    "relu": nn.relu,
    "relu6": nn.relu6,
    "logistic": nn.sigmoid,
    "loggy": lambda x: 2 * nn.sigmoid(x) - 1,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "swish": nn.swish,
    "tanh": jnp.tanh,
    "elu": nn.elu,
    "selu": nn.selu,
    "relie": functools.partial(nn.leaky_relu, negative_slope=0.01),
    "ramp": lambda x: nn.relu(x) + 0.1 * x,
    "hardtan": nn.hard_tanh,
}
"""darknet's activations by name."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One section of a cfg file.

    Kinds without a subclass return their input, except `"avgpool"`, which is a global average pool.

    Attributes:
        kind: Name of the section, such as `"softmax"`.
    """

    kind: str


@dataclasses.dataclass(frozen=True)
class Convolution(Layer):
    """`[convolutional]`: symmetric padding, an optional BatchNorm, an activation."""

    features: int
    size: int
    strides: tuple[int, int]
    padding: int
    groups: int
    dilation: int
    batch_norm: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class Pool(Layer):
    """`[maxpool]`; `padding` is the total of both sides."""

    size: int
    stride: int
    padding: int


@dataclasses.dataclass(frozen=True)
class Route(Layer):
    """`[route]`: concatenates the channels of earlier layers, or one of `groups` equal parts of each."""

    layers: tuple[int, ...]
    groups: int
    group: int


@dataclasses.dataclass(frozen=True)
class Shortcut(Layer):
    """`[shortcut]`: adds earlier layers to the input; see `add_shortcut`."""

    layers: tuple[int, ...]
    alpha: float
    beta: float
    activation: str


@dataclasses.dataclass(frozen=True)
class Upsample(Layer):
    """`[upsample]`: repeats every pixel `stride` times in each direction and multiplies by `scale`."""

    stride: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Reorg(Layer):
    """`[reorg]`: see `layers.darknet.reorg`."""

    stride: int


@dataclasses.dataclass(frozen=True)
class Local(Layer):
    """`[local]`: a convolution with its own kernel at every position."""

    features: int
    size: int
    stride: int
    padding: int
    activation: str


@dataclasses.dataclass(frozen=True)
class Connected(Layer):
    """`[connected]`: a dense layer on all values of its input."""

    features: int
    batch_norm: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class Dropout(Layer):
    """`[dropout]`."""

    rate: float


@dataclasses.dataclass(frozen=True)
class Head(Layer):
    """`[yolo]`, `[region]` or `[detection]`: its input is an output of the network.

    `grid` is None for `[detection]` (YOLO v1) and for a `[region]` with a class tree or map (YOLO9000). The output of
    such a head is not decoded and has no loss.
    """

    grid: YoloHead | RegionHead | None


class CfgModule(nn.Module, kw_only=True):
    """Base class of `CfgNetwork` and `CfgDetector`.

    Attributes:
        layers: The sections of the file after `[net]`.
        input_size: Height and width of `[net]`.
        channels: Channels of `[net]`.
        epsilon: Number that BatchNorm adds to the variance. The original darknet uses 1e-6 on a CPU and 1e-5 on a GPU.
            The fork of A. Bochkovskiy uses 1e-5.
        momentum: Decay of BatchNorm's running statistics.
        batch_norm: As in `Backbone`.
        ghost_size: As in `Backbone`.
        dtype: Dtype of the computation; None promotes the inputs and parameters.
        param_dtype: Dtype of the parameters.
        axis_name: As in `Backbone`.
    """

    layers: tuple[Layer, ...]
    input_size: tuple[int, int]
    channels: int
    epsilon: float = 1e-6
    momentum: float = 0.99
    batch_norm: BatchNormMode = "sync"
    ghost_size: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_mode(self.batch_norm, self.ghost_size, "batch_norm")

    @nn.nowrap
    def run(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """Returns the outputs of all layers. A compact method must call it, which then owns the submodules."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            mode=self.batch_norm,
            ghost_size=self.ghost_size,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **dtypes,
        )
        outputs: list[jax.Array] = []
        for number, layer in enumerate(self.layers):
            name = f"layer{number}"
            match layer:
                case Convolution():
                    x = Conv(
                        layer.features,
                        (layer.size, layer.size),
                        strides=layer.strides,
                        padding=layer.padding * layer.dilation,
                        kernel_dilation=layer.dilation,
                        feature_group_count=layer.groups,
                        use_bias=not layer.batch_norm,
                        kernel_init=nn.initializers.he_normal(),
                        name=f"{name}_conv",
                        **dtypes,
                    )(x)
                    x = norm(name=f"{name}_bn")(x) if layer.batch_norm else x
                case Connected():
                    # With a kernel [H, W, C, features], converted weights do not depend on the order of a flattened
                    # map.
                    x = nn.DenseGeneral(
                        layer.features,
                        axis=tuple(range(1, x.ndim)),
                        use_bias=not layer.batch_norm,
                        kernel_init=nn.initializers.he_normal(),
                        name=f"{name}_connected",
                        **dtypes,
                    )(x)
                    x = norm(name=f"{name}_bn")(x) if layer.batch_norm else x
                case Local():
                    x = LocallyConnected(
                        layer.features, layer.size, layer.stride, layer.padding, name=f"{name}_local", **dtypes
                    )(x)
                case Pool():
                    x = darknet_max_pool(x, layer.size, layer.stride, layer.padding)
                case Route():
                    parts = [outputs[i] for i in layer.layers]
                    if layer.groups > 1:
                        parts = [jnp.split(part, layer.groups, axis=-1)[layer.group] for part in parts]
                    x = jnp.concatenate(parts, axis=-1)
                case Shortcut():
                    x = add_shortcut(x, [outputs[i] for i in layer.layers], layer.alpha, layer.beta)
                case Upsample():
                    x = layer.scale * jnp.repeat(jnp.repeat(x, layer.stride, axis=1), layer.stride, axis=2)
                case Reorg():
                    x = reorg(x, layer.stride)
                case Dropout():
                    x = nn.Dropout(layer.rate, deterministic=not train)(x)
                case Layer(kind="avgpool"):
                    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2), keepdims=True).astype(x.dtype)
            x = ACTIVATIONS[getattr(layer, "activation", "linear")](x)
            outputs.append(x)
        return outputs


class CfgNetwork(CfgModule):
    """A network without heads, such as a classifier. The fields are those of `CfgModule`."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images to the output of the last layer, float32 or wider.

        Args:
            images: Images `[N, H, W, C]`, RGB in [0, 1].
            train: Whether dropout is active, and BatchNorm uses and updates the statistics of the batch.

        Returns:
            Logits `[N, K]`, before the softmax, or a feature map `[N, H', W', C']`.

        Raises:
            ValueError: `images` is not of rank 4.
        """
        check_images(images)
        y = as_float32(self.run(images, train)[-1])
        return y.reshape(y.shape[0], -1) if y.ndim == 2 or y.shape[1:3] == (1, 1) else y


class CfgDetector(CfgModule, GridDetector):
    """A detector: a network with heads, with the interface of `Detector`. The fields are those of `CfgModule`."""

    @property
    def outputs(self) -> dict[str, Head]:
        """All heads, including those of YOLO v1, by the names of their raw outputs: `layer82_yolo`, ..."""
        return {f"layer{i}_{layer.kind}": layer for i, layer in enumerate(self.layers) if isinstance(layer, Head)}

    @property
    def heads(self) -> dict[str, YoloHead | RegionHead]:
        """The heads of YOLOv2 and YOLOv3, by the names of their raw outputs."""
        grids = {name: head.grid for name, head in self.outputs.items() if head.grid is not None}
        if len(grids) < len(self.outputs):
            raise ValueError(
                f"layers must have [region] or [yolo] heads to be decoded or trained; got {', '.join(self.outputs)}"
            )
        return grids

    def with_classes(self, num_classes: int, anchors: tuple[tuple[float, float], ...] | None = None) -> CfgDetector:
        """Returns the network for another number of classes.

        The convolution before each head gets another number of features, and the head other classes and anchors.

        Args:
            num_classes: Number of classes.
            anchors: Width and height in pixels of the anchors, which all heads share; as many as before. None keeps
                them.

        Returns:
            A copy. Its other layers have the same variables.

        Raises:
            ValueError: The layer before a head is not a convolution, `num_classes` is not positive, or the number of
                anchors differs from that of the network.
        """
        layers, heads = list(self.layers), self.heads
        for name, grid in heads.items():
            number = int(name.removeprefix("layer").partition("_")[0])
            before = layers[number - 1]
            if not isinstance(before, Convolution):
                raise ValueError(f"layer before {name} must be a convolution; got {before.kind}")
            per_cell = before.features // (5 + grid.num_classes)
            changes: dict[str, Any] = {"num_classes": num_classes}
            if anchors is not None:
                if len(anchors) != len(grid.anchors):
                    raise ValueError(f"anchors must be {len(grid.anchors)} widths and heights; got {len(anchors)}")
                unit = grid.stride if isinstance(grid, RegionHead) else 1
                changes["anchors"] = tuple((width / unit, height / unit) for width, height in anchors)
            layers[number - 1] = dataclasses.replace(before, features=per_cell * (5 + num_classes))
            layers[number] = dataclasses.replace(layers[number], grid=dataclasses.replace(grid, **changes))
        return self.clone(layers=tuple(layers))

    @nn.compact
    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw outputs, which are the inputs of the heads.

        Args:
            images: Images `[N, H, W, C]`, RGB in [0, 1]. H and W must be multiples of the coarsest stride.
            sizes: Valid height and width of each image, `[N, 2]`; they do not change the result.
            train: Whether dropout is active, and BatchNorm uses and updates the statistics of the batch.

        Returns:
            Arrays `[N, h, w, A * (5 + K)]` by name, float32 or wider; for YOLO v1 `[N, F]`.

        Raises:
            ValueError: `images` is not of rank 4, H or W is not a multiple of the coarsest stride, or `sizes` has
                another shape.
        """
        strides = [head.grid.stride for head in self.outputs.values() if head.grid is not None]
        check_canvas(images, sizes, max(strides, default=1))
        outputs = self.run(images, train)
        numbers = [i for i, layer in enumerate(self.layers) if isinstance(layer, Head)]
        return {name: as_float32(outputs[i]) for name, i in zip(self.outputs, numbers, strict=True)}


def add_shortcut(x: jax.Array, others: list[jax.Array], alpha: float = 1.0, beta: float = 1.0) -> jax.Array:
    """Adds feature maps of other depths or sizes as darknet's `[shortcut]` does.

    Where both maps have a channel and a pixel, the result is `alpha * x + beta * other`. Elsewhere it is `x`. If one
    map is k times as large as the other, only every k-th of its rows and columns is used.

    Args:
        x: `[N, H, W, C]`.
        others: Maps `[N, H', W', C']`.
        alpha: Factor of `x`.
        beta: Factor of each of the others.

    Returns:
        `[N, H, W, C]`.
    """
    for other in others:
        depth = min(x.shape[-1], other.shape[-1])
        step, sample = max(other.shape[1] // x.shape[1], 1), max(x.shape[1] // other.shape[1], 1)
        added = beta * other[:, ::step, ::step, :depth]
        if sample == 1 and depth == x.shape[-1]:
            x = alpha * x + added
        else:
            x = x.at[:, ::sample, ::sample, :depth].multiply(alpha).at[:, ::sample, ::sample, :depth].add(added)
    return x

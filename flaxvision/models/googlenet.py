"""GoogLeNet, as printed and as torchvision has it.

C. Szegedy et al., "Going Deeper with Convolutions", 2014, table 1 and figure 3. `googlenet` follows the paper: biases,
5x5 branches, two local response normalizations, "SAME" padding (figure 3 marks it S), pools of 3x3, two auxiliary
classifiers behind 4a and 4d. What the paper does not print is taken from its Caffe replication (BVLC GoogleNet): the
normalizations' figures (Caffe's alpha of 1e-4 is divided by the size, 5), Caffe's "xavier" and biases of 0.2.

`googlenet_bn` is torchvision's `googlenet`, another network under the same name: BatchNorm in place of biases and
response normalization, 3x3 where the paper has 5x5, symmetric padding, pools that round up, the last one 2x2, auxiliary
classifiers that pool to 4x4 whatever the input, dropout 0.2.

Deviation: the last pool is global, so that any size of image will do; at 224 pixels it is the paper's 7x7. The paper's
auxiliary classifiers flatten their maps, so their size is fixed by the image that `init` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import (
    BatchNorm,
    Conv,
    ConvNorm,
    adaptive_avg_pool,
    avg_pool,
    global_avg_pool,
    local_response_norm,
    max_pool,
)
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
Unit = Callable[..., Any]

# Table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
_ENDS = {"inception3b": "stage2", "inception4e": "stage3", "inception5b": "stage4"}
_AUX = {"1": "inception4a", "2": "inception4d"}


def conv_chain(unit: Unit, x: jax.Array, name: str, *layers: tuple) -> jax.Array:
    """Applies convolutions one after the other, within the compact method that calls this.

    Args:
        unit: Makes one, such as `partial(ConvNorm, conv=..., norm=...)`.
        x: `[N, H, W, C]`.
        name: The submodules are `name_1`, `name_2`, ...; a single one is `name`.
        *layers: `(features, kernel_size, strides, padding)` each, the last two optional: 1 and half the kernel on
            every side. A kernel size may be a number.

    Returns:
        `[N, H', W', features]` of the last.
    """
    for i, (features, size, *rest) in enumerate(layers, start=1):
        window = (size, size) if isinstance(size, int) else size
        strides, padding = (*rest, *(1, [(k // 2, k // 2) for k in window])[len(rest) :])
        x = unit(features, window, strides, padding, name=f"{name}_{i}" if len(layers) > 1 else name)(x)
    return x


def max_pool_ceil(x: jax.Array, window: int) -> jax.Array:
    """Max-pool at stride 2 whose last window may hang over, Caffe's rule and torch's `ceil_mode`.

    Args:
        x: `[N, H, W, C]`.
        window: 2 or 3; `x` may be one smaller.

    Returns:
        `[N, ceil((H - window) / 2) + 1, ..., C]`.
    """
    return max_pool(x, window, 2, [(0, (window - n) % 2) for n in x.shape[1:3]])


class InceptionModule(nn.Module):
    """The inception module with dimension reductions (figure 2b): 1x1, 3x3, 5x5 and pooled branches side by side.

    Attributes:
        features: Widths as in table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
        unit: Makes a convolution and what follows it: `partial(ConvNorm, conv=..., norm=...)`.
        wide_kernel: Size of the "5x5" branch's kernel; 3 in torchvision.
    """

    features: tuple[int, int, int, int, int, int]
    unit: Unit
    wide_kernel: int = 5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, F]`, F the sum of the four branches."""
        f1, r3, f3, r5, f5, fp = self.features
        branches = [
            conv_chain(self.unit, x, "branch1x1", (f1, 1)),
            conv_chain(self.unit, x, "branch3x3", (r3, 1), (f3, 3)),
            conv_chain(self.unit, x, "branch5x5", (r5, 1), (f5, self.wide_kernel)),
            conv_chain(self.unit, max_pool(x, 3, 1, "SAME"), "branch_pool", (fp, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class GoogLeNetAux(nn.Module):
    """The auxiliary classifier (section 5): average pool, 1x1 convolution, dense 1024, dropout, dense.

    Attributes:
        num_classes: Outputs.
        unit: Makes the convolution.
        adaptive: Pool to 4x4 as torchvision does, not by 5x5 at stride 3 as the paper.
        dropout_rate: After the hidden dense layer.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        kernel_init: Initializer of the dense layers.
        bias_init: Initializer of the hidden layer's bias.
    """

    num_classes: int
    unit: Unit
    adaptive: bool = False
    dropout_rate: float = 0.7
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_uniform()
    bias_init: Callable[..., jax.Array] = nn.initializers.constant(0.2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least.

        Raises:
            ValueError: The maps are smaller than the paper's 5x5 window.
        """
        if not self.adaptive and min(x.shape[1:3]) < 5:
            raise ValueError(f"the auxiliary classifiers want maps of at least 5x5 (images of 65x65); got {x.shape}")
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        x = adaptive_avg_pool(x, 4) if self.adaptive else avg_pool(x, 5, 3)
        x = conv_chain(self.unit, x, "conv", (128, 1))
        x = nn.relu(dense(1024, bias_init=self.bias_init, name="dense")(x.reshape((x.shape[0], -1))))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = dense(self.num_classes, name="head")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class GoogLeNetBackbone(Backbone):
    """GoogLeNet without its head: `stem` (64 maps) after the first convolution, `stage1` (192), ... `stage4` (1024).

    Attributes:
        batch_norm: torchvision's layers: BatchNorm for biases and response normalization, symmetric padding, pools that
            round up, the last one 2x2.
        wide_kernel: Size of the "5x5" branches' kernels: 5 in the paper, 3 in torchvision.
        epsilon: Of BatchNorm.
        momentum: Of BatchNorm's running statistics.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Axis over which BatchNorm averages, under `pmap`.
        taps: Inner modules whose outputs are wanted as well, such as `"inception4a"`.
    """

    batch_norm: bool = False
    wide_kernel: int = 5
    epsilon: float = 1e-3
    momentum: float = 0.9
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None
    taps: tuple[str, ...] = ()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each map."""
        strides = {"stem": 2, "stage1": 4}
        for name in MODULES:
            stride = 2 ** int(name[-2])
            strides |= {name: stride} if name in self.taps else {}
            strides |= {_ENDS[name]: stride} if name in _ENDS else {}
        return strides

    @nn.nowrap
    def unit(self, train: bool) -> Unit:
        """Makes convolutions by this network's policy."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if not self.batch_norm:
            init = {"kernel_init": nn.initializers.lecun_uniform(), "bias_init": nn.initializers.constant(0.2)}
            no_norm: Any = lambda name: lambda x: x
            return partial(ConvNorm, conv=partial(Conv, **init, **policy), norm=no_norm)
        conv = partial(Conv, use_bias=False, kernel_init=nn.initializers.normal(0.01), **policy)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        return partial(ConvNorm, conv=conv, norm=norm)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Maps images `[N, H, W, C]` to a dict of feature maps, finest first.

        Raises:
            ValueError: `taps` names what is no module of table 1.
        """
        check_images(x)
        if unknown := set(self.taps) - set(MODULES):
            raise ValueError(f"taps must be among {', '.join(MODULES)}; got {', '.join(sorted(unknown))}")
        unit = self.unit(train)
        lrn = partial(local_response_norm, size=5, alpha=1e-4 / 5, beta=0.75, k=1.0)
        maps = {}
        if self.batch_norm:
            pools = {"conv2": 3, "inception3a": 3, "inception4a": 3, "inception5a": 2}
            x = maps["stem"] = conv_chain(unit, x, "conv1", (64, 7, 2))
            x = max_pool_ceil(x, pools["conv2"])
            x = maps["stage1"] = conv_chain(unit, x, "conv2", (64, 1), (192, 3))
        else:
            x = maps["stem"] = conv_chain(unit, x, "conv1", (64, 7, 2, "SAME"))
            x = lrn(max_pool(x, 3, 2, "SAME"))
            x = maps["stage1"] = lrn(conv_chain(unit, x, "conv2", (64, 1), (192, 3)))
            pools = {}
        for name, features in MODULES.items():
            if name.endswith("a"):
                x = max_pool_ceil(x, pools[name]) if self.batch_norm else max_pool(x, 3, 2, "SAME")
            x = maps[name] = InceptionModule(features, unit, self.wide_kernel, name=name)(x)
            if name in _ENDS:
                maps[_ENDS[name]] = x
        return {name: maps[name] for name in self.strides}


class GoogLeNet(GoogLeNetBackbone):
    """The classifier: `GoogLeNetBackbone`, global average pool, dropout, dense.

    Attributes:
        num_classes: Outputs; 0 gives the 1024 pooled features.
        dropout_rate: Before the head: 0.4 in the paper, 0.2 in torchvision.
        aux_heads: Whether to train two auxiliary classifiers, which sow their logits into `aux_logits` as `aux1`
            (behind 4a) and `aux2` (behind 4d).
        aux_dropout_rate: In the auxiliary classifiers.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.4
    aux_heads: bool = False
    aux_dropout_rate: float = 0.7

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone", **fields) -> nn.Module:
        """Builds the trunk; `fields` are those that shall differ from this module's."""
        return part_of(self, GoogLeNetBackbone, name, **fields)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least.

        Raises:
            ValueError: The image is too small for the paper's auxiliary classifiers.
        """
        aux = self.aux_heads and self.num_classes and (train or self.is_initializing())
        maps = self.make_backbone(taps=tuple(_AUX.values()) if aux else ())(x, train=train)
        normal = nn.initializers.normal(0.01)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        policy["kernel_init"] = normal if self.batch_norm else nn.initializers.lecun_uniform()
        for number, tap in _AUX.items() if aux else ():
            bias = nn.initializers.zeros if self.batch_norm else nn.initializers.constant(0.2)
            fields = {"adaptive": self.batch_norm, "dropout_rate": self.aux_dropout_rate, "bias_init": bias, **policy}
            head = GoogLeNetAux(self.num_classes, self.unit(train), name=f"aux_head{number}", **fields)
            logits = head(maps[tap], train=train)
            if not self.is_initializing():  # else they would stand among the variables, and the next be added to them
                self.sow("aux_logits", f"aux{number}", logits)
        x = global_avg_pool(maps["stage4"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = nn.Dense(self.num_classes, name="head", **policy)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_PAPER = {
    "task": "classification",
    "paper": "Szegedy et al. 2014, Going Deeper with Convolutions",
    "year": 2014,
    "input_size": (224, 224),
    "channels": 3,
}
register(GoogLeNet, "googlenet", params=6_998_552, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **_PAPER)
# torchvision's weights want the image in [-1, 1]: its `transform_input` turns the usual normalization into that one.
register(
    GoogLeNet,
    "googlenet_bn",
    defaults={"batch_norm": True, "wide_kernel": 3, "dropout_rate": 0.2},
    params=6_624_904,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    weights=("torchvision/IMAGENET1K_V1",),
    **_PAPER,
)

"""GoogLeNet, as published and as defined by torchvision.

C. Szegedy et al., "Going Deeper with Convolutions", 2014, table 1 and figure 3. `googlenet` follows the paper: biases,
5x5 branches, two local response normalizations, "SAME" padding (the S in figure 3), 3x3 pools, and two auxiliary
classifiers on the outputs of 4a and 4d. Details that the paper omits are those of its Caffe replication (BVLC
GoogleNet): the constants of the normalizations (Caffe divides alpha, 1e-4, by the size, 5), the "xavier" initialization
and biases of 0.2.

`googlenet_bn` is torchvision's `googlenet`, a different network of the same name: BatchNorm instead of biases and
response normalization, 3x3 instead of 5x5 branches, symmetric padding, pools that round up, a last pool of 2x2,
auxiliary classifiers that pool to 4x4 at every input size, and a dropout rate of 0.2.

Deviation: the last pool is global, so that images of any size are accepted; at 224 pixels it is the paper's 7x7 pool.
The paper's auxiliary classifiers flatten their maps, so their parameters fit the image size seen at `init`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import (
    Conv,
    ConvNorm,
    adaptive_avg_pool,
    avg_pool,
    conv_chain,
    global_avg_pool,
    local_response_norm,
    max_pool,
)
from flaxvision.models.backbone import Backbone, Classifier, Dtype, Initializer, as_float32
from flaxvision.registry import register

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
_STAGES = {"inception3b": "stage2", "inception4e": "stage3", "inception5b": "stage4"}
_AUX = {"1": "inception4a", "2": "inception4d"}  # the auxiliary classifiers and their inputs


class InceptionModule(nn.Module):
    """Inception module with dimension reductions (figure 2b): 1x1, 3x3, 5x5 and pooled branches in parallel.

    Attributes:
        features: Widths as in table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
        unit: Makes a convolution with its activation, for example `partial(ConvNorm, conv=..., norm=...)`.
        wide_kernel: Kernel size of the "5x5" branch; 3 in torchvision.
    """

    features: tuple[int, int, int, int, int, int]
    unit: Unit
    wide_kernel: int = 5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, F]`, F the sum of the four branches' widths."""
        f1, r3, f3, r5, f5, fp = self.features
        branches = [
            conv_chain(self.unit, x, "branch1x1", (f1, 1)),
            conv_chain(self.unit, x, "branch3x3", (r3, 1), (f3, 3)),
            conv_chain(self.unit, x, "branch5x5", (r5, 1), (f5, self.wide_kernel)),
            conv_chain(self.unit, max_pool(x, 3, 1, "SAME"), "branch_pool", (fp, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class GoogLeNetAux(nn.Module):
    """Auxiliary classifier (section 5): average pool, 1x1 convolution, dense layer of 1024, dropout, dense layer.

    Attributes:
        num_classes: Number of logits.
        unit: Makes the convolution with its activation.
        adaptive: Whether to pool to 4x4, as torchvision does, or by 5x5 windows of stride 3, as in the paper.
        dropout_rate: Rate of the dropout after the hidden dense layer.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        kernel_init: Initializer of the kernels of the dense layers.
        bias_init: Initializer of the bias of the hidden dense layer.
    """

    num_classes: int
    unit: Unit
    adaptive: bool = False
    dropout_rate: float = 0.7
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_uniform()
    bias_init: Initializer = nn.initializers.constant(0.2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `[N, H, W, C]` to logits `[N, num_classes]`, float32 or wider.

        Raises:
            ValueError: The maps are smaller than the paper's 5x5 window.
        """
        if not self.adaptive and min(x.shape[1:3]) < 5:
            raise ValueError(
                "x must be at least 5x5 for an auxiliary classifier, so images must be at least 65x65 pixels;"
                f" got {x.shape}"
            )
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        x = adaptive_avg_pool(x, 4) if self.adaptive else avg_pool(x, 5, 3)
        x = conv_chain(self.unit, x, "conv", (128, 1))
        x = nn.relu(dense(1024, bias_init=self.bias_init, name="dense")(x.reshape((x.shape[0], -1))))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return as_float32(dense(self.num_classes, name="head")(x))


class GoogLeNetBackbone(Backbone):
    """GoogLeNet without its head.

    The stages are `stem` (64 channels), the output of the first convolution; `stage1` (192), the last maps at stride 4;
    `stage2` (480), `stage3` (832) and `stage4` (1024); and `inception4a` (512) and `inception4d` (528), the inputs of
    the auxiliary classifiers. The other fields are those of `Backbone`.

    Attributes:
        norm: Whether to use torchvision's layers: BatchNorm instead of biases and response normalization,
            symmetric padding, and pools that round up, the last of them 2x2.
        wide_kernel: Kernel size of the "5x5" branches: 5 in the paper, 3 in torchvision.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    norm: bool = False
    wide_kernel: int = 5
    epsilon: float = 1e-3
    momentum: float = 0.9

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        modules = {"stage2": 8, "inception4a": 16, "inception4d": 16, "stage3": 16, "stage4": 32}
        return {"stem": 2, "stage1": 4, **modules}

    @property
    def kernel_init(self) -> Initializer:
        """Initializer of the kernels of the dense layers, and of the convolutions too."""
        return nn.initializers.normal(0.01) if self.norm else nn.initializers.lecun_uniform()

    @property
    def bias_init(self) -> Initializer:
        """Initializer of the biases of the convolutions and of the auxiliary classifiers' hidden layers."""
        return nn.initializers.zeros if self.norm else nn.initializers.constant(0.2)

    @nn.nowrap
    def make_unit(self, train: bool) -> Unit:
        """Returns a constructor of convolutions with their normalization and activation."""
        conv = partial(Conv, kernel_init=self.kernel_init, **self.dtypes)
        if self.norm:
            norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
            return partial(ConvNorm, conv=partial(conv, use_bias=False), norm=norm)
        no_norm: Any = lambda name: lambda x: x
        return partial(ConvNorm, conv=partial(conv, bias_init=self.bias_init), norm=no_norm)

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the stages and the inputs of the auxiliary classifiers."""
        unit = self.make_unit(train)
        if self.norm:
            padding, lrn = [(3, 3), (3, 3)], lambda x: x
            pool = partial(max_pool, strides=2, ceil_mode=True)
        else:
            padding, lrn = "SAME", partial(local_response_norm, size=5, alpha=1e-4 / 5, beta=0.75, k=1.0)
            pool = partial(max_pool, strides=2, padding="SAME")

        x = conv_chain(unit, x, "conv1", (64, 7, 2, padding))
        yield "stem", x
        x = lrn(conv_chain(unit, lrn(pool(x, 3)), "conv2", (64, 1), (192, 3)))
        yield "stage1", x
        for name, features in MODULES.items():
            if name.endswith("a"):
                x = pool(x, 2 if self.norm and name == "inception5a" else 3)
            x = InceptionModule(features, unit, self.wide_kernel, name=name)(x)
            if name in _AUX.values():
                yield name, x
            if name in _STAGES:
                yield _STAGES[name], x


class GoogLeNet(Classifier):
    """GoogLeNet: global average pool, dropout and linear layer on a `GoogLeNetBackbone`.

    The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer: 0.4 in the paper, 0.2 in torchvision.
        aux_heads: Whether there are two auxiliary classifiers. They run in training only and sow their logits into the
            collection `aux_logits` as `aux1` (from the output of 4a) and `aux2` (4d).
        aux_dropout_rate: Rate of the dropout in the auxiliary classifiers.
    """

    dropout_rate: float = 0.4
    aux_heads: bool = False
    aux_dropout_rate: float = 0.7

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`, float32 or wider.

        Raises:
            ValueError: The image is too small for the paper's auxiliary classifiers, or the backbone does not return
                their inputs.
        """
        backbone = self.backbone
        init = self.kernel_init or backbone.kernel_init
        if self.aux_heads and self.num_classes and (train or self.is_initializing()):
            if not set(_AUX.values()) <= set(features):
                raise ValueError(
                    f"stages must include {' and '.join(_AUX.values())} if aux_heads is set; got {', '.join(features)}"
                )
            aux = partial(
                GoogLeNetAux,
                self.num_classes,
                backbone.make_unit(train),
                adaptive=backbone.norm,
                dropout_rate=self.aux_dropout_rate,
                kernel_init=init,
                bias_init=backbone.bias_init,
                **backbone.dtypes,
            )
            for number, tap in _AUX.items():
                logits = aux(name=f"aux_head{number}")(features[tap], train=train)
                if not self.is_initializing():  # at init, the logits would become part of the variables
                    self.sow("aux_logits", f"aux{number}", logits)
        return self.linear(global_avg_pool(self.last_stage(features)), train=train, kernel_init=init)


_PAPER = {
    "task": "classification",
    "paper": "Szegedy et al. 2014, Going Deeper with Convolutions",
    "year": 2014,
    "input_size": (224, 224),
    "channels": 3,
}
register(
    GoogLeNet,
    "googlenet",
    backbone=GoogLeNetBackbone,
    params=6_998_552,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    **_PAPER,
)
# torchvision's weights expect images in [-1, 1]: `transform_input` converts the usual normalization to that range.
register(
    GoogLeNet,
    "googlenet_bn",
    backbone=GoogLeNetBackbone,
    defaults={"norm": True, "wide_kernel": 3, "dropout_rate": 0.2},
    params=6_624_904,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    **_PAPER,
)

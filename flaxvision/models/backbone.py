"""`Backbone` and `Classifier`, the interface of networks with a feature hierarchy.

Every other file of `flaxvision.models` implements a published network. A network with a feature hierarchy has two
parts: a `Backbone` maps images to a dict of stages, and a `Classifier` contains a backbone and maps its stages to
logits. The parameters of the backbone are `params["backbone"]` of the classifier.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from flaxvision.layers import BatchNorm, global_avg_pool
from flaxvision.layers.normalization import BatchNormMode, check_mode

Dtype = Any
Initializer = Callable[..., jax.Array]


class Backbone(nn.Module, kw_only=True):
    """Base class of networks that map images `[N, H, W, C]` to a dict of feature maps, the stages.

    A family adds its fields, `stage_strides` and `iter_stages`. The fields below are common to all families and are
    keyword-only.

    Attributes:
        stages: Names of the stages to return, None for all. Layers after the last of them are neither computed nor
            given parameters.
        output_stride: Largest stride of the network (atrous convolution). A stage whose stride would exceed it keeps
            its resolution, and its convolutions are dilated instead. The parameters stay the same. None leaves the
            strides as published.
        batch_norm: Whose statistics BatchNorm normalizes by in training: those of the whole batch over all devices
            (`"sync"`), of the rows on the same device (`"local"`), of groups of `ghost_size` consecutive rows
            (`"ghost"`), or the running statistics (`"frozen"`). Frozen statistics stay as they are, and frozen scales
            and biases have zero gradients, so an optimizer without weight decay on vectors, such as those of
            `train.optimizer`, leaves them as they are too. See `layers.BatchNorm`.
        ghost_size: Number of rows in a group for `"ghost"`; it must divide the rows on each device.
        frozen_stages: Number of stages, from the image on, whose parameters get no gradient. Their backward pass is not
            computed. An optimizer with weight decay must mask them, see `frozen_params`. It does not affect their
            BatchNorm statistics.
        dtype: Dtype of the computation, None for that of the inputs and parameters.
        param_dtype: Dtype of the parameters.
        axis_name: Mapped axis over which the batch is split, for BatchNorm. `pmap_step` sets it; models that are mapped
            in another way need it.

    Raises:
        ValueError: `stages` is empty or names an unknown stage, the family does not support the `output_stride`,
            `batch_norm` is unknown or does not go with `ghost_size`, or there are fewer stages than `frozen_stages`.
    """

    stages: tuple[str, ...] | None = None
    output_stride: int | None = None
    batch_norm: BatchNormMode = "sync"
    ghost_size: int | None = None
    frozen_stages: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    atrous_from: ClassVar[int | None] = None
    """Smallest `output_stride` that the family supports, None if it supports no dilation."""

    def __post_init__(self):
        super().__post_init__()
        name, known = type(self).__name__, self.stage_strides
        if isinstance(self.stages, list):  # modules are hashed
            object.__setattr__(self, "stages", tuple(self.stages))
        if self.stages is not None and (not self.stages or not set(self.stages) <= set(known)):
            raise ValueError(f"stages must be one or more of {', '.join(known)} for {name}; got {self.stages!r}")
        check_mode(self.batch_norm, self.ghost_size, "batch_norm")
        if not 0 <= self.frozen_stages <= len(known):
            raise ValueError(f"frozen_stages must be from 0 to {len(known)} for {name}; got {self.frozen_stages}")
        if self.output_stride is None:
            return
        if self.atrous_from is None:
            raise ValueError(f"output_stride must be None for {name}; got {self.output_stride!r}")
        supported = sorted({stride for stride in known.values() if stride >= self.atrous_from})
        if self.output_stride not in supported:
            raise ValueError(
                f"output_stride must be None or one of {', '.join(map(str, supported))} for {name};"
                f" got {self.output_stride!r}"
            )

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride, in pixels of the image, of every stage in the order of computation."""
        raise NotImplementedError(f"{type(self).__name__} must define stage_strides")

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the name and the feature map of every stage, in the order of `stage_strides`.

        `__call__` stops the iteration after the last stage that is wanted. Submodules are created inline, as in a
        compact method.

        Args:
            x: Images `[N, H, W, C]`.
            train: Whether BatchNorm uses and updates the statistics of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define iter_stages")

    @property
    def strides(self) -> dict[str, int]:
        """Stride, in pixels of the image, of every stage that a call returns; finest first.

        Use this order, not that of the returned dict: under `jit`, dicts come back with sorted keys.
        """
        limit = self.output_stride
        return {
            name: stride if limit is None else min(stride, limit)
            for name, stride in self.stage_strides.items()
            if self.stages is None or name in self.stages
        }

    @nn.nowrap
    def frozen_params(self, images: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, ...]:
        """Returns the paths of the parameters of the frozen stages, such as `"stem_conv/kernel"`.

        For the argument `frozen` of `train.optimizer`, with the name of the backbone in front: their gradients are
        zero, but weight decay would change them.

        Args:
            images: Images, or their shape and dtype, as for `init`.
        """
        if not self.frozen_stages:
            return ()
        # Layers after the last stage that is wanted have no parameters.
        frozen = self.clone(stages=(list(self.stage_strides)[self.frozen_stages - 1],))
        params = jax.eval_shape(frozen.init, jax.random.key(0), images)["params"]
        return tuple(flatten_dict(params, sep="/"))

    @property
    def dtypes(self) -> dict[str, Any]:
        """The fields `dtype` and `param_dtype`, as keyword arguments of a layer."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def make_norm(self, train: bool, *, epsilon: float, momentum: float) -> Callable[..., BatchNorm]:
        """Returns a constructor of `BatchNorm` that applies the fields of this backbone.

        Args:
            train: Whether to normalize by the statistics of the batch, as `batch_norm` says.
            epsilon: Added to the variance.
            momentum: Decay of the running statistics.
        """
        return functools.partial(
            BatchNorm,
            use_running_average=not train,
            mode=self.batch_norm,
            ghost_size=self.ghost_size,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=self.axis_name,
            **self.dtypes,
        )

    @nn.nowrap
    def atrous_fields(self, reached: int, strides: int) -> dict[str, Any]:
        """Returns the fields `strides`, `dilation` and `atrous` of a unit, as `output_stride` requires.

        As in torchvision and TF-slim, the unit that loses its stride still has the dilation of its predecessors, and
        those that follow have that dilation times the stride.

        Args:
            reached: Published stride of the input of the unit.
            strides: Published strides of the unit.
        """
        limit = self.output_stride
        dilation = 1 if limit is None else max(1, reached // limit)
        return {"strides": strides, "dilation": dilation, "atrous": limit is not None and reached * strides > limit}

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to a dict of feature maps `[N, H', W', C']`, one for each entry of `strides`.

        Args:
            images: Images `[N, H, W, C]`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Raises:
            ValueError: `images` is not of rank 4, or the images are too small for the network.
        """
        check_images(images)
        wanted, frozen = list(self.strides), list(self.stage_strides)[: self.frozen_stages]
        features = {}
        stages = self.iter_stages(images, train)
        for stage in self.stage_strides:
            with nn.intercept_methods(_without_gradient) if stage in frozen else contextlib.nullcontext():
                name, x = next(stages)
            if name in wanted:
                features[name] = x
            if name == wanted[-1]:
                break
        return features


class Classifier(nn.Module):
    """A backbone and a head: global average pool, dropout, linear layer.

    `__call__` applies `features`, then `head`. Both halves can be called on their own:
    `model.apply(variables, images, method="features")` and `model.apply(variables, features, method="head")`. A family
    with another head overrides `apply_head`. The head takes its dtypes from the backbone.

    Attributes:
        backbone: Maps images to a dict of stages.
        num_classes: Number of logits; 0 returns the pooled features of the last stage instead.
        dropout_rate: Rate of the dropout before the linear layer.
        kernel_init: Initializer of the kernel of the linear layer, None for the default of the family.
    """

    backbone: Backbone
    num_classes: int = 1000
    dropout_rate: float = 0.0
    kernel_init: Initializer | None = None

    def features(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the stages of the backbone."""
        return self.backbone(images, train=train)

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`, float32 or wider."""
        return self.linear(global_avg_pool(self.last_stage(features)), train=train)

    @property
    def head(self) -> Callable[..., jax.Array]:
        """The method `apply_head`.

        This is a property because, under Flax's NNX bridge, a method `head` would hide the parameters of that name.
        """
        return self.apply_head

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]`, float32 or wider."""
        return self.head(self.features(images, train=train), train=train)

    @nn.nowrap
    def last_stage(self, features: dict[str, jax.Array]) -> jax.Array:
        """Returns the coarsest of the stages that the backbone was asked for."""
        name = list(self.backbone.strides)[-1]
        if name not in features:
            raise ValueError(f"features must hold the last stage, {name!r}; got {', '.join(map(repr, features))}")
        return features[name]

    @nn.nowrap
    def linear(self, x: jax.Array, *, train: bool, kernel_init: Initializer | None = None) -> jax.Array:
        """Applies dropout and the linear layer `head` within the compact method that calls it.

        Args:
            x: Pooled features `[N, C]`.
            train: Whether to drop features.
            kernel_init: Default of the field `kernel_init`; None for `lecun_normal`.

        Returns:
            Logits `[N, num_classes]`, or `x` if `num_classes` is 0; float32 or wider.
        """
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            init = self.kernel_init or kernel_init or nn.initializers.lecun_normal()
            x = nn.Dense(self.num_classes, kernel_init=init, name="head", **self.backbone.dtypes)(x)
        return as_float32(x)


def _without_gradient(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Calls a method of a module; nothing before its result gets a gradient."""
    result = call(*args, **kwargs)
    return jax.lax.stop_gradient(result) if context.method_name == "__call__" else result


def as_float32(x: jax.Array) -> jax.Array:
    """Casts half precision to float32; wider types stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_images(images: jax.Array) -> None:
    """Checks the rank of a batch of images. Linen's convolutions would accept a single image.

    Raises:
        ValueError: `images` is not of rank 4.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape [N, H, W, C] (images[None] for one image); got {images.shape}")

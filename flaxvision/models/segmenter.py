"""`Segmenter`, the interface of networks for semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from flaxvision.layers.resize import resize_bilinear
from flaxvision.models.backbone import Backbone, as_float32


class Segmenter(nn.Module):
    """A backbone and a head that gives logits for every pixel.

    `__call__` applies `features`, then `head`. The logits have the size of the images, less `margin` on each side. Both
    methods can be called on their own: `model.apply(variables, images, method="features")` and
    `model.apply(variables, features, method="head", size=(H, W))`. A family defines `apply_head`.

    Attributes:
        backbone: Maps images to a dict of stages.
        num_classes: Number of classes K, including a background class if there is one.

    Raises:
        ValueError: `num_classes` is below 1.
    """

    backbone: Backbone
    num_classes: int = 21

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1 for {type(self).__name__}; got {self.num_classes}")

    @property
    def margin(self) -> int:
        """Pixels at each border of the images that have no logits; 0 if the logits have the size of the images."""
        return 0

    @nn.nowrap
    def input_extent(self, extent: int) -> int:
        """Returns the smallest height or width of images whose logits cover `extent` pixels."""
        return extent

    def features(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the stages of the backbone."""
        return self.backbone(images, train=train)

    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits, float32 or wider.

        Args:
            features: Result of `features`.
            size: Height and width of the logits; None for the resolution of the head.
            train: Whether BatchNorm uses and updates the statistics of the batch, and dropout drops.

        Returns:
            `[N, *size, K]`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply_head")

    @property
    def head(self) -> Callable[..., jax.Array]:
        """The method `apply_head`.

        This is a property because, under Flax's NNX bridge, a method `head` would hide the parameters of that name.
        """
        return self.apply_head

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, H, W, K]`, float32 or wider."""
        return self.head(self.features(images, train=train), size=images.shape[1:3], train=train)

    @nn.nowrap
    def stage(self, features: dict[str, jax.Array], last: int = 1) -> jax.Array:
        """Returns the `last`-th stage of the backbone, counted from the end.

        Raises:
            ValueError: The backbone returns fewer than `last` stages, or `features` lacks the stage.
        """
        names = list(self.backbone.strides)
        if len(names) < last:
            raise ValueError(f"stages must be {last} or more for {type(self).__name__}; got {', '.join(names)}")
        if names[-last] not in features:
            raise ValueError(f"features must hold the stage {names[-last]!r}; got {', '.join(map(repr, features))}")
        return features[names[-last]]


def resized(logits: jax.Array, size: Sequence[int] | None, *, align_corners: bool = False) -> jax.Array:
    """Casts logits `[N, H', W', K]` to float32 or wider, and resizes them to `[N, *size, K]` unless `size` is None."""
    logits = as_float32(logits)
    return logits if size is None else resize_bilinear(logits, size, align_corners=align_corners)

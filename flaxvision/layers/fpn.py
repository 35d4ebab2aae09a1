"""Feature pyramid network (FPN)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.layers.convolution import Conv

_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class FeaturePyramid(nn.Module):
    """Feature pyramid network: maps the stages of a backbone to feature maps with the same number of channels.

    Lin et al. 2017, "Feature pyramid networks for object detection", figure 3. A 1x1 convolution maps each stage to
    `features` channels. From coarse to fine, the coarser map is upsampled by nearest neighbor and added. A 3x3
    convolution of the sum gives the output. The level `pool` is every second pixel of the coarsest output (footnote 2).
    The definition and the initialization are torchvision's.

    Submodules: `inner_STAGE` and `layer_STAGE`, the 1x1 and the 3x3 convolution of each stage.

    Attributes:
        stages: Names of the stages, finest first.
        features: Channels of the outputs.
        pool: Whether to add the level `pool`.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    stages: tuple[str, ...]
    features: int = 256
    pool: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, stages: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps stages `[N, H, W, C]` to levels `[N, H, W, features]` of the same names, finest first.

        Args:
            stages: A feature map for each name of the field `stages`.

        Raises:
            ValueError: A stage is missing.
        """
        if not self.stages or not set(self.stages) <= set(stages):
            raise ValueError(f"stages must hold {', '.join(self.stages)}; got {', '.join(stages)}")
        conv = functools.partial(Conv, self.features, kernel_init=_init, dtype=self.dtype, param_dtype=self.param_dtype)
        levels, above = {}, None
        for name in reversed(self.stages):
            inner = conv((1, 1), name=f"inner_{name}")(stages[name])
            above = inner if above is None else inner + upsample_nearest(above, inner.shape[1:3])
            levels[name] = conv((3, 3), padding=1, name=f"layer_{name}")(above)
        levels = dict(reversed(levels.items()))
        if self.pool:
            levels["pool"] = levels[self.stages[-1]][:, ::2, ::2]
        return levels


def upsample_nearest(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Upsamples feature maps by nearest neighbor. As in torch, row i of the result is row `floor(i * H / size[0])`.

    Args:
        x: `[N, H, W, C]`.
        size: Height and width of the result.

    Returns:
        `[N, *size, C]`.
    """
    for axis, extent in enumerate(size, start=1):
        have = x.shape[axis]
        if extent % have == 0:
            # The gradient of a repeat is a sum. That of a gather is a scatter, which is slow on a CPU.
            x = jnp.repeat(x, extent // have, axis=axis)
        else:
            scale = np.float32(have) / np.float32(extent)
            index = np.minimum(np.floor(np.arange(extent, dtype=np.float32) * scale).astype(np.int32), have - 1)
            x = jnp.take(x, index, axis=axis)
    return x

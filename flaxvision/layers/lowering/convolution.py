"""`conv_general_dilated` for each platform: one form for a convolution, one for the gradient of each operand.

The three are the contractions of one trilinear map, so each is linear in either operand and transposing it gives
another of the three. All derivatives of a convolution therefore consist of these forms, and each of them is fast.
Half precision is computed in float32 on a CPU and rounded at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering import cpu
from flaxvision.layers.lowering.primitive import LinearForm, call, form_p, transpose
from flaxvision.layers.lowering.window import Window, dilated_size, dimension_numbers_of, lax_conv

Shape = tuple[int, ...]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | tuple[str, str, str] | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated` in the form that is fast on the platform it is lowered for.

    The arguments, the result and the errors are those of lax. These calls go to lax unchanged: operands that are not
    channels last (`[N, *spatial, C]`, `[*window, C / groups, F]`) or not floating point, `batch_group_count`, and a
    result of another type than the operands'.

    Args:
        lhs: Input `[N, *spatial, C]`.
        rhs: Kernel `[*window, C / feature_group_count, F]`.
        window_strides: One stride per spatial dimension.
        padding: `"SAME"`, `"VALID"` or (low, high) per spatial dimension.
        lhs_dilation: Distance between the input's elements.
        rhs_dilation: Distance between the kernel's elements.
        dimension_numbers: As in lax.
        feature_group_count: Number of groups of channels that are convolved separately.
        batch_group_count: As in lax.
        precision: As in lax; ignored on a CPU.
        preferred_element_type: As in lax.

    Returns:
        `[N, *spatial_out, F]`.
    """
    options = {
        "window_strides": tuple(window_strides),
        "padding": padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        "lhs_dilation": None if lhs_dilation is None else tuple(lhs_dilation),
        "rhs_dilation": None if rhs_dilation is None else tuple(rhs_dilation),
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": tuple(precision) if isinstance(precision, list) else precision,
        "preferred_element_type": preferred_element_type,
    }
    # Every error that lax raises is raised here.
    out = _checked(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)), **options)
    rank = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    supported = (
        rank > 0
        and numbers == dimension_numbers_of(rank)
        and batch_group_count == 1
        and lhs.dtype == rhs.dtype == out.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and all(isinstance(n, int) for n in (*lhs.shape[1:], *rhs.shape, *out.shape[1:]))
        and 0 not in (*lhs.shape, *rhs.shape, *out.shape)
    )
    if not supported:
        return lax.conv_general_dilated(lhs, rhs, **options)
    ones = (1,) * rank
    strides, dilation = tuple(window_strides), tuple(rhs_dilation or ones)
    if isinstance(padding, str):
        window = [dilated_size(k, d) for k, d in zip(rhs.shape, dilation, strict=False)]
        size = [dilated_size(n, d) for n, d in zip(lhs.shape[1:-1], lhs_dilation or ones, strict=True)]
        padding = lax.padtype_to_pads(size, window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    w = Window(strides, pads, tuple(lhs_dilation or ones), dilation, feature_group_count)
    return call(Convolution(w, options["precision"]), lhs, rhs)


@lru_cache(maxsize=4096)
def _checked(lhs: jax.ShapeDtypeStruct, rhs: jax.ShapeDtypeStruct, **options) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(partial(lax.conv_general_dilated, **options), lhs, rhs)


@dataclasses.dataclass(frozen=True)
class Convolution(LinearForm):
    """`(x [N, *spatial, C], kernel [*window, C / groups, F])` to `[N, *out, F]`."""

    w: Window
    precision: lax.PrecisionLike = None

    def plain(self, x, kernel):
        """Calls lax."""
        return lax_conv(x, kernel, self.w, self.precision)

    def cpu(self, x, kernel):
        """Chooses the fast form."""
        return cpu.convolution(x, kernel, self.w)

    def transposed(self, index, cotangent, operands):
        """Gives the gradient of the input or of the kernel."""
        x, kernel = operands
        if index == 0:
            return call(InputGradient(self.w, self.precision, x.shape), cotangent, kernel)
        return call(KernelGradient(self.w, self.precision, kernel.shape), x, cotangent)

    def batched(self, axes, size, operands):
        """Counts the batch among the images if all of them see the same kernel."""
        if axes != (0, None):
            return super().batched(axes, size, operands)
        x, kernel = operands
        y = call(self, x.reshape(-1, *x.shape[2:]), kernel)
        return y.reshape(size, x.shape[1], *y.shape[1:])


@dataclasses.dataclass(frozen=True)
class InputGradient(LinearForm):
    """`(g [N, *out, F], kernel)` to the gradient of a convolution's input, which has the given shape."""

    w: Window
    precision: lax.PrecisionLike
    shape: Shape

    def plain(self, g, kernel):
        """Transposes lax's convolution."""
        like = jax.ShapeDtypeStruct(self.shape, g.dtype)
        return transpose(lambda x: lax_conv(x, kernel, self.w, self.precision), like, g)

    def cpu(self, g, kernel):
        """Chooses the fast form."""
        return cpu.input_gradient(g, kernel, self.w, self.shape, _convolution)

    def transposed(self, index, cotangent, operands):
        """Gives the convolution of the cotangent, or the gradient of the kernel at it."""
        g, kernel = operands
        if index == 0:
            return call(Convolution(self.w, self.precision), cotangent, kernel)
        return call(KernelGradient(self.w, self.precision, kernel.shape), cotangent, g)

    def batched(self, axes, size, operands):
        """Counts the batch among the images if all of them see the same kernel."""
        if axes != (0, None):
            return super().batched(axes, size, operands)
        g, kernel = operands
        form = dataclasses.replace(self, shape=(size * self.shape[0], *self.shape[1:]))
        return call(form, g.reshape(-1, *g.shape[2:]), kernel).reshape(size, *self.shape)


@dataclasses.dataclass(frozen=True)
class KernelGradient(LinearForm):
    """`(x [N, *spatial, C], g [N, *out, F])` to the gradient of a convolution's kernel, which has the given shape."""

    w: Window
    precision: lax.PrecisionLike
    shape: Shape

    def plain(self, x, g):
        """Transposes lax's convolution."""
        like = jax.ShapeDtypeStruct(self.shape, g.dtype)
        return transpose(lambda kernel: lax_conv(x, kernel, self.w, self.precision), like, g)

    def cpu(self, x, g):
        """Chooses the fast form."""
        return cpu.kernel_gradient(x, g, self.w, self.shape, _convolution)

    def transposed(self, index, cotangent, operands):
        """Gives the gradient of the input by the cotangent, or the convolution with it."""
        x, g = operands
        if index == 0:
            return call(InputGradient(self.w, self.precision, x.shape), g, cotangent)
        return call(Convolution(self.w, self.precision), x, cotangent)


def convolutions_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint` that saves the results of convolutions.

    JAX's own policies, such as `dots_saveable`, know only the convolutions of lax. Combine this one with them::

        policy = jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_saveable, fv.layers.convolutions_saveable
        )
    """
    return primitive is form_p and isinstance(params["form"], Convolution | InputGradient | KernelGradient)


def _convolution(x: jax.Array, kernel: jax.Array, w: Window) -> jax.Array:
    return call(Convolution(w), x, kernel)

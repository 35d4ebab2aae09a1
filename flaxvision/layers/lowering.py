"""Channels-last arithmetic in a form chosen by the platform that a program is lowered for.

On cuda and tpu everything is plain `jax.lax.conv_general_dilated`; `flaxvision.layers.cpu` has the forms for the CPU.

Parameters and results are the same, gradients included, to rounding. `jax.lax.platform_dependent` chooses at lowering,
so one trace serves every platform. `grad` of any order, forward over reverse (Hessian-vector products), `vmap`, `scan`
and `remat` work. `jax.jvp` straight through a convolution does not, since a `custom_vjp` has no forward mode; `Conv`
has one with `conv_general_dilated=None`, which is Linen's own. Half precision is computed in float32 on the CPU and
rounded at the end.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers import cpu
from flaxvision.layers.cpu import Window, dimension_numbers_of, fast, plain, reach_of, replicated_as, trainable


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
    """`jax.lax.conv_general_dilated` in the form that is fast on the platform it is lowered for.

    Same arguments, results and errors. What is not channels last (`[N, *spatial, C]`, `[*window, C / groups, F]`), not
    floating point, or asks for `batch_group_count` or a result of another type than the inputs' goes to lax unchanged.

    Args:
        lhs: the input, `[N, *spatial, C]`.
        rhs: the kernel, `[*window, C / feature_group_count, F]`.
        window_strides: one stride per spatial dimension.
        padding: "SAME", "VALID" or (low, high) per spatial dimension.
        lhs_dilation: zeros put between the input's elements, plus one.
        rhs_dilation: zeros put between the kernel's elements, plus one.
        dimension_numbers: as in lax.
        feature_group_count: groups of channels that do not see each other.
        batch_group_count: as in lax.
        precision: as in lax; it changes nothing on a CPU.
        preferred_element_type: as in lax.

    Returns:
        `[N, *spatial_out, F]`.
    """
    how = {
        "window_strides": tuple(window_strides),
        "padding": padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        "lhs_dilation": None if lhs_dilation is None else tuple(lhs_dilation),
        "rhs_dilation": None if rhs_dilation is None else tuple(rhs_dilation),
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    if not all(isinstance(n, int) for n in (*lhs.shape, *rhs.shape)):  # a symbolic batch, for `jax.export`
        return lax.conv_general_dilated(lhs, rhs, **how)
    # Every error that lax raises is raised here.
    out = _checked(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)), **how)
    rank = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    ours = (
        rank > 0
        and numbers == dimension_numbers_of(rank)
        and batch_group_count == 1
        and lhs.dtype == rhs.dtype == out.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and math.prod(out.shape) * lhs.size * rhs.size > 0
    )
    if not ours:
        return lax.conv_general_dilated(lhs, rhs, **how)
    ones = (1,) * rank
    strides, dilated = tuple(window_strides), tuple(rhs_dilation or ones)
    if isinstance(padding, str):
        window = [reach_of(k, d) for k, d in zip(rhs.shape, dilated, strict=False)]
        size = [reach_of(n, d) for n, d in zip(lhs.shape[1:-1], lhs_dilation or ones, strict=True)]
        padding = lax.padtype_to_pads(size, window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    w = Window(strides, pads, tuple(lhs_dilation or ones), dilated, feature_group_count)
    return _convolution(lhs, rhs, w, precision)


@lru_cache(maxsize=4096)
def _checked(lhs: jax.ShapeDtypeStruct, rhs: jax.ShapeDtypeStruct, **how) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(partial(lax.conv_general_dilated, **how), lhs, rhs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_platform(x, kernel, w: Window, precision):
    """The platform decides here, once forward and once backward.

    Differentiated through, `platform_dependent` would hand the platform on as a number known at run time only, and XLA
    leaves convolutions in such branches in their slowest form: hence a rule of our own.
    """
    return _chosen(x, kernel, w, precision)


def _chosen(x, kernel, w: Window, precision):
    quick, default = partial(_forward, fast, w, None), partial(_forward, plain, w, precision)
    return lax.platform_dependent(x, kernel, cpu=quick, default=default)


def _by_platform_fwd(x, kernel, w: Window, precision):
    return _chosen(x, kernel, w, precision), (x, kernel)  # not the rule itself: forward over reverse comes through here


def _by_platform_bwd(w: Window, precision, operands, gradient):
    quick, default = partial(_backward, trainable, w, None), partial(_backward, plain, w, precision)
    return lax.platform_dependent(*operands, gradient, cpu=quick, default=default)


_by_platform.defvjp(_by_platform_fwd, _by_platform_bwd)


# What is jitted in this file is so in order that layers of equal shape are traced once, and that calls outside of jit
# are compiled once.
_convolution = jax.jit(_by_platform, static_argnums=(2, 3))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(form, w: Window, precision, x, kernel):
    return form(x, kernel, w, precision)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(form, w: Window, precision, x, kernel, gradient):
    return jax.vjp(lambda x, kernel: form(x, kernel, w, precision), x, kernel)[1](gradient)


# As above, what the rules call are not the ruled functions themselves.
def _summed(x):
    if not all(isinstance(n, int) for n in x.shape) or x.size == 0:  # a symbolic batch, or an empty one
        return x.sum(range(x.ndim - 1))
    return lax.platform_dependent(x, cpu=cpu.channel_sum, default=lambda x: x.sum(range(x.ndim - 1)))


@jax.jit
@jax.custom_vjp
def channel_sum(x: jax.Array) -> jax.Array:
    """The sum over all but the last axis: `[..., C]` to `[C]`."""
    return _summed(x)


def _channel_sum_fwd(x):
    return _summed(x), x


def _channel_sum_bwd(x, gradient):
    return (jnp.broadcast_to(gradient, x.shape),)


channel_sum.__wrapped__.defvjp(_channel_sum_fwd, _channel_sum_bwd)


def normalized(x: jax.Array, mean: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
    """`(x - mean) * factor + shift`: `[..., C]` with `[C]`."""
    mean, factor, shift = (jnp.expand_dims(value, range(x.ndim - 1)) for value in (mean, factor, shift))
    return (x - mean) * factor + shift


normalize = jax.jit(jax.custom_vjp(normalized))
"""`normalized`, whose gradients are two sums over `x`."""


def _normalize_fwd(x, mean, factor, shift):
    return normalized(x, mean, factor, shift), (x, mean, factor, shift)


def _normalize_bwd(operands, gradient):
    x, mean, factor, _ = operands
    leading = range(x.ndim - 1)
    total = _summed(gradient)
    of_factor = _summed(gradient * (x - jnp.expand_dims(mean, leading)))
    parts = gradient * jnp.expand_dims(factor, leading), -factor * total, of_factor, total
    return tuple(replicated_as(operand, part) for part, operand in zip(parts, operands, strict=True))


normalize.__wrapped__.defvjp(_normalize_fwd, _normalize_bwd)

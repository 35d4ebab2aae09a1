"""Functions with a separate CPU implementation and derivatives of any order.

A `Form` is a function of arrays that is written twice: `plain`, in ordinary `jax.lax`, and `cpu`, in operations that
are faster on a CPU. `call(form, *operands)` binds it to one JAX primitive. The implementation for the platform is
chosen when a program is lowered, so one trace serves every platform. On cuda and tpu the program is that of plain lax.

Derivatives are forms too. `jvp` of a form gives `Jvp(form)`, transposing that gives `Vjp(form)`, transposing that gives
`Jvp(form)` again, and `vmap` gives `Vmapped(form)`. A `LinearForm` needs no `Jvp`: it is linear in each operand, so its
tangents are computed by calling the form itself. The set is closed, so forward mode, reverse mode and any combination
of them exist to any order. At lowering, each transformation is applied to the implementation for the platform.

This is the only file that imports JAX's semi-private modules (`jax.interpreters`, `jax.extend`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

Axes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """A function of arrays with an implementation for each platform.

    Subclasses are frozen dataclasses with hashable fields. Equal forms are the same function.
    """

    def plain(self, *operands: jax.Array) -> Any:
        """Computes the result, an array or a tuple of arrays, in plain lax."""
        raise NotImplementedError(f"{type(self).__name__} must define plain")

    def cpu(self, *operands: jax.Array) -> Any:
        """Computes the same on a CPU."""
        return self.plain(*operands)

    def tangents(self, primals: list[jax.Array], tangents: list[Any], moving: tuple[int, ...]) -> Any:
        """Returns the directional derivative; `tangents` holds an array at each index of `moving`."""
        return call(Jvp(self, len(primals), moving), *primals, *(tangents[i] for i in moving))

    def transpose(self, cotangents: list[jax.Array], operands: list[Any], linear: tuple[int, ...]) -> list[jax.Array]:
        """Returns the cotangents of the operands at `linear`. These entries of `operands` are shapes, not arrays."""
        raise TypeError(f"form must be linear in its operands {linear} to be transposed; got {self}")

    def batched(self, axes: Axes, size: int, operands: list[jax.Array]) -> Any:
        """Maps the form over the leading axis of the operands where `axes` is 0. All results get a leading axis too."""
        del size
        return call(Vmapped(self, axes), *operands)


@dataclasses.dataclass(frozen=True)
class LinearForm(Form):
    """A form with one result that is linear in each operand while the others stay fixed."""

    def tangents(self, primals, tangents, moving):
        """Returns the sum of the calls in which one operand is replaced by its tangent."""
        return _linear_tangents(self, primals, tangents, moving)

    def transpose(self, cotangents, operands, linear):
        """Transposes the form in one operand; the other operands are arrays."""
        (index,), (cotangent,) = linear, cotangents
        return [self.transposed(index, cotangent, operands)]

    def transposed(self, index: int, cotangent: jax.Array, operands: list[Any]) -> jax.Array:
        """Returns the cotangent of the operand at `index`; `operands[index]` is its shape."""
        form = Transposed(self, index, _struct(operands[index]))
        return call(form, *(cotangent if i == index else x for i, x in enumerate(operands)))


def call(form: Form, *operands: jax.Array) -> Any:
    """Applies a form to arrays.

    Args:
        form: The function.
        *operands: Its arguments.

    Returns:
        What `form.plain` returns: an array, or a tuple of arrays.
    """
    # A `shard_map` that checks wants all operands to vary over the same axes. The transpose of the cast is a sum.
    union = frozenset().union(*(jax.typeof(x).mat.varying for x in operands))
    # The precision is read here, because the form is traced later, when the program is lowered.
    precision = jax.config.jax_default_matmul_precision
    results = form_p.bind(*(_varying(x, union) for x in operands), form=form, precision=precision)
    return results[0] if len(results) == 1 else tuple(results)


def zeros_varying_as(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns zeros that, inside a `shard_map`, vary over the same axes as `x`."""
    return _varying(jnp.zeros(shape, dtype), jax.typeof(x).mat.varying)


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - jax.typeof(x).mat.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


# -- transformed forms ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Jvp(Form):
    """The directional derivative of `form`; takes `count` primals, then a tangent for each index in `moving`."""

    form: Form
    count: int
    moving: tuple[int, ...]

    def plain(self, *operands):
        """Differentiates `form.plain`."""
        return self._apply(self.form.plain, operands)

    def cpu(self, *operands):
        """Differentiates `form.cpu`."""
        return self._apply(self.form.cpu, operands)

    def _apply(self, implementation, operands):
        primals, tangents = operands[: self.count], operands[self.count :]
        function, at = _of_moving(implementation, primals, self.moving)
        return jax.jvp(function, at, tangents)[1]

    def tangents(self, primals, tangents, moving):
        """Calls itself for the tangents, in which it is linear; differentiates again in the primals."""
        parts = []
        if later := tuple(i - self.count for i in moving if i >= self.count):
            form = dataclasses.replace(self, moving=tuple(self.moving[i] for i in later))
            parts.append(call(form, *primals[: self.count], *(tangents[i + self.count] for i in later)))
        if first := tuple(i for i in moving if i < self.count):
            parts.append(super().tangents(primals, tangents, first))
        return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), *parts)

    def transpose(self, cotangents, operands, linear):
        """Pulls the cotangents back to the tangents."""
        form = Vjp(self.form, self.count, tuple(self.moving[i - self.count] for i in linear))
        return _tuple(call(form, *operands[: self.count], *cotangents))

    def batched(self, axes, size, operands):
        """Maps the inner form, so the derivative stays outermost: `Jvp(Vmapped(form))`, not `Vmapped(Jvp(form))`."""
        wanted = tuple(0 if i >= self.count or i in self.moving else axis for i, axis in enumerate(axes))
        operands = [
            jnp.broadcast_to(x, (size, *x.shape)) if axis != want else x
            for x, axis, want in zip(operands, axes, wanted, strict=True)
        ]
        return call(dataclasses.replace(self, form=Vmapped(self.form, wanted[: self.count])), *operands)


@dataclasses.dataclass(frozen=True)
class Vjp(Jvp):
    """The transpose of `Jvp`: maps `count` primals and the cotangents of the results to those of `moving`."""

    def _apply(self, implementation, operands):
        primals, cotangents = operands[: self.count], operands[self.count :]
        function, at = _of_moving(implementation, primals, self.moving)
        pulled = jax.vjp(function, *at)[1](cotangents[0] if len(cotangents) == 1 else cotangents)
        return pulled if len(pulled) > 1 else pulled[0]

    def tangents(self, primals, tangents, moving):
        """Calls itself for the cotangents, in which it is linear; differentiates again in the primals."""
        parts = []
        if any(i >= self.count for i in moving):
            later = [tangents[i] if i in moving else jnp.zeros_like(x) for i, x in enumerate(primals)]
            parts.append(call(self, *primals[: self.count], *later[self.count :]))
        if first := tuple(i for i in moving if i < self.count):
            parts.append(Form.tangents(self, primals, tangents, first))
        return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), *parts)

    def transpose(self, cotangents, operands, linear):
        """Pushes the tangents of `moving` forward."""
        results = _tuple(call(Jvp(self.form, self.count, self.moving), *operands[: self.count], *cotangents))
        return [results[i - self.count] for i in linear]


@dataclasses.dataclass(frozen=True)
class Transposed(LinearForm):
    """The transpose of a linear form in the operand at `index`, of shape `like`. The cotangent takes its place."""

    form: LinearForm
    index: int
    like: jax.ShapeDtypeStruct

    def plain(self, *operands):
        """Transposes `form.plain`."""
        return self._apply(self.form.plain, operands)

    def cpu(self, *operands):
        """Transposes `form.cpu`."""
        return self._apply(self.form.cpu, operands)

    def _apply(self, implementation, operands):
        put = lambda x: implementation(*(x if i == self.index else y for i, y in enumerate(operands)))
        return transpose(put, self.like, operands[self.index])

    def transposed(self, index, cotangent, operands):
        """For the same operand, the transpose of the transpose is the form itself."""
        if index == self.index:
            return call(self.form, *(cotangent if i == index else x for i, x in enumerate(operands)))
        return super().transposed(index, cotangent, operands)


@dataclasses.dataclass(frozen=True)
class Vmapped(Form):
    """A form mapped over the leading axis of the operands where `axes` is 0."""

    form: Form
    axes: Axes

    def plain(self, *operands):
        """Maps `form.plain`."""
        return jax.vmap(self.form.plain, self.axes)(*operands)

    def cpu(self, *operands):
        """Maps `form.cpu`."""
        return jax.vmap(self.form.cpu, self.axes)(*operands)

    def tangents(self, primals, tangents, moving):
        """Calls itself if the mapped form is linear."""
        if isinstance(_unmapped(self), LinearForm):
            return _linear_tangents(self, primals, tangents, moving)
        return super().tangents(primals, tangents, moving)

    def transpose(self, cotangents, operands, linear):
        """Transposes the form for each element of the batch; the cotangent of a shared operand is their sum."""
        (index,) = linear
        rest = [x for i, x in enumerate(operands) if i != index]
        axes = [axis for i, axis in enumerate(self.axes) if i != index]
        shape, dtype = operands[index].shape, operands[index].dtype
        like = jax.ShapeDtypeStruct(shape if self.axes[index] is None else shape[1:], dtype)

        def one(cotangent, *rest):
            return self.form.transpose([cotangent], [*rest[:index], like, *rest[index:]], linear)[0]

        result = jax.vmap(one, (0, *axes))(cotangents[0], *rest)
        return [result.sum(0) if self.axes[index] is None else result]


def transpose(function: Callable[[jax.Array], jax.Array], like: Any, cotangent: jax.Array) -> jax.Array:
    """Applies the transpose of a linear function.

    Args:
        function: A linear function of one array.
        like: The shape, dtype and sharding of that array.
        cotangent: An array like the function's result.

    Returns:
        An array like `like`.
    """
    # Not `jax.linear_transpose`: it refuses scans that are linear in their constants.
    zeros = zeros_varying_as(cotangent, like.shape, like.dtype)
    zeros = zeros if like.sharding is None else jax.sharding.reshard(zeros, like.sharding)
    return jax.vjp(function, zeros)[1](cotangent)[0]


def _linear_tangents(form: Form, primals: list[jax.Array], tangents: list[Any], moving: tuple[int, ...]) -> Any:
    parts = [call(form, *(tangents[j] if j == i else x for j, x in enumerate(primals))) for i in moving]
    return sum(parts[1:], parts[0])


def _of_moving(implementation, primals, moving):
    def function(*values):
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return implementation(*operands)

    return function, tuple(primals[i] for i in moving)


def _unmapped(form: Form) -> Form:
    return _unmapped(form.form) if isinstance(form, Vmapped) else form


def _tuple(results: Any) -> tuple[jax.Array, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


# -- the primitive ----------------------------------------------------------------------------------------------------


form_p = Primitive("flaxvision_form")
form_p.multiple_results = True


@lru_cache(maxsize=4096)
def _results(form: Form, operands: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    # Without the mesh of the program that is traced first: the result is remembered for all.
    return tuple(map(_struct, _tuple(jax.eval_shape(form.plain, *operands))))


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype, and the sharding where it is part of the type: on a mesh with explicit axes."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding if explicit else None)


def _abstract(*avals, form, precision):
    del precision
    like = avals[0]
    unsharded = lambda rank: like.sharding.update(spec=jax.sharding.PartitionSpec(*(None,) * rank))
    return [
        like.update(r.shape, r.dtype, weak_type=False, sharding=r.sharding or unsharded(len(r.shape)))
        for r in _results(form, tuple(map(_struct, avals)))
    ]


def _jvp(primals, tangents, *, form, precision):
    results = form_p.bind(*primals, form=form, precision=precision)
    moving = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    return results, list(_tuple(form.tangents(list(primals), list(tangents), moving)))


def _transpose(cotangents, *operands, form, precision):
    del precision
    linear = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [ad.Zero(x.aval) if i in linear else None for i, x in enumerate(operands)]
    found = form.transpose(
        [ad.instantiate_zeros(ct) for ct in cotangents],
        [x.aval if i in linear else x for i, x in enumerate(operands)],
        linear,
    )
    by_index = dict(zip(linear, found, strict=True))
    return [by_index.get(i) for i in range(len(operands))]


def _batch(operands, dims, *, form, precision):
    del precision
    axes = tuple(None if d is None else 0 for d in dims)
    size = next(x.shape[d] for x, d, axis in zip(operands, dims, axes, strict=True) if axis == 0)
    leading = [x if axis is None else jnp.moveaxis(x, d, 0) for x, d, axis in zip(operands, dims, axes, strict=True)]
    results = _tuple(form.batched(axes, size, leading))
    return results, [0] * len(results)


_compiled = jax.jit(form_p.bind, static_argnames=("form", "precision"))


def _impl(*operands, form, precision):
    # Op by op, for a user who debugs: also the search for a NaN, which evaluates a failed program again.
    if jax.config.jax_disable_jit or jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        with jax.default_matmul_precision(precision):
            return list(_tuple(form.plain(*operands)))
    return _compiled(*operands, form=form, precision=precision)


def _lowered(implementation):
    def results(*operands, form, precision):
        with jax.default_matmul_precision(precision):
            return list(_tuple(implementation(form, *operands)))

    return mlir.lower_fun(results, multiple_results=True)


# Jitted, so that calls of equal shape are traced and lowered once.
_cpu = jax.jit(lambda form, *operands: form.cpu(*operands), static_argnums=0)

form_p.def_impl(_impl)
form_p.def_abstract_eval(_abstract)
ad.primitive_jvps[form_p] = _jvp
ad.primitive_transposes[form_p] = _transpose
batching.primitive_batchers[form_p] = _batch
mlir.register_lowering(form_p, _lowered(lambda form, *operands: form.plain(*operands)))
mlir.register_lowering(form_p, _lowered(_cpu), platform="cpu")

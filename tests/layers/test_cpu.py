"""The CPU's gradients of convolutions under every limit of memory, on small maps."""

import jax
import pytest

from flaxvision.layers.lowering import cpu, dilated
from flaxvision.layers.lowering.convolution import Convolution
from flaxvision.layers.lowering.primitive import call
from flaxvision.layers.lowering.window import Window, lax_conv
from tests.layers.test_convolution import CASES, close, compiled, lowered, normal, same


@pytest.fixture
def check_limits(monkeypatch):
    """Compares with plain lax under limits of the CPU's forms. JAX does not see these: it would keep old programs."""

    def check(w, x, kernel, *limits):
        theirs, programs = compiled(lambda x, k: lax_conv(x, k, w), x, kernel), set()
        for values in limits:
            for name, value in values.items():
                monkeypatch.setattr(cpu, name, value)
            jax.clear_caches()
            mine = lowered(lambda x, k: call(Convolution(w), x, k), x, kernel)
            jax.tree.map(close, mine.compile()(x, kernel), theirs)
            programs.add(mine.as_text())
        assert len(programs) == len(limits)

    yield check
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "limit"),
    [("one channel", 4096), ("2d valid", 1 << 17), ("explicit", 4096), ("depthwise multiplier", 4096)],
)
def test_filter_gradient_in_pieces(name, limit, check_limits):
    """Small maps fit in one piece: a smaller limit makes the bands and batches of large ones."""
    x, kernel, stride, _, dilation, groups = CASES[name]
    x, kernel = normal(4, *x[1:]), normal(*kernel, seed=1)
    pads = [same(n, (k - 1) * dilation + 1, stride) for n, k in zip(x.shape[1:], kernel.shape[:-2], strict=False)]
    rank = x.ndim - 2
    ones = (1,) * rank
    w = Window((stride,) * rank, tuple(pads), ones, (dilation,) * rank, groups)
    check_limits(w, x, kernel, {"PATCH_BYTES": 1}, {"PATCH_BYTES": limit})  # rows, images


@pytest.mark.parametrize(
    ("window", "strides"), [((7, 5), (2, 3)), ((3, 3), (2, 2)), ((2, 2), (3, 3)), ((1, 4), (3, 2))]
)
def test_gradients_of_strided_windows(window, strides, check_limits):
    """Maps above SMALL_MAP, so that every gradient takes its own form; edges that the last window does not reach."""
    x, kernel = normal(4, 11, 14, 16), normal(*window, 16, 6, seed=1)
    w = Window(strides, ((1, 0), (0, 2)), (1, 1), (1, 1))
    check_limits(w, x, kernel, {"SMALL_MAP": 0, "PATCH_BYTES": 1}, {"PATCH_BYTES": 8 << 20})  # in pieces, whole


@pytest.mark.parametrize(
    ("window", "dilation", "padding", "far"),
    [
        ((3, 3), (4, 4), ((4, 4), (4, 4)), True),
        ((3, 3), (12, 12), ((12, 12), (12, 12)), True),  # the corners see nothing
        ((2, 3), (7, 3), ((7, 2), (1, 5)), True),
        ((3, 3), (2, 2), ((2, 2), (2, 2)), False),  # phases
        ((3, 2), (2, 3), ((1, 0), (0, 2)), False),
    ],
)
def test_dilated_kernels(window, dilation, padding, far):
    """Of both kinds: kernels that reach far beyond the map, and others, whose gradient goes by phases."""
    x, kernel = normal(2, 9, 11, 18), normal(*window, 18, 6, seed=1)
    w = Window((1, 1), padding, (1, 1), dilation)
    assert dilated.reaches_far(x.shape, kernel.shape, w) == far
    theirs = compiled(lambda x, k: lax_conv(x, k, w), x, kernel)
    jax.tree.map(close, compiled(lambda x, k: call(Convolution(w), x, k), x, kernel), theirs)

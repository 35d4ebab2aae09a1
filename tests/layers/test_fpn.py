"""The feature pyramid, beside a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.layers import FeaturePyramid, upsample_nearest


@pytest.mark.parametrize(("have", "want"), [((2, 3), (4, 6)), ((13, 5), (25, 9)), ((1, 1), (3, 2)), ((4, 4), (4, 4))])
def test_upsampling(have, want):
    x = np.arange(have[0] * have[1] * 2, dtype=np.float32).reshape(1, *have, 2)
    found = upsample_nearest(jnp.asarray(x), want)
    for i in range(want[0]):
        for j in range(want[1]):
            np.testing.assert_array_equal(found[0, i, j], x[0, i * have[0] // want[0], j * have[1] // want[1]])
    gradient = jax.grad(lambda x: upsample_nearest(x, want).sum())(jnp.asarray(x))
    assert float(gradient.sum()) == want[0] * want[1] * 2


def test_a_pyramid_by_hand():
    """With 1x1 convolutions of ones and 3x3 kernels that keep the middle, levels are sums of the stages above."""
    stages = {"fine": np.random.default_rng(0).normal(size=(1, 5, 6, 2)).astype(np.float32)}
    stages["coarse"] = np.random.default_rng(1).normal(size=(1, 3, 3, 3)).astype(np.float32)
    model = FeaturePyramid(("fine", "coarse"), features=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), stages)["params"]
    assert list(shapes) == ["inner_coarse", "inner_fine", "layer_coarse", "layer_fine"]

    def fill(path, leaf):
        name, kind = (key.key for key in path)
        if kind == "bias":
            return np.zeros(leaf.shape, np.float32)
        value = np.ones(leaf.shape, np.float32)
        if name.startswith("layer"):
            value = np.zeros(leaf.shape, np.float32)
            value[1, 1] = np.eye(4)
        return value

    levels = model.apply({"params": jax.tree_util.tree_map_with_path(fill, shapes)}, stages)
    assert {name: level.shape for name, level in levels.items()} == {
        "fine": (1, 5, 6, 4),
        "coarse": (1, 3, 3, 4),
        "pool": (1, 2, 2, 4),
    }
    coarse = stages["coarse"].sum(-1)
    rows, columns = [0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(levels["coarse"][..., 0], coarse, rtol=1e-5, atol=1e-6)
    fine = stages["fine"].sum(-1) + coarse[:, rows][:, :, columns]
    np.testing.assert_allclose(levels["fine"][..., 3], fine, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(levels["pool"], levels["coarse"][:, ::2, ::2])
    with pytest.raises(ValueError, match="stages must hold fine, coarse; got fine"):
        model.apply({"params": jax.tree_util.tree_map_with_path(fill, shapes)}, {"fine": stages["fine"]})

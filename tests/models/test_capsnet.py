import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import flaxvision as fv
from flaxvision.layers import PrimaryCapsules, RoutedCapsules, capsule_lengths, routing_by_agreement, squash
from flaxvision.layers.lowering import rows

TINY = {"conv_features": 4, "primary_features": 2, "primary_dim": 3, "capsule_dim": 5, "num_classes": 3}
TINY_DECODER = TINY | {"decoder": True, "image_shape": (17, 19, 2), "decoder_features": (6, 7)}
RNG = np.random.default_rng(0)


def images(rows=4):
    return jnp.asarray(np.random.default_rng(1).random((rows, 17, 19, 2)), jnp.float32)


def tiny(**fields):
    model = fv.create_model("capsnet", **TINY_DECODER | fields)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images())
    rng = np.random.default_rng(2)
    fill = lambda s: jnp.asarray(rng.normal(scale=max(1, np.prod(s.shape[:-1])) ** -0.3, size=s.shape), s.dtype)
    return model, jax.tree.map(fill, shapes)


def numpy_squash(s):
    out = np.zeros_like(s)
    for place in np.ndindex(s.shape[:-1]):
        n = np.sqrt((s[place] ** 2).sum())
        out[place] = n**2 / (1 + n**2) * s[place] / n
    return out


def numpy_routing(predictions, iterations):
    """Procedure 1 of the paper, one number at a time."""
    rows, above, below, _ = predictions.shape
    out = []
    for n in range(rows):
        b = np.zeros((below, above))
        for _ in range(iterations):
            c = np.exp(b) / np.exp(b).sum(1, keepdims=True)
            v = []
            for j in range(above):
                s = sum(c[i, j] * predictions[n, j, i] for i in range(below))
                v.append(numpy_squash(s[None])[0])
            for i in range(below):
                for j in range(above):
                    b[i, j] += predictions[n, j, i] @ v[j]
        out.append(v)
    return np.array(out)


def test_squash():
    s = RNG.normal(size=(3, 4, 5))
    np.testing.assert_allclose(squash(jnp.asarray(s, jnp.float32)), numpy_squash(s), rtol=1e-5)
    first = squash(jnp.asarray(np.moveaxis(s, -1, 0), jnp.float32), axis=0)
    np.testing.assert_allclose(np.moveaxis(first, 0, -1), numpy_squash(s), rtol=1e-5)
    assert squash(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(capsule_lengths(jnp.asarray(s, jnp.float32)), np.linalg.norm(s, axis=-1), rtol=1e-5)


def test_a_capsule_of_zeros_has_no_gradient():
    for f in (lambda s: squash(s).sum(), lambda s: capsule_lengths(s).sum()):
        np.testing.assert_array_equal(jax.grad(f)(jnp.zeros((2, 4))), np.zeros((2, 4)))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_against_a_loop(iterations):
    predictions = RNG.normal(size=(2, 3, 4, 5))
    want = numpy_routing(predictions, iterations)
    got = routing_by_agreement(jnp.asarray(predictions, jnp.float32), iterations)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_routing_needs_a_round():
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        routing_by_agreement(jnp.ones((1, 2, 3, 4)), 0)


@pytest.mark.slow
def test_routed_capsules_in_chunks(monkeypatch):
    """The CPU's form, a few images at a time, and its gradient through all rounds are those of the whole batch."""
    u, kernel = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((6, 7, 3), (7, 3, 4, 5)))
    weight = jnp.asarray(RNG.normal(size=(6, 4, 5)), jnp.float32)
    layer = RoutedCapsules(4, 5)

    def plain(u, kernel):
        return jnp.sum(weight * routing_by_agreement(jnp.einsum("nid,idje->njie", u, kernel), 3))

    def ours(u, kernel):
        return jnp.sum(weight * layer.apply({"params": {"kernel": kernel}}, u))

    want = jax.jit(jax.value_and_grad(plain, (0, 1)))(u, kernel)
    programs = set()
    for size in (1, 2 * 4 * 7 * 4 * 5, 1 << 20):  # one, two and all images at a time
        monkeypatch.setattr(rows, "CACHED_BYTES", size)
        jax.clear_caches()  # JAX does not see the size, and would keep the program of another one
        run = jax.jit(jax.value_and_grad(lambda u, kernel: ours(u, kernel), (0, 1)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(u, kernel), want)
        programs.add(run.lower(u, kernel).as_text())
    jax.clear_caches()
    assert len(programs) == 3
    # The shares' own dependence on the predictions is part of the gradient: finite differences see it.
    step = jnp.zeros_like(kernel).at[2, 1, 3].set(1e-2)
    plain = jax.jit(plain)
    slope = (plain(u, kernel + step) - plain(u, kernel - step)) / 2e-2
    np.testing.assert_allclose(want[1][1][2, 1, 3].sum(), slope, rtol=1e-2)


@pytest.mark.parametrize(("size", "strides"), [((7, 8), 2), ((6, 9), 3), ((5, 5), 1)])
def test_primary_capsules(size, strides):
    layer = PrimaryCapsules(2, 3, (4, 3), strides)
    x = jnp.asarray(RNG.normal(size=(2, *size, 2)), jnp.float32)
    kernel, bias = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 3, 2, 6), (6,)))

    def ours(x, kernel):
        return layer.apply({"params": {"conv": {"kernel": kernel, "bias": bias}}}, x)

    def plain(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return squash((y + bias.reshape(1, 1, 1, 6)).reshape(2, -1, 3))

    want, pull = jax.vjp(plain, x, kernel)
    got, pull_ours = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    weight = jnp.asarray(RNG.normal(size=want.shape), jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), pull_ours(weight), pull(weight))


def test_export_of_any_batch():
    layer, u = RoutedCapsules(3, 5), jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 8)), jnp.float32)
    variables = layer.init(jax.random.key(0), u)
    run = jax.jit(jax.grad(lambda u: jnp.sin(layer.apply(variables, u)).sum()))
    shape = export.symbolic_shape("n, 6, 8")
    exported = export.export(run, platforms=["cpu", "cuda"])(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(u), run(u), rtol=1e-5, atol=1e-6)
    assert layer.apply(variables, u[:0]).shape == (0, 3, 5)


def test_primary_capsules_want_a_map_as_large_as_the_window():
    with pytest.raises(ValueError, match=r"x must be at least as large as the window \(9, 9\); got \(8, 9\)"):
        PrimaryCapsules().init(jax.random.key(0), jnp.zeros((1, 8, 9, 4)))


@pytest.mark.parametrize(("decoder", "count"), [(False, 6_804_224), (True, 8_215_568)])
def test_parameters(decoder, count):
    model = fv.create_model("capsnet", decoder=decoder)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jnp.zeros((1, 28, 28, 1)))
    assert list(variables) == ["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_the_network_against_numpy():
    model, variables = tiny()
    x = images()
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def conv(x, p, strides=1):
        n = [(x.shape[i] - 9) // strides + 1 for i in (1, 2)]
        y = np.zeros((len(x), *n, p["kernel"].shape[-1]))
        for i, j in np.ndindex(*n):
            window = x[:, strides * i : strides * i + 9, strides * j : strides * j + 9]
            y[:, i, j] = np.tensordot(window, p["kernel"], 3) + p["bias"]
        return y

    y = np.maximum(conv(np.asarray(x, np.float64), p["conv1"]), 0)
    u = numpy_squash(conv(y, p["primary_caps"]["conv"], 2).reshape(4, -1, 3))
    assert u.shape[1] == 1 * 2 * 2
    v = numpy_routing(np.einsum("nid,idje->njie", u, p["digit_caps"]["kernel"]), 3)
    np.testing.assert_allclose(model.apply(variables, x, method="encode"), v, rtol=1e-3, atol=1e-5)
    logits = model.apply(variables, x)
    np.testing.assert_allclose(logits, np.linalg.norm(v, axis=-1), rtol=1e-3)
    assert logits.dtype == jnp.float32

    # The decoder: the true class's capsule where it is told, the longest otherwise.
    for label, chosen in ((None, np.linalg.norm(v, axis=-1).argmax(-1)), (jnp.asarray([2, 0, 1, 1]), [2, 0, 1, 1])):
        h = np.zeros_like(v)
        h[np.arange(4), chosen] = v[np.arange(4), chosen]
        h = h.reshape(4, -1)
        for layer in ("dense1", "dense2"):
            d = p["reconstruction"][layer]
            h = np.maximum(h @ d["kernel"] + d["bias"], 0)
        d = p["reconstruction"]["pixels"]
        want = 1 / (1 + np.exp(-(h @ d["kernel"] + d["bias"])))
        for train in (False, True):
            again, sown = model.apply(variables, x, train=train, label=label, mutable=["reconstruction"])
            np.testing.assert_allclose(again, logits, rtol=1e-6)
            (drawing,) = sown["reconstruction"]["image"]
            np.testing.assert_allclose(drawing, want.reshape(4, 17, 19, 2), rtol=1e-3, atol=1e-5)
        decoded = model.apply(variables, jnp.asarray(v, jnp.float32), label, method="decode")
        np.testing.assert_allclose(decoded, want.reshape(4, 17, 19, 2), rtol=1e-3, atol=1e-5)


def test_fields():
    x = images(2)
    features, _ = jax.eval_shape(
        lambda x: fv.create_model("capsnet", num_classes=0).init_with_output(jax.random.key(0), x),
        jnp.zeros((2, 28, 28, 1)),
    )
    assert features.shape == (2, 9216)
    assert features.dtype == jnp.float32
    _, variables = tiny(decoder=False)
    once, thrice, half = (
        jax.jit(fv.create_model("capsnet", **TINY | fields).apply)(variables, x)
        for fields in ({"routing_iterations": 1}, {}, {"dtype": jnp.bfloat16})
    )
    assert float(jnp.abs(once - thrice).max()) > 1e-4
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, thrice, rtol=0.1, atol=0.01)


def test_errors():
    model = fv.create_model("capsnet")
    with pytest.raises(ValueError, match="images must be at least 17x17 pixels; got 16x28"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 28, 1)))
    with pytest.raises(
        ValueError, match=r"x must have the image_shape \(28, 28, 1\) of the decoder; got \(32, 32, 1\)"
    ):
        fv.create_model("capsnet", decoder=True).init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    with pytest.raises(ValueError, match="num_classes must be at least 1 if decoder is set; got 0"):
        fv.create_model("capsnet", decoder=True, num_classes=0).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    with pytest.raises(ValueError, match="decoder must be True for decode; got False"):
        model.apply({"params": {}}, jnp.zeros((1, 10, 16)), method="decode")


def test_margin_loss():
    lengths = np.array([[0.95, 0.3, 0.05], [0.2, 0.6, 0.99]])
    targets = np.array([[1, 0, 0], [1, 0, 1]])
    want = [0.5 * 0.2**2, 0.7**2 + 0.5 * 0.5**2]
    np.testing.assert_allclose(fv.losses.margin(jnp.asarray(lengths), jnp.asarray(targets)), want, rtol=1e-5)
    got = fv.losses.margin(jnp.asarray(lengths), jnp.asarray(targets), present=0.5, absent=0.2, absent_weight=1.0)
    np.testing.assert_allclose(got, [0.1**2, 0.3**2 + 0.4**2], rtol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_objective(train):
    model, variables = tiny()
    x, label = images(), jnp.asarray([2, 0, 1, 1])
    batch = {"image": x.at[3].set(jnp.nan), "label": label.at[3].set(77), "mask": jnp.asarray([1.0, 1, 1, 0])}
    objective = fv.train.capsule(reconstruction_weight=0.01)

    def loss(params, batch):
        return objective(model.apply, params, {}, batch, jax.random.key(0) if train else None, train)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (sums, collections)), grads = step(variables["params"], batch)
    assert collections == {}
    told = label if train else None
    apply = jax.jit(lambda label: model.apply(variables, x, label=label, mutable=["reconstruction"]))
    lengths, sown = apply(told)
    margin = fv.losses.margin(lengths, jax.nn.one_hot(label, 3))[:3].sum()
    error = jnp.square(sown["reconstruction"]["image"][0] - x)[:3].sum()
    np.testing.assert_allclose(sums["margin"].total, margin, rtol=1e-5)
    np.testing.assert_allclose(sums["reconstruction"].total, error, rtol=1e-5)
    np.testing.assert_allclose(value, (margin + 0.01 * error) / 3, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].total, 3 * value, rtol=1e-5)
    assert sums["accuracy"].total == (lengths.argmax(-1) == label)[:3].sum()
    assert sums["loss"].weight == 3
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(g))), path
        assert float(jnp.abs(g).max()) > 0, path
    # Targets in place of classes give the same.
    soft = batch | {"label": jax.nn.one_hot(label, 3)}
    np.testing.assert_allclose(jax.jit(loss)(variables["params"], soft)[0], value, rtol=1e-5)


def test_objective_without_a_decoder():
    batch = {"image": images(), "label": jnp.asarray([2, 0, 1, 1])}
    model, variables = tiny()
    for weight, decoder in ((0.0, True), (5e-4, False)):
        model = fv.create_model("capsnet", **TINY_DECODER | {"decoder": decoder})
        objective = fv.train.capsule(reconstruction_weight=weight)
        loss, (sums, _) = objective(model.apply, variables["params"], {}, batch, jax.random.key(0), True)
        assert set(sums) == {"loss", "accuracy", "margin"}
        np.testing.assert_allclose(sums["margin"].compute(), loss, rtol=1e-6)
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        fv.train.capsule(reconstruction_weight=-1)
    with pytest.raises(ValueError, match=r"label must be integers \[N\] or targets \(4, 3\)"):
        objective(model.apply, variables["params"], {}, batch | {"label": jnp.ones((4, 2))}, None, False)

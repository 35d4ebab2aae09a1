"""U-Net beside a network in torch that is written from the paper: logits and gradients, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from parity import comparison, drawing
from tests.models.smallest import filled

pytestmark = pytest.mark.reference


@pytest.mark.parametrize(("name", "size"), [("unet", (188, 204)), ("unet_same", (75, 90))])
def test_the_same_weights_give_the_same_logits_and_gradients(name, size):
    import torch

    from parity import torch_unet

    features = (8, 16, 24, 32, 40)
    fields = {"features": features} | ({"decoder_features": features[-2::-1]} if name == "unet_same" else {})
    model = fv.create_model(name, **fields, dropout_rate=0.0)
    images = drawing.draw_images(name, (2, *size, 1))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, jnp.float32))
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), filled(shapes))
        statistics = {key: value for key, value in variables.items() if key != "params"}
        weights = None

        def loss(params, x):
            logits, _ = model.apply({"params": params, **statistics}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(logits * weights), logits

        x = jnp.asarray(images, jnp.float64)
        evaluated = jax.jit(model.apply)(variables, x)
        weights = drawing.draw_images("weights", evaluated.shape)
        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], x)

    theirs = torch_unet.UNet(1, 2, name == "unet_same", features).double()
    torch_unet.load(theirs, variables)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64))
    with torch.no_grad():
        wanted = theirs.eval()(pixels).movedim(1, -1).numpy()
    assert comparison.error(evaluated, wanted) < 1e-10
    trained = theirs.train()(pixels).movedim(1, -1)
    assert comparison.error(logits, trained.detach().numpy()) < 1e-10
    (trained * torch.from_numpy(weights.astype(np.float64))).sum().backward()
    ours = torch_unet.UNet(1, 2, name == "unet_same", features).double()
    torch_unet.load(ours, {"params": gradient, **statistics})  # the same layout for gradients
    named = dict(ours.named_parameters())
    pairs = [(named[key].detach().numpy(), value.grad.numpy()) for key, value in theirs.named_parameters()]
    assert comparison.error([a for a, _ in pairs], [b for _, b in pairs]) < 1e-10

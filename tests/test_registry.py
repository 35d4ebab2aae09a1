import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv

# Trainable parameters at the defaults, from the papers' own figures.
GOLDEN = {
    "fashion_cnn": 1_413_834,
    "lenet5": 60_000,
    "lenet5_modern": 61_706,
    "lenet_dli": 1_199_882,
    "mlp": 266_610,
    "perceptron": 3,
}


def sample_of(info, batch=1):
    shape = (*info.input_size, info.channels) if len(info.input_size) == 2 else info.input_size
    return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


def count(variables):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))


def test_the_golden_table_covers_the_registry():
    assert set(fv.list_models()) == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_parameter_counts_are_exact(name):
    info = fv.model_info(name)
    model = fv.create_model(name)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), sample_of(info))
    assert count(variables) == GOLDEN[name] == info.params


def test_mlp_counts_follow_its_widths():
    model = fv.create_model("mlp", features=(7, 5), num_classes=3)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
    )
    assert count(variables) == 16 * 7 + 7 + 7 * 5 + 5 + 5 * 3 + 3


def test_models_are_plain_modules_and_overrides_are_their_fields():
    model = fv.create_model("lenet_dli", num_classes=3, dtype=jnp.bfloat16)
    assert isinstance(model, nn.Module)
    assert model.num_classes == 3
    assert model.dtype == jnp.bfloat16


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model named 'lenet_5'.*lenet5"):
        fv.create_model("lenet_5")
    with pytest.raises(ValueError, match="fashion_cnn"):
        fv.model_info("fashioncnn")


def test_an_unknown_override_is_refused_with_the_fields():
    with pytest.raises(TypeError, match=r"lenet5 has no field 'classes'.*num_classes"):
        fv.create_model("lenet5", classes=3)
    with pytest.raises(TypeError, match="'name'"):
        fv.create_model("lenet5", name="other")


def test_list_models_filters():
    assert fv.list_models("lenet*") == ["lenet5", "lenet5_modern", "lenet_dli"]
    assert fv.list_models(task="segmentation") == []
    assert fv.list_models(task="classification") == sorted(GOLDEN)


def test_a_name_is_registered_once():
    from flaxvision.registry import register

    with pytest.raises(ValueError, match="'mlp' is registered already"):
        register(fv.models.MLP, "mlp")


def test_info_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fv.model_info("mlp").params = 1  # type: ignore[misc]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"task must be 'classification', .*; got 'clasification'"):
        fv.list_models(task="clasification")

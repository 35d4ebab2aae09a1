"""Tests of bundles: writes are atomic, reads give what was written, and damage is detected."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv

MODEL = {"name": "mlp", "features": (6, 5), "num_classes": 3, "input_size": (4,)}


@pytest.fixture
def variables():
    model = fv.create_model("mlp", features=(6, 5), num_classes=3)
    return jax.tree.map(np.asarray, model.init(jax.random.key(0), jnp.zeros((1, 4))))


def flipped(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


def saved(path, variables, **more):
    return fv.weights.save(path, variables, **MODEL, **more)


def test_a_bundle(tmp_path, variables):
    path = tmp_path / "runs" / "mlp.safetensors"
    card_path = saved(path, variables, metadata={"top1": 98.5, "labels": ["a", "b", "c"]})
    assert card_path == tmp_path / "runs" / "mlp.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["mlp.json", "mlp.safetensors"]
    found, card = fv.weights.read_bundle(path)
    chex.assert_trees_all_equal(found, variables)
    assert (card["model"], card["overrides"]) == ("mlp", {"features": (6, 5), "num_classes": 3})
    assert card["parameters"] == 4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3
    assert card["metadata"] == {"top1": 98.5, "labels": ["a", "b", "c"]}
    assert card["versions"].keys() == {"flaxvision", "jax", "flax", "numpy", "python"}
    # Other programs read it as well.
    assert fv.weights.read(path).keys() == {
        f"params/{layer}/{leaf}" for layer in ("hidden1", "hidden2", "head") for leaf in ("kernel", "bias")
    }
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    old = os.umask(0)
    os.umask(old)
    return old


def test_a_bundle_with_dtypes_and_statistics(tmp_path):
    model = fv.create_model("resnet20_cifar", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    fv.weights.save(tmp_path / "a.safetensors", variables, name="resnet20_cifar", **options)
    found, card = fv.weights.read_bundle(tmp_path / "a.safetensors")
    assert card["overrides"] == {"dtype": jnp.dtype("bfloat16"), "param_dtype": jnp.dtype("bfloat16")}
    assert hash(fv.create_model("resnet20_cifar", **card["overrides"]))
    assert found["params"]["head"]["kernel"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found, variables)


def test_a_bundle_of_other_variables(tmp_path, variables):
    path = tmp_path / "a.safetensors"
    del variables["params"]["head"]["bias"]
    with pytest.raises(ValueError, match=r"do not fit mlp: 1 missing: params/head/bias \[3\]"):
        saved(path, variables)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        saved(tmp_path / "a.npz", variables)
    variables["params"]["head"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(TypeError, match=r"metadata\.f must be a JSON value; got "):
        saved(path, variables, metadata={"f": print})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [10, 300, -1])
def test_a_damaged_bundle(tmp_path, variables, where):
    path = tmp_path / "a.safetensors"
    saved(path, variables)
    flipped(path, where)
    with pytest.raises(ValueError, match=r"a\.safetensors or its card is damaged: its sha256 is .*, not .*; copy both"):
        fv.weights.read_bundle(path)


@pytest.mark.parametrize("length", [0, 7, 100, -10])
def test_a_truncated_bundle(tmp_path, variables, length):
    path = tmp_path / "a.safetensors"
    saved(path, variables)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.safetensors or its card is damaged: its sha256 is .*, not .*; copy both"):
        fv.weights.load("mlp", path)


def test_class_names(tmp_path, variables):
    path = tmp_path / "a.safetensors"
    card_path = saved(path, variables, class_names=("cat", "dog", "tench, Tinca"))
    assert fv.weights.read_card(path)["class_names"] == ("cat", "dog", "tench, Tinca")
    assert fv.weights.class_names_for("mlp", path) == ("cat", "dog", "tench, Tinca")
    card = json.loads(card_path.read_text())
    del card["class_names"]  # as before bundles had them
    card_path.write_text(json.dumps(card))
    assert fv.weights.read_bundle(path)[1]["class_names"] is None
    for odd in ("cat", [1, 2, 3], {"a": 1}):
        card_path.write_text(json.dumps(card | {"class_names": odd}))
        with pytest.raises(ValueError, match=r"a\.json is damaged: .*class_names"):
            fv.weights.read_card(path)
    with pytest.raises(ValueError, match="class_names must have one name for each of 3 classes; got 2"):
        saved(path, variables, class_names=("cat", "dog"))
    with pytest.raises(TypeError, match="class_names must be strings; got 3"):
        saved(path, variables, class_names=("cat", "dog", 3))


def test_a_damaged_card(tmp_path, variables):
    path = tmp_path / "a.safetensors"
    card_path = saved(path, variables)
    whole = card_path.read_text()
    for text, said in (
        (whole[:50], r"a\.json is damaged"),
        ("[]", r"a\.json is damaged"),
        ("[" * 100_000, r"a\.json is damaged"),
        (whole.replace('"overrides": {', '"overrides": [], "x": {'), r"a\.json is damaged"),
        (whole.replace('"num_classes"', '"classes"'), r"a\.json describes a model .* fields of mlp .*; got 'classes'"),
        (whole.replace('"mlp"', '"mlq"'), r"a\.json describes a model .* must be a registered model .*; got 'mlq'"),
        (whole.replace('"format": 1', '"format": 2'), r"format of .*a\.json must be 1; got 2"),
        (whole.replace('"num_classes": 3', '"num_classes": 4'), r"does not fit mlp: .*must be \[5, 4\]; got \[5, 3\]"),
    ):
        card_path.write_text(text)
        with pytest.raises(ValueError, match=said):
            fv.weights.read_bundle(path)
    card_path.unlink()
    with pytest.raises(ValueError, match=r"has no card: .*a\.json is missing"):
        fv.weights.read_bundle(path)
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        fv.weights.read_bundle(tmp_path / "b.safetensors")


def test_an_interrupted_save_leaves_no_mixture(tmp_path, variables, monkeypatch):
    """Wherever a save stops, reading gives the old bundle, the new bundle or an error."""
    path = tmp_path / "a.safetensors"
    saved(path, variables, metadata={"run": 1})
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    real = os.replace
    for stop in (0, 1, 2):
        calls = []

        def replace(old, new, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(new)
            real(old, new)

        monkeypatch.setattr(os, "replace", replace)
        if stop < 2:
            with pytest.raises(KeyboardInterrupt):
                saved(path, other, metadata={"run": 2})
        else:
            saved(path, other, metadata={"run": 2})
        monkeypatch.undo()
        assert not list(tmp_path.glob(".*"))
        if stop == 1:  # the new tensors with the old card
            with pytest.raises(ValueError, match="or its card is damaged"):
                fv.weights.read_bundle(path)
            continue
        found, card = fv.weights.read_bundle(path)
        assert card["metadata"] == {"run": 2 if stop == 2 else 1}
        chex.assert_trees_all_equal(found, other if stop == 2 else variables)


def test_the_card_is_for_people(tmp_path, variables):
    card = json.loads(saved(tmp_path / "a.safetensors", variables).read_text())
    assert card["input_size"] == [4]
    assert len(card["sha256"]) == 64


def test_a_bundle_with_a_field_that_is_gone(tmp_path, variables):
    path = tmp_path / "old.safetensors"
    card_path = saved(path, variables)
    card = json.loads(card_path.read_text())
    card["overrides"]["taps"] = ["inception4a"]
    card_path.write_text(json.dumps(card))
    assert "taps" not in fv.weights.read_card(path)["overrides"]
    model, _ = fv.weights.load_model("mlp", path)
    assert model.num_classes == 3

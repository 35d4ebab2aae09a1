"""Tests of the tensor files: formats and damage."""

import os
import pickle
import struct
import sys
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import flaxvision as fv


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "layer1.0.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "fc.bias": rng.standard_normal(300),
        "n": np.asarray(3),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor)


def flipped(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


def test_safetensors(tmp_path, tensors):
    tensors["half"] = np.ones(3, ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    same(fv.weights.read(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize("keep", [0, 4, 60, -1, -2000])
def test_a_truncated_safetensors_file(tmp_path, tensors, keep):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or not a valid safetensors file"):
        fv.weights.read(path)


def test_a_safetensors_header_that_lies(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    flipped(path, 12)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        fv.weights.read(path)


def test_npz(tmp_path, tensors):
    np.savez(tmp_path / "a.npz", **tensors)
    same(fv.weights.read(tmp_path / "a.npz"), tensors)
    np.savez_compressed(tmp_path / "b.npz", **tensors)
    same(fv.weights.read(tmp_path / "b.npz"), tensors)


def test_a_damaged_npz(tmp_path, tensors):
    path = tmp_path / "a.npz"
    np.savez(path, **tensors)
    whole = path.read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.npz is damaged or not a valid npz file"):
            fv.weights.read(path)
    path.write_bytes(whole)
    flipped(path, 400)  # within the first array
    with pytest.raises(ValueError, match=r"a\.npz is damaged or not a valid npz file: BadZipFile Bad CRC"):
        fv.weights.read(path)


def test_an_npz_whose_headers_lie(tmp_path):
    """Headers that ask for too much memory, endless brackets and passwords give the same error."""
    path = tmp_path / "a.npz"
    for header in (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}",
        b"{'shape': ((((",
        b"(" * 99,
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
        with pytest.raises(ValueError, match=r"a\.npz is damaged or not a valid npz file"):
            fv.weights.read(path)
    np.savez(path, x=np.ones(3))
    data = bytearray(path.read_bytes())
    for where in (6, data.index(b"PK\x01\x02") + 8):  # the flag of an encrypted entry
        data[where] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is damaged or not a valid npz file: RuntimeError .*encrypted"):
        fv.weights.read(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["FLAXVISION_BOMB"],)


def test_an_npz_that_holds_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXVISION_BOMB", str(tmp_path / "ran"))
    np.savez(tmp_path / "a.npz", x=np.array([Bomb()], object))
    with pytest.raises(ValueError, match=r"a\.npz is damaged .*allow_pickle=False"):
        fv.weights.read(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("x.npy", pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"b\.npz is damaged"):
        fv.weights.read(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"c\.npz is damaged"):
        fv.weights.read(tmp_path / "c.npz")
    assert not (tmp_path / "ran").exists()


def keras_tensors():
    rng = np.random.default_rng(0)
    shapes = {
        "conv1/kernel": (3, 3, 3, 4),
        "conv1/bias": (4,),
        "bn/gamma": (4,),
        "bn/beta": (4,),
        "bn/moving_mean": (4,),
        "bn/moving_variance": (4,),
        "bare_bn/beta": (4,),
        "bare_bn/moving_mean": (4,),
        "bare_bn/moving_variance": (4,),
        "sep/depthwise_kernel": (3, 3, 4, 1),
        "sep/pointwise_kernel": (1, 1, 4, 5),
        "predictions/kernel": (5, 3),
        "predictions/bias": (3,),
    }
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def layers_of(tensors):
    layers = {}
    for key, tensor in tensors.items():
        layers.setdefault(key.partition("/")[0], {})[key.partition("/")[2]] = tensor
    return layers


def write_keras2(group, tensors, rename=lambda layer, leaf: f"{layer}/{leaf}:0"):
    layers = layers_of(tensors)
    group.attrs["layer_names"] = np.array([name.encode() for name in ["input_1", *layers]])
    group.create_group("input_1").attrs["weight_names"] = np.array([], "S1")
    for layer, leaves in layers.items():
        names = [rename(layer, leaf) for leaf in leaves]
        group.create_group(layer).attrs["weight_names"] = np.array([name.encode() for name in names])
        for name, tensor in zip(names, leaves.values(), strict=True):
            group[layer][name] = tensor


def test_h5_of_keras_2(tmp_path):
    tensors = keras_tensors()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_keras2(file, tensors)
    same(fv.weights.read(tmp_path / "a.h5"), tensors)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.attrs["model_config"] = "{}"
        write_keras2(file.create_group("model_weights"), tensors, lambda layer, leaf: f"{layer}/{leaf}")
    same(fv.weights.read(tmp_path / "whole.h5"), tensors)


def test_h5_with_the_oldest_names(tmp_path):
    """Names like `block1_conv1_W_1:0` in the VGG of keras.applications; ranks and order tell the variables apart."""
    tensors = keras_tensors()
    old = {"kernel": "W", "bias": "b"}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_keras2(file, tensors, lambda layer, leaf: f"{layer}_{old.get(leaf, leaf)}_1:0")
    same(fv.weights.read(tmp_path / "a.h5"), tensors)


def test_h5_of_keras_3(tmp_path):
    tensors = keras_tensors()
    classes = ("conv2d", "batch_normalization", "batch_normalization_1", "separable_conv2d", "dense")
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        for kind, (layer, leaves) in zip(classes, layers_of(tensors).items(), strict=True):
            group = file.create_group(f"layers/{kind}/vars")
            group.attrs["name"] = layer
            for i, tensor in enumerate(leaves.values()):
                group[str(i)] = tensor
        file.create_group("layers/input_layer/vars").attrs["name"] = "input"
        file.create_group("vars")
    same(fv.weights.read(tmp_path / "a.weights.h5"), tensors)


def test_a_damaged_h5(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        write_keras2(file, keras_tensors())
    whole = path.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.h5 is damaged or not a valid HDF5 file"):
            fv.weights.read(path)
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"a\.h5 is damaged .*attribute layer_names is missing"):
        fv.weights.read(path)
    with h5py.File(path, "w") as file:
        write_keras2(file, {"lstm/a": np.zeros((2, 2, 2)), "lstm/b": np.zeros(2)})
    with pytest.raises(ValueError, match=r"layer lstm must be those of a known layer; got \(3, 1\)"):
        fv.weights.read(path)


def test_h5_that_points_to_other_files(tmp_path):
    """HDF5 can refer to any file on the disk; such references are not followed."""
    (tmp_path / "secret").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.ones(3)
        file["group/a/kernel:0"] = np.ones(3)
    space = h5py.VirtualLayout((3,), "f8")
    space[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", (3,))
    for make in (
        lambda layer: layer.create_dataset("a/kernel:0", (12,), "f4", external=[(str(tmp_path / "secret"), 0, 48)]),
        lambda layer: layer.create_group("a").__setitem__("kernel:0", h5py.ExternalLink(tmp_path / "other.h5", "/x")),
        lambda layer: layer.__setitem__("a", h5py.ExternalLink(tmp_path / "other.h5", "/group/a")),
        lambda layer: layer.create_virtual_dataset("a/kernel:0", space),
    ):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.attrs["layer_names"] = np.array([b"a"])
            layer = file.create_group("a")
            layer.attrs["weight_names"] = np.array([b"a/kernel:0"])
            make(layer)
        with pytest.raises(ValueError, match=r"a/kernel:0 is stored in another file, which is never read"):
            fv.weights.read(tmp_path / "a.h5")


@pytest.mark.parametrize("what", ["layers", "layer_names", "a group", "4 TB"])
def test_h5_of_another_build(tmp_path, what):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if what == "layers":
            file["layers"] = np.ones(3)
        elif what == "layer_names":
            file.attrs["layer_names"] = 3
        else:
            file.attrs["layer_names"] = np.array([b"a"])
            layer = file.create_group("a")
            layer.attrs["weight_names"] = np.array([b"kernel:0"])
            if what == "a group":
                layer.create_group("kernel:0")
            else:
                layer.create_dataset("kernel:0", (10**12,), "f4", chunks=(1024,))
    with pytest.raises(ValueError, match=r"a\.h5 is damaged or not a valid HDF5 file"):
        fv.weights.read(tmp_path / "a.h5")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in one of \.safetensors, \.npz, .*; got .*a\.ckpt"):
        fv.weights.read(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"must be an existing file; got .*a\.npz"):
        fv.weights.read(tmp_path / "a.npz")
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        fv.weights.read(tmp_path / "a.safetensors")


def test_a_torch_file_without_torch_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"a\.pth cannot be read without torch; pip .*'flaxvision\[reference\]'"):
        fv.weights.read(tmp_path / "a.pth")


@pytest.mark.reference
def test_torch_files(tmp_path, tensors):
    import torch

    state = {key: torch.tensor(tensor) for key, tensor in tensors.items()}
    for i, stored in enumerate(
        (
            state,
            {"state_dict": state, "epoch": 3},
            {"model": state, "args": {"lr": 0.1}},
            {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        )
    ):
        torch.save(stored, tmp_path / f"{i}.pth")
        same(fv.weights.read(tmp_path / f"{i}.pth"), tensors)
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.ones(2))}, tmp_path / "b.pt")
    same(fv.weights.read(tmp_path / "b.pt"), {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})


@pytest.mark.reference
def test_torch_files_that_hold_something_else(tmp_path, tensors, monkeypatch):
    import torch

    monkeypatch.setenv("FLAXVISION_BOMB", str(tmp_path / "ran"))
    path = tmp_path / "a.pth"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(ValueError, match=r"a\.pth is damaged or holds more than tensors: "):
        fv.weights.read(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"a\.pth is damaged or "):
        fv.weights.read(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(2), "epoch": 3}, path)
    with pytest.raises(ValueError, match=r"a\.pth is not a state_dict: epoch are not dense tensors"):
        fv.weights.read(path)
    torch.save({key: torch.tensor(tensor) for key, tensor in tensors.items()}, path)
    whole = path.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.pth is damaged or "):
            fv.weights.read(path)


@pytest.mark.reference
@pytest.mark.filterwarnings("default:__array__ implementation:DeprecationWarning")  # Keras' own
def test_keras_writes_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    import keras

    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(4, 3, name="conv1")(inputs)
    x = keras.layers.BatchNormalization(scale=False)(x)
    x = keras.layers.SeparableConv2D(5, 3, use_bias=False, name="sep")(x)
    x = keras.layers.DepthwiseConv2D(3, use_bias=False, name="dw")(x)
    x = keras.layers.Dense(3, name="predictions")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    model.save_weights(tmp_path / "a.weights.h5")
    same(fv.weights.read(tmp_path / "a.weights.h5"), {w.path: np.asarray(w) for w in model.weights})

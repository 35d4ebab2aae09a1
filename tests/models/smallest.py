"""A small version of one model of each family, which the tests of all families share."""

import jax
import jax.numpy as jnp
import numpy as np

import flaxvision as fv
from flaxvision.models import Classifier

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # halves the compilation
# One stage without and one with a stride.
SHORT, NARROW = {"stage_sizes": (1, 1)}, {"features": (8, 16)}
# One model of each body: a small input, fields that make it narrow and leave out repetitions, and the number of its
# pooled features.
SMALLEST: dict[str, tuple[tuple[int, ...], dict, int]] = {
    "perceptron": ((2,), {}, 2),
    "mlp": ((28, 28), {"features": (20, 10)}, 10),
    "lenet5": ((32, 32), {}, 84),
    "lenet5_modern": ((32, 32), {}, 84),
    "lenet_dli": ((28, 28), {}, 128),
    "fashion_cnn": ((28, 28), {"stage_features": (8, 8, 8), "dense_features": (16, 8)}, 8),
    "capsnet": ((17, 18), {"conv_features": 8, "primary_features": 2}, 16),
    "alexnet": ((63, 70), {"features": (8, 8, 8, 8, 8), "hidden_features": 32}, 32),
    "alexnet_tv": ((63, 70), {"features": (8, 8, 8, 8, 8), "hidden_features": 32}, 32),
    "alexnet_dli": ((195, 199), {"features": (8, 8, 8, 8, 8), "hidden_features": 32}, 32),
    "zfnet": ((63, 63), {"features": (8, 8, 8, 8, 8), "hidden_features": 32}, 32),
    "vgg11_bn": ((32, 33), {"features": (8,) * 5, "hidden_features": 32}, 32),
    "vgg16_dli": ((32, 33), {"features": (8,) * 5, "hidden_features": 32, "stage_sizes": (1,) * 5}, 32),
    "squeezenet1_0": ((33, 35), {"stem_features": 8, "fires": (((4, 8),), ((4, 8),), ((4, 8),))}, 16),
    "googlenet": ((32, 33), {}, 1024),
    "googlenet_bn": ((32, 33), {}, 1024),
    "bn_inception": ((32, 33), {"use_bias": False}, 1024),  # biases before a BatchNorm have no gradient
    "inception_v3": ((75, 76), {}, 2048),
    "inception_v4": ((75, 76), {"stage_sizes": (1, 1, 1)}, 1536),
    "inception_resnet_v2": ((75, 76), {"stage_sizes": (1, 1, 2)}, 1536),
    "tiny_darknet": ((33, 40), {"convs": (((8, 3),), ((8, 3),), ((4, 1), (16, 3)))}, 16),
    "darknet53": ((33, 40), {"stage_sizes": (1, 1), "stem_features": 4}, 16),
    "resnet18": ((33, 40), {**SHORT, **NARROW}, 16),
    "resnet50": ((33, 40), {**SHORT, **NARROW}, 64),
    "resnet20_cifar": ((16, 17), {"stage_sizes": (1, 1, 1), "features": (4, 4, 8)}, 8),
    "se_resnet18": ((33, 40), {**SHORT, **NARROW, "reduction": 2}, 16),
    "se_resnet50": ((33, 40), {**SHORT, **NARROW, "reduction": 4}, 64),
    "senet154": ((33, 40), {**SHORT, **NARROW, "reduction": 4, "stem_features": (4, 4, 8), "groups": 4}, 64),
    "xception": ((71, 72), {"middle_blocks": 1}, 2048),
    "mobilenet_v1": (
        (33, 40),
        {"width_multiplier": 0.25, "blocks": (((32, 1),), ((64, 2),), ((64, 2), (64, 1)))},
        16,
    ),
    "mobilenet_v2": (
        (33, 40),
        {"width_multiplier": 0.2, "blocks": (((1, 16, 1, 1),), ((6, 24, 2, 2),), ((6, 32, 1, 2),))},
        1280,
    ),
}
# Their compilation takes longer than 15 s. The parity tests execute them in every run.
SLOW = {
    *("googlenet", "googlenet_bn", "bn_inception", "inception_v3", "inception_v4", "inception_resnet_v2", "xception"),
    *("senet154", "se_resnet18", "se_resnet50", "resnet50", "mobilenet_v1", "darknet53", "vgg16_dli", "alexnet"),
}


def sample_of(size, channels, rows=2):
    return jax.ShapeDtypeStruct((rows, *size, channels) if len(size) == 2 else (rows, *size), jnp.float32)


def counted(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def small(name, **fields):
    """The model of `SMALLEST`, its input and its variables, by shape."""
    size, cut, _ = SMALLEST[name]
    model = fv.create_model(name, **cut, **fields)
    x = sample_of(size, fields.get("image_shape", (0, 0, fv.model_info(name).channels))[2])
    return model, x, jax.eval_shape(model.init, jax.random.key(0), x)


def filled(tree, seed=0):
    """Variables made with numpy: He-scaled kernels, shifts around 1, running statistics as they might be."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        leaf = path[-1].key
        if leaf == "var":
            value = rng.uniform(0.5, 2, x.shape)
        elif leaf == "scale":
            value = rng.uniform(0.3, 0.8, x.shape)
        elif leaf in ("bias", "mean"):
            value = rng.normal(0.5 if leaf == "bias" else 0, 0.2, x.shape)
        else:
            value = rng.normal(0, (2 / max(1, np.prod(x.shape[:-1]))) ** 0.5, x.shape)
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def with_backbone():
    """One name of `SMALLEST` for each class of backbones."""
    models = {name: fv.create_model(name, **SMALLEST[name][1]) for name in SMALLEST}
    return list({type(m.backbone): name for name, m in models.items() if isinstance(m, Classifier)}.values())

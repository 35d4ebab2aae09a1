"""Writes tests/parity/references.npz: the outputs of torchvision, timm, pytorchcv and Keras for drawn weights.

    pip install -e ".[reference]" pytorchcv
    python -m parity.references                  # all cases
    python -m parity.references --models vgg*    # only these; keeps the others

The file holds logits, auxiliary logits and two numbers for each BatchNorm. `tests/parity/test_parity.py` draws the same
weights and images again, without any of these libraries.
"""

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from parity import comparison

FILE = Path(__file__).resolve().parents[1] / "tests" / "parity" / "references.npz"
SMALL: dict[str, Any] = {"classes": 100}

# The smallest network of every family, once for each library that defines it differently. The ledger has the others.
CASES = {
    f"{pair.source}/{pair.model}{'/aux' if pair.aux else ''}": pair
    for pair in (
        comparison.Pair("alexnet_tv", "torchvision", (79, 97), **SMALL),
        comparison.Pair("alexnet_ungrouped", "pytorchcv", (227, 229), **SMALL),
        comparison.Pair("bn_inception", "pytorchcv", (223, 224), **SMALL),
        comparison.Pair("deeplabv3_resnet50", "torchvision", (33, 41), classes=3),
        comparison.Pair("fcn_resnet50", "torchvision", (33, 41), classes=3),
        comparison.Pair("googlenet_bn", "torchvision", (65, 97), aux=True, **SMALL),
        comparison.Pair("inception_resnet_v2", "timm", (75, 97), **SMALL),
        comparison.Pair("inception_v3", "keras", (75, 97), **SMALL),
        comparison.Pair("inception_v3", "torchvision", (299, 315), aux=True, **SMALL),
        comparison.Pair("inception_v4", "timm", (75, 97), **SMALL),
        comparison.Pair("mobilenet_v1", "keras", (65, 82), **SMALL),
        comparison.Pair("mobilenet_v1", "timm", (65, 81), **SMALL),
        comparison.Pair("mobilenet_v2", "keras", (65, 82), **SMALL),
        comparison.Pair("mobilenet_v2", "torchvision", (65, 81), **SMALL),
        comparison.Pair("resnet18", "torchvision", (65, 81), **SMALL),
        comparison.Pair("resnet50", "keras", (65, 81), **SMALL),
        comparison.Pair("resnet50", "torchvision", (65, 81), **SMALL),
        comparison.Pair("se_resnet50", "timm", (65, 81), **SMALL),
        comparison.Pair("squeezenet1_0", "torchvision", (65, 81), **SMALL),
        comparison.Pair("unet_resnet34", "smp", (32, 64), classes=3),
        comparison.Pair("vgg11_bn", "torchvision", (49, 67), **SMALL),
        comparison.Pair("xception", "keras", (75, 97), **SMALL),
        comparison.Pair("xception", "timm", (75, 97), **SMALL),
        comparison.Pair("zfnet", "pytorchcv", (224, 225), **SMALL),
    )
}


def make(pair: comparison.Pair) -> dict[str, np.ndarray]:
    """Returns one network's results by name: `eval` logits, some `train` and auxiliary logits, statistics, version."""
    theirs = pair.theirs()
    statistics, tensors = comparison.weights(pair, theirs)
    theirs.load(tensors)
    images = pair.images("images")
    found = {
        "statistics": np.array([statistics[name] for name in sorted(statistics)], np.float32).reshape(-1, 2),
        "version": np.array(theirs.version),
    }
    found["eval"] = theirs.forward(images).logits
    if pair.aux or pair.model == "resnet18":
        trained = theirs.forward(images, train=True)
        found |= {"train": trained.logits, **trained.aux}
    return found


def main(models: str = "*") -> None:
    """Writes the file.

    Args:
        models: Shell pattern of registry names. The results of other models stay.
    """
    import torch

    torch.set_num_threads(1)
    kept = {} if models == "*" else dict(np.load(FILE))
    arrays: dict[str, Any] = {}
    for case, pair in CASES.items():
        if fnmatch.fnmatchcase(pair.model, models):
            arrays |= {f"{case}/{name}": value for name, value in make(pair).items()}
        else:
            arrays |= {key: value for key, value in kept.items() if key.rpartition("/")[0] == case}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    tyro.cli(main)

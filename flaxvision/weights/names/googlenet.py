"""GoogLeNet in torchvision."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

_TOP = {
    "backbone/conv1": "conv1",
    "backbone/conv2_1": "conv2",
    "backbone/conv2_2": "conv3",
    "head": "fc",
}
_BRANCHES = {
    "branch1x1": "branch1",
    "branch3x3_1": "branch2.0",
    "branch3x3_2": "branch2.1",
    "branch5x5_1": "branch3.0",
    "branch5x5_2": "branch3.1",
    "branch_pool": "branch4.1",
}
_AUX = {"conv/conv": "conv.conv", "conv/bn": "conv.bn", "dense": "fc1", "head": "fc2"}


def _torchvision(path: str) -> str:
    if path.startswith("aux"):
        aux, layer = path.split("/", 1)
        return f"{aux.replace('_head', '')}.{_AUX[layer]}"
    if path in _TOP:
        return _TOP[path]
    *_, unit, leaf = path.split("/")
    if unit in _BRANCHES:
        return f"{path.split('/')[1]}.{_BRANCHES[unit]}.{leaf}"
    return f"{_TOP[path.rpartition('/')[0]]}.{leaf}"


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        source="torchvision",
        models=("googlenet_bn",),
        module=_torchvision,
        flatten={"aux_head1/dense": (4, 4, 128), "aux_head2/dense": (4, 4, 128)},
        ignore=("aux1.*", "aux2.*"),
        head=("head", "aux_head1/head", "aux_head2/head"),
        first="backbone/conv1/conv",
    ),
)

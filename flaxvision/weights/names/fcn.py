"""Names of the segmentation networks of torchvision on ResNets."""

from __future__ import annotations

from flaxvision.weights.layout import Layout
from flaxvision.weights.names import resnet

_HEADS = {
    "head/conv": "classifier.0",
    "head/bn": "classifier.1",
    "head/logits": "classifier.4",
    "aux_head/conv": "aux_classifier.0",
    "aux_head/bn": "aux_classifier.1",
    "aux_head/logits": "aux_classifier.4",
    "aspp/point_conv": "classifier.0.convs.0.0",
    "aspp/point_bn": "classifier.0.convs.0.1",
    **{
        f"aspp/atrous{i}_{kind}": f"classifier.0.convs.{i}.{place}"
        for i in (1, 2, 3)
        for place, kind in enumerate(("conv", "bn"))
    },
    "aspp/pool_conv": "classifier.0.convs.4.1",
    "aspp/pool_bn": "classifier.0.convs.4.2",
    "aspp/project_conv": "classifier.0.project.0",
    "aspp/project_bn": "classifier.0.project.1",
    "head_conv": "classifier.1",
    "head_bn": "classifier.2",
    "logits": "classifier.4",
}


def torchvision_name(path: str) -> str:
    """Returns torchvision's name of a module, such as `classifier.4` for `head/logits`."""
    return _HEADS[path] if path in _HEADS else f"backbone.{resnet.torchvision_name(path)}"


def _layout(name: str, head: str) -> Layout:
    return Layout(
        "torchvision",
        (name,),
        torchvision_name,
        # The published files hold the auxiliary classifier, which only training uses.
        ignore=("aux_classifier.*",),
        head=(head, "aux_head/logits"),
        first="backbone/stem_conv",
    )


LAYOUTS: tuple[Layout, ...] = (_layout("fcn_resnet50", "head/logits"), _layout("deeplabv3_resnet50", "logits"))

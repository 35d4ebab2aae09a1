"""Names of the U-Net of segmentation_models_pytorch."""

from __future__ import annotations

import re

from flaxvision.weights.layout import Layout
from flaxvision.weights.names import resnet

_DECODER = re.compile(r"decoder(\d+)_conv([12])/(conv|bn)")


def smp_name(path: str) -> str:
    """Returns the name of a module, such as `decoder.blocks.0.conv1.0` for `decoder1_conv1/conv`."""
    if path == "logits":
        return "segmentation_head.0"
    if found := _DECODER.fullmatch(path):
        return f"decoder.blocks.{int(found[1]) - 1}.conv{found[2]}.{int(found[3] == 'bn')}"
    return f"encoder.{resnet.torchvision_name(path)}"


LAYOUTS: tuple[Layout, ...] = (
    Layout("smp", ("unet_resnet34",), smp_name, head=("logits",), first="backbone/stem_conv"),
)

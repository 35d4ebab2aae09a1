"""Names of the U-Net of segmentation_models_pytorch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from flaxvision.weights.layout import Layout
from flaxvision.weights.names import mobilenet_v2, resnet

_DECODER = re.compile(r"decoder(\d+)_conv([12])/(conv|bn)")


def smp_name(path: str, encoder: Callable[[str], str]) -> str:
    """Returns the name of a module, such as `decoder.blocks.0.conv1.0` for `decoder1_conv1/conv`.

    Args:
        path: Path of our module.
        encoder: Names the modules of the encoder, as torchvision does.
    """
    if path == "logits":
        return "segmentation_head.0"
    if found := _DECODER.fullmatch(path):
        return f"decoder.blocks.{int(found[1]) - 1}.conv{found[2]}.{int(found[3] == 'bn')}"
    return f"encoder.{encoder(path)}"


LAYOUTS: tuple[Layout, ...] = (
    *(
        Layout(
            "smp", (name,), functools.partial(smp_name, encoder=encoder), head=("logits",), first="backbone/stem_conv"
        )
        for name, encoder in (
            ("unet_resnet34", resnet.torchvision_name),
            ("unet_mobilenet_v2", mobilenet_v2.torchvision),
        )
    ),
)

"""U-Net in torch, written from the paper: the reference for `unet` and `unet_same`, which no library has as they are.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

FEATURES = (64, 128, 256, 512, 1024)


class UNet(nn.Module):
    """The paper's U-Net, or its padded form with BatchNorm.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        padded: Pad the convolutions, normalize after them, and pool with rounding up.
        features: Channels of each stage.
    """

    def __init__(self, channels: int, classes: int, padded: bool, features: tuple[int, ...] = FEATURES):
        super().__init__()
        self.padded = padded
        widths = (channels, *features)
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip(widths, features, strict=False))
        finer = features[-2::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip(features[:0:-1], finer, strict=True)
        )
        self.merge = nn.ModuleList(self._double(2 * b, b) for b in finer)
        self.pool = nn.MaxPool2d(2, ceil_mode=padded)
        self.logits = nn.Conv2d(features[0], classes, 1)

    def _double(self, inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a in (inputs, outputs):
            layers.append(nn.Conv2d(a, outputs, 3, padding=int(self.padded), bias=not self.padded))
            layers += [nn.BatchNorm2d(outputs)] * self.padded + [nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images `[N, C, H, W]` to logits `[N, K, H', W']`."""
        size, skips = x.shape[2:], []
        for i, stage in enumerate(self.down):
            x = stage(self.pool(x) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            if self.padded:
                x = x[:, :, : skip.shape[2], : skip.shape[3]]
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            x = merge(torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1))
        x = self.logits(x)
        return x[:, :, : size[0], : size[1]] if self.padded else x


def load(model: UNet, variables: Mapping[str, Any]) -> None:
    """Copies the variables of our `unet` or `unet_same` into a network of the same sizes."""
    params, statistics = variables["params"], variables.get("batch_stats", {})
    stages = len(model.down)

    def fill(layer: nn.Module, path: tuple[str, ...]) -> None:
        values, stats = params, statistics
        for name in path:
            values, stats = values[name], stats.get(name, {})
        named = {"bias": values.get("bias"), "running_mean": stats.get("mean"), "running_var": stats.get("var")}
        if isinstance(layer, nn.BatchNorm2d):
            named["weight"] = values["scale"]
        else:
            # Linen does not flip the kernel of a transposed convolution; torch does.
            kernel = np.asarray(values["kernel"])
            flipped = kernel[::-1, ::-1].transpose(2, 3, 0, 1) if isinstance(layer, nn.ConvTranspose2d) else None
            named["weight"] = kernel.transpose(3, 2, 0, 1) if flipped is None else flipped
        with torch.no_grad():
            for name, value in named.items():
                if value is not None:
                    getattr(layer, name).copy_(torch.from_numpy(np.array(value, copy=True)))

    def double(block: nn.Sequential, path: tuple[str, ...]) -> None:
        layers = [layer for layer in block if not isinstance(layer, nn.ReLU)]
        for number in (1, 2):
            unit = (*path[:-1], f"{path[-1]}_conv{number}")
            if model.padded:
                fill(layers[2 * number - 2], (*unit, "conv"))
                fill(layers[2 * number - 1], (*unit, "bn"))
            else:
                fill(layers[number - 1], unit)

    for i, block in enumerate(model.down, start=1):
        double(block, ("backbone", f"stage{i}"))
    for i, (up, block) in enumerate(zip(model.up, model.merge, strict=True)):
        name = f"decoder{i + 1}" if model.padded else f"stage{stages - 1 - i}"
        fill(up, (f"{name}_up",))
        double(block, (name,))
    fill(model.logits, ("logits",))

"""torchvision's Faster and Mask R-CNN with random weights that produce detections, for comparisons with ours.

`parity.drawing` draws the tensors by name. With these alone, the outputs for a region would hardly depend on the
region. The output layers are therefore rescaled: over the anchors, proposals or masks of a calibration image, every
output has the mean and standard deviation given in `TARGETS`. `Calibration` stores the statistics that this needs, so
that the weights can be drawn again without torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import flaxvision as fv
from parity import drawing
from parity.libraries import _import_torchvision

NAME = "faster_rcnn_resnet50_fpn"
Tensors = dict[str, np.ndarray]

# Mean and standard deviation of each output layer. With these, objectness is often uncertain, the box head resizes
# boxes by about a tenth, and a few proposals have a class with a high probability.
TARGETS = {
    "rpn.head.cls_logits": (-1.0, 2.0),
    "rpn.head.bbox_pred": (0.0, 0.2),
    "roi_heads.box_predictor.cls_score": (0.0, 1.0),
    "roi_heads.box_predictor.bbox_pred": (0.0, 0.5),
    "roi_heads.mask_predictor.mask_fcn_logits": (0.0, 2.0),
}
LOSSES = {
    "classes": "loss_classifier",
    "box": "loss_box_reg",
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "mask": "loss_mask",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A Faster or Mask R-CNN on a ResNet with bottleneck units.

    Attributes:
        classes: Number of classes, including the background.
        stage_sizes: Number of units in each stage.
        fpn_features: Channels of the pyramid.
        head_features: Width of the box head.
        mask_features: Channels of each 3x3 convolution of the mask head; empty for Faster R-CNN.
    """

    classes: int = 91
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    fpn_features: int = 256
    head_features: int = 1024
    mask_features: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The registry name."""
        return "mask_rcnn_resnet50_fpn" if self.mask_features else NAME

    @property
    def fields(self) -> dict[str, Any]:
        """Overrides that give our model this configuration."""
        return {
            "num_classes": self.classes,
            "stage_sizes": self.stage_sizes,
            "fpn_features": self.fpn_features,
            "head_features": self.head_features,
            **({"mask_features": self.mask_features} if self.mask_features else {}),
        }

    def ours(self, **overrides: Any) -> Any:
        """Builds our model."""
        return fv.create_model(self.name, **self.fields, **overrides)

    def variables(self, tensors: Tensors) -> dict[str, Any]:
        """Converts torchvision's tensors to our variables."""
        return fv.weights.convert(self.name, tensors, source="torchvision", **self.fields)

    def theirs(self, *, double: bool = False, **options: Any) -> Any:
        """Builds torchvision's model with frozen BatchNorm of epsilon 0.

        Its transform is switched off: images must be normalized and resized.

        Args:
            double: Whether to compute in float64.
            **options: Options of torchvision's `FasterRCNN` or `MaskRCNN`.
        """
        _import_torchvision()
        from torchvision.models.detection._utils import overwrite_eps
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.models.resnet import Bottleneck, ResNet
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
        from torchvision.ops.misc import FrozenBatchNorm2d

        body = ResNet(Bottleneck, list(self.stage_sizes), norm_layer=FrozenBatchNorm2d)
        layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
        channels = [256, 512, 1024, 2048]
        backbone = BackboneWithFPN(body, layers, channels, self.fpn_features, extra_blocks=LastLevelMaxPool())
        if self.mask_features:
            last = self.mask_features[-1]
            options["mask_head"] = MaskRCNNHeads(self.fpn_features, list(self.mask_features), 1)
            options["mask_predictor"] = MaskRCNNPredictor(last, last, self.classes)
        model = (MaskRCNN if self.mask_features else FasterRCNN)(
            backbone,
            box_head=TwoMLPHead(self.fpn_features * 49, self.head_features),
            box_predictor=FastRCNNPredictor(self.head_features, self.classes),
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            **options,
        )
        model.transform.resize = lambda image, target=None: (image, target)
        overwrite_eps(model, 0.0)
        return (model.double() if double else model).eval()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The statistics from which, with the names and shapes, the weights can be drawn.

    Attributes:
        statistics: Mean and variance of the input of each BatchNorm, by its name.
        outputs: Mean and standard deviation `[2, C]` of each output layer of `TARGETS`, before it is rescaled.
    """

    statistics: dict[str, tuple[float, float]]
    outputs: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the statistics as arrays; the inverse of `from_arrays`."""
        names = sorted(self.statistics)
        stored = {"statistics": np.asarray([self.statistics[name] for name in names], np.float32)}
        return stored | {f"output {name}": value for name, value in self.outputs.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], shapes: drawing.Shapes) -> Calibration:
        """Creates a calibration from the result of `arrays`; `shapes` has torchvision's names of the tensors."""
        names = sorted(drawing.norms(shapes))
        statistics = dict(zip(names, map(tuple, arrays["statistics"].tolist()), strict=True))
        return cls(statistics, {name: arrays[f"output {name}"] for name in TARGETS if f"{name}.weight" in shapes})


def draw(shapes: drawing.Shapes, calibration: Calibration) -> Tensors:
    """Draws all tensors of torchvision's model.

    Args:
        shapes: Shape of each tensor, by torchvision's name.
        calibration: The statistics. Output layers that it lacks are not rescaled.

    Returns:
        Float32 tensors by name.
    """
    tensors = drawing.draw(shapes, calibration.statistics)
    for name, (mean, deviation) in calibration.outputs.items():
        target_mean, target = TARGETS[name]
        factor = np.float32(target) / deviation
        kernel = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
        # Add a tenth of the drawn bias, so that the bias has an effect.
        bias = tensors[f"{name}.bias"]
        tensors[f"{name}.bias"] = (bias - mean) * factor + np.float32(target_mean) + 0.1 * np.float32(target) * bias
    return tensors


def calibrate(model: Any, images: np.ndarray) -> Calibration:
    """Runs torchvision's model on an image `[1, H, W, 3]` and returns what `draw` needs for it."""
    import torch
    from torchvision.ops.misc import FrozenBatchNorm2d

    shapes = shapes_of(model)
    means, variances, hooks = {}, {}, []
    calibration = Calibration({}, {})
    load(model, draw(shapes, calibration))

    def normalize(name):
        def hook(module, inputs):
            x = inputs[0]
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            means[name], variances[name] = mean.numpy(), var.numpy()
            module.running_mean.copy_(mean)
            module.running_var.copy_(var)

        return hook

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FrozenBatchNorm2d):
                hooks.append(module.register_forward_pre_hook(normalize(name)))
        model.backbone.body(torch.from_numpy(images).permute(0, 3, 1, 2))
        for hook in hooks:
            hook.remove()
        statistics = drawing.statistics_of(means, variances)
        # The box head depends on the proposals, and the mask head on the detections.
        names = [name for name in TARGETS if f"{name}.weight" in shapes]
        for part in filter(None, (names[:2], names[2:4], names[4:])):
            calibration = Calibration(statistics, calibration.outputs)
            load(model, draw(shapes, calibration))
            seen: dict[str, list[Any]] = {name: [] for name in part}
            hooks = [
                model.get_submodule(name).register_forward_hook(
                    lambda module, inputs, output, name=name, seen=seen: seen[name].append(
                        output.transpose(0, 1).flatten(1) if output.ndim == 4 else output.T
                    )
                )
                for name in part
            ]
            detect(model, list(images))
            for hook in hooks:
                hook.remove()
            found = {name: torch.cat(x, 1).double().numpy() for name, x in seen.items()}
            outputs = {name: np.stack([x.mean(1), x.std(1)]).astype(np.float32) for name, x in found.items()}
            calibration = Calibration(statistics, calibration.outputs | outputs)
    return calibration


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of torchvision's tensors by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def load(model: Any, tensors: Tensors) -> None:
    """Loads all tensors into torchvision's model."""
    import torch

    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()})


def version() -> str:
    """Returns the versions of torchvision and torch."""
    return ", ".join(
        f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in ("torchvision", "torch")
    )


def torch_images(images: Sequence[np.ndarray], double: bool = False) -> list[Any]:
    """Converts images `[H, W, 3]`, which may differ in size, to torchvision's format."""
    import torch

    return [
        torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))).to(torch.float64 if double else torch.float32)
        for x in images
    ]


def torch_truth(truth: dict[str, np.ndarray], double: bool = False) -> dict[str, Any]:
    """Converts the ground truth of an image, with labels from 0, to torchvision's format."""
    import torch

    boxes = torch.from_numpy(truth["boxes"]).to(torch.float64 if double else torch.float32)
    target = {"boxes": boxes, "labels": torch.from_numpy(truth["labels"].astype(np.int64)) + 1}
    return target | ({"masks": torch.from_numpy(truth["masks"].astype(np.uint8))} if "masks" in truth else {})


def detect(model: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Returns torchvision's `boxes`, `scores`, `labels` and, of Mask R-CNN, `masks [D, H, W]` of each image.

    Labels start at 0, without a background. The masks are probabilities.
    """
    import torch

    with torch.no_grad():
        found = model.eval()(torch_images(images))
    found = [{name: value.numpy() for name, value in one.items()} for one in found]
    return [
        one | {"labels": one["labels"] - 1} | ({"masks": one["masks"][:, 0]} if "masks" in one else {}) for one in found
    ]


def losses(
    model: Any,
    images: Sequence[np.ndarray],
    truths: Sequence[dict[str, np.ndarray]],
    sample: Any,
    *,
    gradients: bool = True,
) -> tuple[dict[str, float], Tensors]:
    """Computes torchvision's losses with our sample, and the gradients of their sum.

    Args:
        model: torchvision's model.
        images: Images `[H, W, 3]`, which may differ in size.
        truths: The ground truth of each image: `boxes [M, 4]`, `labels [M]` from 0 and, for Mask R-CNN, `masks [M, H,
            W]`.
        sample: `(indices, kept)` of the anchors and `(regions, kept)` of the proposals, as our `losses` sows them.
        gradients: Whether to compute the gradients.

    Returns:
        The losses by our names, and the gradients by torchvision's parameter names.
    """
    import torch

    double = next(model.parameters()).dtype == torch.float64
    targets = [torch_truth(truth, double) for truth in truths]
    model.train()
    model.zero_grad(set_to_none=True)
    with _same_sample(model, sample), torch.set_grad_enabled(gradients):
        found = model(torch_images(images, double), targets)
    if gradients:
        sum(found.values()).backward()
    slopes = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {ours: found[theirs].item() for ours, theirs in LOSSES.items() if theirs in found}, slopes


@contextlib.contextmanager
def _same_sample(model: Any, sample: Any) -> Iterator[None]:
    """Makes torchvision use our sample. It still decides itself which of them are positive."""
    import torch

    (anchors, anchors_kept), (regions, regions_kept) = sample
    proposals: list[Any] = []
    add = model.roi_heads.add_gt_proposals

    def remember(*args):
        proposals[:] = add(*args)
        return list(proposals)

    def split(labels, chosen):
        result = ([], [])
        for label, index in zip(labels, chosen, strict=True):
            mask = torch.zeros_like(label, dtype=torch.uint8)
            mask[torch.from_numpy(index)] = 1
            assert int(mask.sum()) == len(index), "an anchor or proposal was sampled twice"
            result[0].append(mask * (label >= 1).to(torch.uint8))
            result[1].append(mask * (label == 0).to(torch.uint8))
            assert int((result[0][-1] + result[1][-1]).sum()) == len(index), "an ignored anchor or proposal was sampled"
        return result

    def first(labels):
        return split(labels, [np.asarray(i)[np.asarray(k)] for i, k in zip(anchors, anchors_kept, strict=True)])

    def second(labels):
        chosen = []
        for theirs, ours, kept in zip(proposals, regions, regions_kept, strict=True):
            distance = np.abs(theirs.numpy()[None] - np.asarray(ours)[np.asarray(kept)][:, None]).max(-1)
            # Proposals of two levels may be the same box, so match each of theirs only once.
            taken = []
            for row in distance:
                row[taken] = np.inf
                assert row.min() < 0.01, "a sampled proposal is none of torchvision's"
                taken.append(int(row.argmin()))
            chosen.append(np.asarray(taken))
        return split(labels, chosen)

    samplers = model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler
    model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = first, second
    model.roi_heads.add_gt_proposals = remember
    try:
        yield
    finally:
        model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = samplers
        del model.roi_heads.add_gt_proposals

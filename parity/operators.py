"""Random test cases for the detection operators, and torchvision's results for them. Writes tests/ops/references.npz.

    pip install -e ".[reference]"
    python -m parity.operators

The cases include edge cases: identical boxes, boxes without an area, inverted boxes, padding, and ties.
`tests/ops/test_references.py` compares with the stored results, and `tests/ops/test_live.py` with torchvision itself on
1,000 cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).resolve().parents[1] / "tests" / "ops" / "references.npz"
BOXES = 40
FEATURES = (13, 17, 3)
ROIS = 12
ROI_ALIGN = [
    {"output_size": size, "spatial_scale": scale, "sampling_ratio": ratio, "aligned": aligned}
    for size, scale, ratio in ((7, 0.25, 2), ((2, 3), 1.0, 1), (5, 0.5, 3), ((3, 1), 0.125, 2))
    for aligned in (False, True)
]
ROI_POOL = [
    {"output_size": size, "spatial_scale": scale}
    for size, scale in ((7, 0.25), ((2, 3), 1.0), (6, 1 / 16), ((3, 1), 0.3))
]
THRESHOLDS = (0.3, 0.5, 0.6, 0.7)
KINDS = ("iou", "giou", "diou", "ciou")


def boxes(rng: np.random.Generator, count: int, extent: float = 60.0, inverted: bool = True) -> np.ndarray:
    """Draws boxes `[count, 4]` float32: fractional, on whole pixels, identical, without an area, inverted."""
    corner = rng.uniform(0, extent, (count, 2))
    size = rng.uniform(0, extent, (count, 2)) ** rng.uniform(0.5, 1, (count, 1))
    found = np.concatenate([corner, corner + size], axis=1)
    kind = rng.integers(0, 10, count)
    found = np.where((kind < 4)[:, None], np.round(found), found)
    found = np.where((kind == 4)[:, None], found[rng.integers(0, count, count)], found)
    found = np.where((kind == 5)[:, None], found[0] + rng.integers(0, 4, (count, 4)), found)
    found[kind == 6, 2] = found[kind == 6, 0]
    found[kind == 8, 2:] = found[kind == 8, :2]
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    if inverted:
        found[kind == 7] = found[kind == 7][:, [2, 1, 0, 3]]
    return found.astype(np.float32)


def nms_case(seed: int) -> dict[str, np.ndarray]:
    """Draws boxes `[A, 4]`, scores with ties, labels, and which boxes exist, `[A]` each."""
    rng = np.random.default_rng([seed, 1])
    scores = rng.integers(0, rng.choice([3, 20, 1000]), BOXES) / 1000
    return {
        "boxes": boxes(rng, BOXES, extent=rng.choice([15.0, 60.0, 300.0])),
        "scores": scores.astype(np.float32),
        "labels": rng.integers(0, rng.choice([1, 3, 20]), BOXES).astype(np.int32),
        "valid": rng.random(BOXES) < rng.choice([0.5, 1.0]),
    }


def roi_case(seed: int, scale: float) -> dict[str, np.ndarray]:
    """Draws features `[H, W, C]`, with ties for odd seeds, and RoIs `[R, 4]` in and around the image or padding."""
    rng = np.random.default_rng([seed, 2])
    features = rng.standard_normal(FEATURES)
    if seed % 2:
        features = np.round(features)
    rois = boxes(rng, ROIS, extent=18 / scale, inverted=False) - rng.uniform(0, 3 / scale)
    rois[rng.random(ROIS) < 0.1] = 0
    return {"features": features.astype(np.float32), "rois": rois.astype(np.float32)}


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """Draws a cotangent for a result."""
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def torch_nms(case: dict[str, np.ndarray], threshold: float, classwise: bool) -> list[int]:
    """Returns the indices that torchvision keeps, by decreasing score and in a tie by increasing index.

    `batched_nms` is not used: it moves the classes apart, which rounds the boxes, or returns ties in any order.
    """
    import torch
    from torchvision import ops

    exists = np.flatnonzero(case["valid"])
    groups = [exists[case["labels"][exists] == label] for label in np.unique(case["labels"])] if classwise else [exists]
    kept = []
    for group in groups:
        found = ops.nms(torch.tensor(case["boxes"][group]), torch.tensor(case["scores"][group]), threshold)
        kept += group[found.numpy()].tolist()
    return sorted(kept, key=lambda i: (-case["scores"][i], i)) if classwise else kept


def torch_roi(name: str, case: dict[str, np.ndarray], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns torchvision's `roi_align` or `roi_pool`, `[R, h, w, C]`, and the gradient of the features."""
    import torch
    from torchvision import ops

    features = torch.tensor(case["features"]).permute(2, 0, 1)[None].contiguous().requires_grad_()
    found = getattr(ops, name)(features, [torch.tensor(case["rois"])], **options).permute(0, 2, 3, 1)
    (gradient,) = torch.autograd.grad(found, features, torch.tensor(cotangent(tuple(found.shape))))
    return found.detach().numpy(), gradient[0].permute(1, 2, 0).numpy()


def torch_pairwise(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns torchvision's overlap of every pair of boxes."""
    import torch
    from torchvision import ops

    functions = {
        "iou": ops.box_iou,
        "giou": ops.generalized_box_iou,
        "diou": ops.distance_box_iou,
        "ciou": ops.complete_box_iou,
    }
    return functions[kind](torch.tensor(a), torch.tensor(b)).numpy()


def torch_loss(kind: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns torchvision's loss of corresponding boxes, 1 minus the overlap, and its gradients."""
    import torch
    from torchvision import ops
    from torchvision.ops import _utils

    functions = {
        "giou": ops.generalized_box_iou_loss,
        "diou": ops.distance_box_iou_loss,
        "ciou": ops.complete_box_iou_loss,
    }
    if kind == "iou":

        def loss(a, b):
            intersection, union = _utils._loss_inter_union(a, b)
            return 1 - intersection / (union + 1e-7)
    else:
        loss = functions[kind]
    x, y = (torch.tensor(v, requires_grad=True) for v in (a, b))
    value = loss(x, y)
    gradients = torch.autograd.grad(value.sum(), (x, y))
    return value.detach().numpy(), *(g.numpy() for g in gradients)


def main() -> None:
    """Writes tests/ops/references.npz."""
    import torchvision

    arrays: dict[str, Any] = {"version": np.array(torchvision.__version__)}
    for seed in range(8):
        for threshold in THRESHOLDS:
            for classwise in (False, True):
                found = torch_nms(nms_case(seed), threshold, classwise)
                arrays[f"nms/{seed}/{threshold}/{classwise}"] = np.array(found, np.int8)
    for name, table in (("roi_align", ROI_ALIGN), ("roi_pool", ROI_POOL)):
        for i, options in enumerate(table):
            for part, value in zip(
                ("value", "gradient"), torch_roi(name, roi_case(i, options["spatial_scale"]), options), strict=True
            ):
                arrays[f"{name}/{i}/{part}"] = value
    rng = np.random.default_rng(4)
    a, b = (boxes(rng, 12, inverted=False) for _ in range(2))
    arrays |= {"boxes/a": a, "boxes/b": b}
    for kind in KINDS:
        arrays[f"boxes/{kind}"] = torch_pairwise(kind, a, b)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

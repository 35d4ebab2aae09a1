"""MobileNetV1 in timm and Keras."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

# Depthwise separable convolutions of each of our stages. The stages of timm are the same.
_STAGES = {"stem": 1, "stage1": 2, "stage2": 2, "stage3": 6, "stage4": 2}
_BLOCKS = tuple((stage, i) for stage, count in enumerate(_STAGES.values()) for i in range(count))
_NAMES = tuple(f"{stage}_block{i}" for stage, count in _STAGES.items() for i in range(1, count + 1))


def timm(path: str) -> str:
    """Returns the name of a module in timm."""
    if path == "head" or path.count("/") == 1:
        return {"head": "classifier", "backbone/stem_conv": "conv_stem", "backbone/stem_bn": "bn1"}[path]
    _, block, layer = path.split("/")
    stage, i = _BLOCKS[_NAMES.index(block)]
    layers = {"depthwise_conv": "conv_dw", "depthwise_bn": "bn1", "pointwise_conv": "conv_pw", "pointwise_bn": "bn2"}
    return f"blocks.{stage}.{i}.{layers[layer]}"


def keras(path: str) -> str:
    """Returns the name of a layer in Keras."""
    if path == "head" or path.count("/") == 1:
        return {"head": "conv_preds", "backbone/stem_conv": "conv1", "backbone/stem_bn": "conv1_bn"}[path]
    _, block, layer = path.split("/")
    kind, _, what = layer.partition("_")
    name = f"conv_{'dw' if kind == 'depthwise' else 'pw'}_{_NAMES.index(block) + 1}"
    return f"{name}_bn" if what == "bn" else name


_FIRST = "backbone/stem_conv"
_TIMM = {"padding": ((1, 1), (1, 1)), "epsilon": 1e-5, "momentum": 0.9}

LAYOUTS = (
    Layout("timm", ("mobilenet_v1",), timm, fields=_TIMM, first=_FIRST),
    Layout(
        "keras",
        ("mobilenet_v1",),
        keras,
        style="keras",
        fields={"strided_padding": ((0, 1), (0, 1))},
        conv1x1=("head",),
        first=_FIRST,
    ),
)

"""Layers that two or more models share and Linen lacks."""

from flaxvision.layers.batch_context import BatchContext, batch_context
from flaxvision.layers.capsules import (
    PrimaryCapsules,
    RoutedCapsules,
    capsule_lengths,
    routing_by_agreement,
    squash,
)
from flaxvision.layers.conv_norm import ConvNorm, conv_chain
from flaxvision.layers.convolution import (
    Conv,
    ConvTranspose,
    DepthwiseConv,
    SeparableConv,
    conv,
    conv_transpose,
    depthwise_conv,
    separable_conv,
)
from flaxvision.layers.fpn import FeaturePyramid, upsample_nearest
from flaxvision.layers.lowering import convolutions_saveable
from flaxvision.layers.neurons import RBF, digit_codes, heaviside, random_codes, sign
from flaxvision.layers.normalization import BatchNorm, local_response_norm
from flaxvision.layers.pooling import (
    TrainableAvgPool,
    adaptive_avg_pool,
    avg_pool,
    depthwise_avg_pool,
    depthwise_max_pool,
    global_avg_pool,
    global_max_pool,
    l2_norm_pool,
    max_pool,
)
from flaxvision.layers.resize import resize_bilinear
from flaxvision.layers.squeeze_excite import SqueezeExcite

__all__ = [
    "RBF",
    "BatchContext",
    "BatchNorm",
    "Conv",
    "ConvNorm",
    "ConvTranspose",
    "DepthwiseConv",
    "FeaturePyramid",
    "PrimaryCapsules",
    "RoutedCapsules",
    "SeparableConv",
    "SqueezeExcite",
    "TrainableAvgPool",
    "adaptive_avg_pool",
    "avg_pool",
    "batch_context",
    "capsule_lengths",
    "conv",
    "conv_chain",
    "conv_transpose",
    "convolutions_saveable",
    "depthwise_avg_pool",
    "depthwise_conv",
    "depthwise_max_pool",
    "digit_codes",
    "global_avg_pool",
    "global_max_pool",
    "heaviside",
    "l2_norm_pool",
    "local_response_norm",
    "max_pool",
    "random_codes",
    "resize_bilinear",
    "routing_by_agreement",
    "separable_conv",
    "sign",
    "squash",
    "upsample_nearest",
]

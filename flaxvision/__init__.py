"""Computer vision for JAX: pure Flax Linen models whose numbers can be trusted."""

from flaxvision import checkpoint, data, layers, losses, metrics, models, plot, train, weights
from flaxvision.registry import ModelInfo, create_backbone, create_model, list_models, model_fields, model_info

__version__ = "0.1.0.dev0"

__all__ = [
    "ModelInfo",
    "checkpoint",
    "create_backbone",
    "create_model",
    "data",
    "layers",
    "list_models",
    "losses",
    "metrics",
    "model_fields",
    "model_info",
    "models",
    "plot",
    "train",
    "weights",
]

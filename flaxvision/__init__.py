"""Computer vision for JAX: pure Flax Linen models whose numbers can be trusted."""

from flaxvision import checkpoint, data, layers, losses, metrics, models, ops, plot, train, weights
from flaxvision.detection import Candidates, Detections, detect, select_detections
from flaxvision.registry import ModelInfo, create_backbone, create_model, list_models, model_fields, model_info
from flaxvision.segmentation import segment

__version__ = "0.1.0.dev0"

__all__ = [
    "Candidates",
    "Detections",
    "ModelInfo",
    "checkpoint",
    "create_backbone",
    "create_model",
    "data",
    "detect",
    "layers",
    "list_models",
    "losses",
    "metrics",
    "model_fields",
    "model_info",
    "models",
    "ops",
    "plot",
    "segment",
    "select_detections",
    "train",
    "weights",
]

"""The registry of models: `create_model`, `create_backbone`, `model_fields`, `list_models`, `model_info`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import operator
from typing import Any, NamedTuple

import flax.linen as nn

from flaxvision import published


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Describes a registered model without building it.

    Attributes:
        name: The registry name.
        task: `"classification"`, `"detection"` or `"segmentation"`.
        paper: The publication that defines the model.
        year: Year of the publication.
        input_size: Published height and width in pixels; `(features,)` for models that take feature vectors.
        channels: Input channels of the published input.
        params: Exact number of trainable parameters at the defaults.
        mean: Per-channel mean of the published preprocessing, in [0, 1].
        std: Per-channel standard deviation of the published preprocessing, in [0, 1].
        defaults: Field values of the model or its backbone that this registry name sets.
    """

    name: str
    task: str
    paper: str
    year: int
    input_size: tuple[int, ...]
    channels: int
    params: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """Tags of the published weights that `flaxvision.weights.load` accepts; the first one is the default."""
        return published.tags(self.name)


class _Entry(NamedTuple):
    module: type[nn.Module]
    backbone: type[nn.Module] | None
    info: ModelInfo


_MODELS: dict[str, _Entry] = {}


def register(
    module: type[nn.Module],
    name: str,
    *,
    backbone: type[nn.Module] | None = None,
    defaults: dict[str, Any] | None = None,
    **info: Any,
) -> None:
    """Registers a model under a name.

    Args:
        module: A `flax.linen.Module` class. With `backbone`, it must have a field `backbone`, which receives an
            instance of that class.
        name: The registry name, in lower case.
        backbone: The class of the backbone, None for a model that has none.
        defaults: Values of fields of `module` or `backbone`.
        **info: The other fields of `ModelInfo`.

    Raises:
        ValueError: The name is already registered.
    """
    if name in _MODELS:
        raise ValueError(f"name must not be registered already; got {name!r}")
    defaults = defaults or {}
    _MODELS[name] = _Entry(module, backbone, ModelInfo(name=name, defaults=tuple(defaults.items()), **info))


def _find(name: str) -> _Entry:
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.4)
        right = f"a registered model (similar: {', '.join(near)})" if near else f"one of {', '.join(list_models())}"
        raise ValueError(f"name must be {right}; got {name!r}")
    return _MODELS[name]


def _fields_of(module: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(module) if field.init and field.name not in ("parent", "name")]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a registered model.

    Args:
        name: One of `list_models()`.
        **overrides: Fields of the model or of its backbone, such as `num_classes`, `dtype` or `stages`. Each goes to
            the module that has it.

    Returns:
        A `flax.linen.Module` without variables.

    Raises:
        ValueError: There is no such model, or a field has an invalid value, such as a negative `num_classes`.
        TypeError: Neither the model nor its backbone has such a field, or `num_classes` is not an integer.

    Example:
        >>> model = create_model("resnet18", num_classes=10, output_stride=16)
        >>> model.num_classes, model.backbone.output_stride
        (10, 16)
    """
    module, backbone, info = _find(name)
    inner = [] if backbone is None else _fields_of(backbone)
    own = [field for field in _fields_of(module) if backbone is None or field != "backbone"]
    if unknown := sorted(set(overrides) - {*own, *inner}):
        raise TypeError(
            f"overrides must be fields of {name} ({', '.join(own + inner)}); got {', '.join(map(repr, unknown))}"
        )
    if "num_classes" in overrides and operator.index(overrides["num_classes"]) < 0:
        raise ValueError(f"num_classes must be at least 0; got {overrides['num_classes']}")
    values = {**dict(info.defaults), **overrides}
    parts = {} if backbone is None else {"backbone": backbone(**{k: values.pop(k) for k in inner if k in values})}
    return module(**parts, **values)


def create_backbone(name: str, **overrides: Any) -> Any:
    """Builds the backbone of a registered model.

    Args:
        name: One of `list_models()` that has a backbone.
        **overrides: As for `create_model`; fields of the classifier have no effect.

    Returns:
        A `flaxvision.models.Backbone`, which maps images `[N, H, W, C]` to a dict of feature maps. Its `strides` are
        the strides of these maps in pixels, finest first. Its parameters are `params["backbone"]` of the classifier.

    Raises:
        ValueError: There is no such model, it has no backbone, or a field has an invalid value.
        TypeError: Neither the model nor its backbone has such a field.

    Example:
        >>> create_backbone("resnet18", stages=("stage2", "stage3")).strides
        {'stage2': 8, 'stage3': 16}
    """
    if _find(name).backbone is None:
        have = ", ".join(n for n, entry in sorted(_MODELS.items()) if entry.backbone is not None)
        raise ValueError(f"name must be a model with a backbone ({have}); got {name!r}")
    return create_model(name, **overrides).backbone


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Returns the fields of a model and of its backbone, as the overrides of `create_model`.

    `create_model(name, **model_fields(model))` rebuilds a model of that name.

    Args:
        model: A model, such as one returned by `create_model`.

    Returns:
        Values by field name. The field `backbone` is replaced by the fields of the backbone.
    """
    values = {field: getattr(model, field) for field in _fields_of(model)}
    backbone = values.pop("backbone", None)
    return values if backbone is None else {**values, **model_fields(backbone)}


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """Lists the registered names.

    Args:
        pattern: A shell pattern such as `"resnet*"`.
        task: `"classification"`, `"detection"` or `"segmentation"`; None for all.

    Returns:
        The sorted names.

    Raises:
        ValueError: There is no such task.

    Example:
        >>> list_models("inception*")
        ['inception_resnet_v2', 'inception_v3', 'inception_v4']
    """
    if task not in (None, "classification", "detection", "segmentation"):
        raise ValueError(f"task must be 'classification', 'detection' or 'segmentation'; got {task!r}")
    return sorted(n for n, e in _MODELS.items() if fnmatch.fnmatchcase(n, pattern) and task in (None, e.info.task))


def model_info(name: str) -> ModelInfo:
    """Describes a model without building it.

    Args:
        name: One of `list_models()`.

    Returns:
        The `ModelInfo` of the model.

    Raises:
        ValueError: There is no such model.

    Example:
        >>> info = model_info("resnet50")
        >>> info.params, info.input_size, info.weights[0]
        (25557032, (224, 224), 'torchvision/IMAGENET1K_V1')
    """
    return _find(name).info

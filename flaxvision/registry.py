"""Names for the models: `create_model`, `create_backbone`, `list_models`, `model_info`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import operator
from typing import Any

import flax.linen as nn

from flaxvision import published


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known of a registered model without building it.

    Attributes:
        name: The registry name.
        task: `"classification"`, `"detection"` or `"segmentation"`.
        paper: The publication that the definition follows.
        year: Its year.
        input_size: Height and width in pixels of the published input; `(features,)` for models of feature vectors.
        channels: Input channels of the published input.
        params: Trainable parameters at the defaults, exact.
        mean: Per-channel mean of the published preprocessing, in [0, 1].
        std: Per-channel standard deviation, likewise.
        defaults: Module fields that the name sets.
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


_MODELS: dict[str, tuple[type[nn.Module], ModelInfo]] = {}


def register(module: type[nn.Module], name: str, *, defaults: dict[str, Any] | None = None, **info: Any) -> None:
    """Registers `module(**defaults)` under `name`; `info` are the fields of `ModelInfo`.

    Args:
        module: A `flax.linen.Module` class.
        name: The registry name; lower case.
        defaults: Values for the module's fields.
        **info: The other fields of `ModelInfo`.

    Raises:
        ValueError: The name is taken.
    """
    if name in _MODELS:
        raise ValueError(f"a model named {name!r} is registered already")
    defaults = defaults or {}
    info.pop("weights", None)  # the tables of published weights list the tags
    _MODELS[name] = (module, ModelInfo(name=name, defaults=tuple(defaults.items()), **info))


def _find(name: str) -> tuple[type[nn.Module], ModelInfo]:
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.4)
        hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(list_models())}"
        raise ValueError(f"there is no model named {name!r}; {hint}")
    return _MODELS[name]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a registered model.

    Args:
        name: One of `list_models()`.
        **overrides: Fields of the module, such as `num_classes` or `dtype`.

    Returns:
        A plain `flax.linen.Module`, without variables.

    Raises:
        ValueError: There is no such model, the nearest names are given; or `num_classes` is negative.
        TypeError: The module has no such field, its fields are given; or `num_classes` is no integer.
    """
    module, info = _find(name)
    fields = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise TypeError(f"{name} has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(fields)}")
    if "num_classes" in overrides and operator.index(overrides["num_classes"]) < 0:
        raise ValueError(f"num_classes must be 0 or more, got {overrides['num_classes']}")
    return module(**{**dict(info.defaults), **overrides})


def create_backbone(name: str, **overrides: Any) -> nn.Module:
    """Builds the backbone of a registered model.

    Args:
        name: One of `list_models()`, of a family with a feature hierarchy.
        **overrides: Fields of the module, such as `dtype`.

    Returns:
        A module that maps images `[N, H, W, C]` to a dict of feature maps. Its `strides` are the pixels per step of
        each, finest first; its parameters are `params["backbone"]` of the classifier.

    Raises:
        ValueError: There is no such model, or it has no backbone; the names are given.
        TypeError: The module has no such field; its fields are given.
    """
    model = create_model(name, **overrides)
    if not hasattr(model, "make_backbone"):
        have = ", ".join(n for n, (module, _) in sorted(_MODELS.items()) if hasattr(module, "make_backbone"))
        raise ValueError(f"{name} has no feature hierarchy; these have one: {have}")
    return model.make_backbone(name=None)  # type: ignore[operator]


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Returns the fields of a model and of its backbone, as the overrides of `create_model`.

    `create_model(name, **model_fields(model))` rebuilds a model of that name.

    Args:
        model: A model, such as `create_model` returns.

    Returns:
        Values by field name. The field `backbone` is replaced by the fields of the backbone.
    """
    fields = [field.name for field in dataclasses.fields(model) if field.init and field.name not in ("parent", "name")]
    values = {field: getattr(model, field) for field in fields}
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
    """
    if task not in (None, "classification", "detection", "segmentation"):
        raise ValueError(f"task must be 'classification', 'detection' or 'segmentation'; got {task!r}")
    return sorted(n for n, (_, i) in _MODELS.items() if fnmatch.fnmatchcase(n, pattern) and task in (None, i.task))


def model_info(name: str) -> ModelInfo:
    """Tells what is known of a model without building it.

    Args:
        name: One of `list_models()`.

    Returns:
        Its `ModelInfo`.

    Raises:
        ValueError: There is no such model; the nearest names are given.
    """
    return _find(name)[1]

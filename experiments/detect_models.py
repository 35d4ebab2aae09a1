"""Builds the detector of `detect.py`, from the registry or from a `.cfg` file of darknet, and saves its weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import flaxvision as fv
from flaxvision.weights.load import load_weights


@dataclasses.dataclass(frozen=True)
class Built:
    """A detector for the classes of the data.

    Attributes:
        model: The module.
        name: Its registry name, or the name of its `.cfg` file.
        overrides: Overrides that create the module from that name. Checkpoints store them.
        mean: Mean of each channel, for normalizing images.
        std: Standard deviation of each channel, for normalizing images.
        variables: Variables to start from; None to initialize them.
    """

    model: Any
    name: str
    overrides: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Any = None

    @property
    def from_cfg(self) -> bool:
        """Whether the module was built from a `.cfg` file."""
        return is_cfg(self.name)


def is_cfg(model: str) -> bool:
    """Returns whether a model is specified by a `.cfg` file."""
    return model.endswith(".cfg")


def registry_name(config: Any) -> str:
    """Returns the registry name of the model of --model, which is not a `.cfg` file."""
    return config.SMALL[0] if config.model == "small" else config.model


def has_masks(config: Any) -> bool:
    """Returns whether the model predicts masks."""
    return not is_cfg(config.model) and isinstance(fv.create_model(registry_name(config)), fv.models.MaskRCNN)


def check(config: Any) -> None:
    """Raises ValueError for an unknown model, or for flags that cannot be used with the model."""
    if config.eval_only and not config.weights:
        raise ValueError("--weights FILE-OR-TAG must be given with --eval-only; got none")
    if bool(config.backbone_model) != bool(config.backbone_weights):
        raise ValueError(
            "--backbone-model and --backbone-weights must be given together; got "
            f"{config.backbone_model} and {config.backbone_weights}"
        )
    if is_cfg(config.model):
        if not config.weights:
            raise ValueError(f"--weights FILE must be given with a .cfg file; got none for {config.model}")
        if config.backbone_model or config.source not in (None, "darknet"):
            raise ValueError("--source and --backbone-model must be left out with a .cfg file")
    elif config.model != "small" and fv.model_info(config.model).task != "detection":
        known = ", ".join(fv.list_models(task="detection"))
        raise ValueError(f"--model must be small, a .cfg file or a detector ({known}); got {config.model!r}")


def class_names(config: Any) -> tuple[str, ...] | None:
    """Returns the classes of the model of --eval-only, if its weights state them.

    Models trained on COCO may have more labels than COCO has classes: torchvision's have the ids of the categories.
    """
    if not config.eval_only or config.source or config.model == "small" or is_cfg(config.model):
        return None
    return fv.weights.class_names_for(config.model, config.weights)


def build(config: Any, num_classes: int, find_anchors: Callable[[int], Any]) -> Built:
    """Builds the detector of a run.

    Args:
        config: The flags.
        num_classes: Number of classes of the data.
        find_anchors: Computes a given number of anchors from the data.

    Returns:
        The detector. With --eval-only, its fields are those stored with the weights.

    Raises:
        ValueError: The weights do not fit the model or the classes.
    """
    if is_cfg(config.model):
        return _from_cfg(config, num_classes, find_anchors)
    name = registry_name(config)
    info, usual = fv.model_info(name), fv.create_model(name)
    fields = fv.model_fields(usual)
    overrides: dict[str, Any] = dict(config.SMALL[1]) if config.model == "small" else {}
    if config.weights or config.backbone_weights:
        overrides["frozen_stages"] = config.frozen_stages
    rcnn = isinstance(usual, fv.models.FasterRCNN)
    if rcnn and not config.weights and config.model != "small":
        # The published network has the frozen statistics of a trained backbone, and an epsilon that goes with its own.
        overrides |= {"epsilon": 1e-5, "batch_norm": "frozen" if config.backbone_weights else "sync"}
    overrides |= config.model_overrides(fields, num_classes + int(rcnn))
    if config.anchors:
        # Those of YOLOv2 are in cells.
        unit = next(iter(usual.heads.values())).stride if isinstance(usual, fv.models.YoloV2) else 1
        overrides["anchors"] = tuple((width / unit, height / unit) for width, height in find_anchors(config.anchors))
    built = Built(fv.create_model(name, **overrides), name, overrides, info.mean, info.std)
    if config.weights is None:
        return built
    options: dict[str, Any] = {"source": config.source, "rng": jax.random.key(config.seed)}
    if not config.eval_only:  # in evaluation, keep the network of the weights
        options |= overrides
    loaded = load_weights(name, config.weights, **options)
    overrides = {**loaded.fields, "dtype": overrides["dtype"]}
    return _fitting(
        dataclasses.replace(built, model=loaded.model(), overrides=overrides, variables=loaded.variables), num_classes
    )


def _from_cfg(config: Any, num_classes: int, find_anchors: Callable[[int], Any]) -> Built:
    path = Path(config.model)
    fields = fv.model_fields(fv.weights.read_cfg(path))
    overrides = config.model_overrides(fields, num_classes)
    options: dict[str, Any] = {key: value for key, value in overrides.items() if key != "num_classes"}
    if not config.eval_only:
        options |= {"num_classes": num_classes, "rng": jax.random.key(config.seed)}
        if config.anchors:
            options["anchors"] = overrides["anchors"] = find_anchors(config.anchors)
    model, variables = fv.weights.load_cfg(path, config.weights, **options)
    overrides["cfg"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _fitting(Built(model, path.name, overrides, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), variables), num_classes)


def _fitting(built: Built, num_classes: int) -> Built:
    found = getattr(built.model, "num_labels", 0)
    if found != num_classes:
        raise ValueError(f"--weights must be for the {num_classes} classes of the data; got {found}")
    return built


def start(built: Built, config: Any, rng: jax.Array, sample: jax.ShapeDtypeStruct) -> Any:
    """Returns the variables to start from, with the backbone of --backbone-weights. None to initialize all of them."""
    if built.variables is not None or not config.backbone_weights:
        return built.variables
    variables = jax.jit(lambda: built.model.init(rng, jnp.zeros(sample.shape)))()
    return with_backbone(variables, config.backbone_model, config.backbone_weights, config.source)


def with_backbone(variables: Any, model: str, weights: str, source: str | None) -> Any:
    """Replaces the variables of the backbone of a detector by those of a classifier.

    Args:
        variables: Variables of the detector.
        model: Registry name of the classifier.
        weights: A published tag or a file.
        source: Library that wrote the file.

    Returns:
        The variables.

    Raises:
        ValueError: The classifier lacks a variable of the backbone, or the shape of one differs.
    """
    _, donor = fv.weights.load_model(model, weights, source=source)
    result = {}
    for name, collection in variables.items():
        flat: dict[str, Any] = dict(flatten_dict(collection, sep="/"))
        theirs: dict[str, Any] = dict(flatten_dict(donor.get(name, {}), sep="/"))
        for path, leaf in flat.items():
            if path.startswith("backbone/"):
                if path not in theirs or theirs[path].shape != leaf.shape:
                    got = "none" if path not in theirs else list(theirs[path].shape)
                    raise ValueError(f"--backbone-model must have {path} {list(leaf.shape)}; got {got} in {model}")
                flat[path] = theirs[path]
        result[name] = unflatten_dict(flat, sep="/")
    return result


def save(
    folder: Path,
    built: Built,
    variables: Any,
    canvases: fv.data.Canvases,
    classes: tuple[str, ...],
    padding: float,
    figures: dict[str, float],
) -> None:
    """Saves the evaluated weights in a form that `flaxvision predict` reads.

    Args:
        folder: Folder for `weights.safetensors` and its card, or for a model from a `.cfg` file, for `model.cfg`,
            `model.weights` and `classes.names`, which darknet reads too.
        built: The detector.
        variables: Its variables.
        canvases: The canvases of the evaluation.
        classes: Names of the classes.
        padding: Value of the padding after normalization.
        figures: The metrics on the test split.
    """
    if built.from_cfg:
        largest = max(canvases.sizes, key=lambda size: size[0] * size[1])
        fv.weights.save_cfg(folder / "model.cfg", built.model.clone(input_size=largest))
        # Readers derive the epsilon of BatchNorm from the version: 1e-5 for that of the fork.
        version = (0, 2, 5) if built.model.epsilon == 1e-5 else (0, 2, 0)
        fv.weights.save_darknet(folder / "model.weights", built.model, variables, version=version)
        (folder / "classes.names").write_text("\n".join(classes) + "\n")
        return
    pixels = {"mean": built.mean, "std": built.std, "padding": padding}
    fv.weights.save(
        folder / "weights.safetensors",
        variables,
        name=built.name,
        class_names=classes,
        metadata={**figures, "canvases": dataclasses.asdict(canvases) | pixels},
        **{k: v for k, v in built.overrides.items() if k not in ("dtype", "ghost_size")},
    )

"""Creates the models of `segment.py`: newly initialized, from weights, or from the weights of a coarser network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from detect_models import with_backbone
from flax.traverse_util import flatten_dict
from segment_recipes import SMALL

import flaxvision as fv
from flaxvision.models.fcn import start_from
from flaxvision.weights.load import load_weights


@dataclasses.dataclass(frozen=True)
class Built:
    """A segmenter with its name, fields, normalization and variables.

    Attributes:
        model: The module.
        name: Its registry name.
        overrides: Overrides that create the module from that name. Checkpoints store them.
        mean: Mean of the pixels for each channel.
        std: Standard deviation of the pixels for each channel.
        variables: Variables to start from; None to initialize new ones.
    """

    model: Any
    name: str
    overrides: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Any = None


def build(config: Any, num_classes: int, channels: int) -> Built:
    """Creates the segmenter that the flags select, with the variables of `--weights` or `--backbone-weights`.

    An FCN on VGG can start from the weights of a coarser FCN or of a VGG (Shelhamer et al. 2017, section 4.2). The
    names of its newly initialized layers are printed.

    Raises:
        ValueError: The weights do not fit the model or the classes.
    """
    name = "unet_same" if config.model == "small" else config.model
    info, fields = fv.model_info(name), fv.model_fields(fv.create_model(name))
    mean, std = info.mean, info.std
    if len(mean) != channels:
        mean, std = (0.5,) * channels, (0.25,) * channels
    overrides: dict[str, Any] = dict(SMALL) if config.model == "small" else {}
    if config.backbone_model:
        known = fv.weights.fields(config.backbone_model, config.source) if config.source else {}
        overrides |= {key: value for key, value in known.items() if key in fields and key != "num_classes"}
    if "aux_heads" in fields:
        overrides["aux_heads"] = config.aux_heads
    overrides |= config.model_overrides(fields, num_classes)
    variables = None
    rng, _ = jax.random.split(jax.random.key(config.seed))  # the key that initializes the state
    coarser = None if config.eval_only or not config.weights else _coarser(name, config.weights)
    if coarser is not None:
        loaded = load_weights(coarser, config.weights)
        overrides = {**loaded.fields, **overrides}
        model = fv.create_model(name, **overrides)
        variables = _extended(model, channels, rng, loaded.variables, f"{coarser} in {config.weights}")
    elif config.weights:
        options = {} if config.eval_only else overrides
        loaded = load_weights(name, config.weights, source=config.source, rng=jax.random.key(config.seed), **options)
        overrides = {**loaded.fields, "dtype": overrides["dtype"]}
        model, variables = loaded.model(), loaded.variables
    else:
        model = fv.create_model(name, **overrides)
        if isinstance(model, fv.models.FCNVGG) and config.backbone_model:
            _, donor = fv.weights.load_model(config.backbone_model, config.backbone_weights, source=config.source)
            variables = _extended(model, channels, rng, donor, f"{config.backbone_model} in {config.backbone_weights}")
        elif config.backbone_model:
            fresh = jax.jit(lambda: model.init(rng, jnp.zeros((1, *info.input_size, channels))))()
            variables = with_backbone(fresh, config.backbone_model, config.backbone_weights, config.source)
    return Built(model, name, overrides, mean, std, variables)


def _coarser(name: str, weights: str) -> str | None:
    """Returns the name of the FCN in a weights file of flaxvision if it has fewer skips than `name`, else None."""
    path, model = Path(weights).expanduser(), fv.create_model(name)
    if not isinstance(model, fv.models.FCNVGG) or path.suffix != ".safetensors" or not path.is_file():
        return None
    if not path.with_suffix(".json").is_file():  # a file of another library
        return None
    stored = fv.weights.read_card(path)["model"]
    other = fv.create_model(stored) if stored in fv.list_models(task="segmentation") else None
    return stored if isinstance(other, fv.models.FCNVGG) and len(other.skips) < len(model.skips) else None


def _extended(model: Any, channels: int, rng: jax.Array, trained: Any, source: str) -> dict[str, Any]:
    """Starts an FCN on VGG from trained variables, and prints the layers that are newly initialized."""
    fresh = jax.jit(lambda: model.init(rng, jnp.zeros((1, 32, 32, channels))))()
    params = start_from(fresh["params"], trained["params"])
    given = flatten_dict(trained["params"], sep="/")
    new = sorted({path.split("/")[0] for path in flatten_dict(params, sep="/") if path not in given} | {"upsample"})
    fv.train.print_once(f"starts from {source}; newly initialized: {', '.join(name for name in new if name in params)}")
    return {**fresh, "params": params}

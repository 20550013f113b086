"""Models by name: every vision model is registered with timm under the prefix ``manyheads_``.

``create_model("davit_tiny", checkpoint="timm/davit_tiny.msft_in1k")`` builds a model and loads published weights in
whichever layout they come; the same names work with ``timm.create_model`` ("manyheads_davit_tiny") and thus in every
tool built on timm.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import nn

from manyheads.models.checkpoints import Convert, load_checkpoint

PREFIX = "manyheads_"
# What timm's builder takes out of the options before the model's constructor sees the rest.
_BUILDER_OPTIONS = (
    "features_only",
    "out_indices",
    "feature_cls",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
)


def create_model(name: str, *, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """A registered model, with the weights of ``checkpoint`` if one is given.

    Args:
        name: "davit_tiny" or "manyheads_davit_tiny"; ``list_models()`` gives all names.
        checkpoint: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, a directory holding one, or a hub id. The
            authors' layout, timm's (where it re-publishes the model) and our own are recognised. Behind a "#", the
            name of one of several sets of weights in the file ("reg800m.pth#model_ema", the averaged ones).
        options: the model's own (``num_classes``, ``in_chans``, ``drop_path_rate``, ...) and timm's ``features_only``
            and ``out_indices``.

    Raises:
        ValueError: unknown name (the nearest one is suggested); as ``CheckpointError``, a file that cannot be read or
            does not fit the model.
        TypeError: an option that the model does not have (the nearest one is suggested).

    >>> model = create_model("davit_tiny", num_classes=10)
    >>> model.num_classes
    10
    """
    full_name = name if name.startswith(PREFIX) else PREFIX + name
    known = list_models()
    if full_name not in known:
        raise ValueError(f"unknown model {name!r}{_nearest(full_name, known)}")
    if checkpoint is not None:
        options["checkpoint"] = checkpoint
    return timm.create_model(full_name, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, with or without the prefix.

    >>> "manyheads_davit_tiny" in list_models("davit*")
    True
    """
    names = timm.list_models(f"{PREFIX}*")
    return [name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name[len(PREFIX) :], pattern)]


def check_classifies(name: str) -> None:
    """Raise ValueError if ``name`` is a registered model without a classifier."""
    full_name = name if name.startswith(PREFIX) else PREFIX + name
    if full_name in list_models() and not timm.get_pretrained_cfg(full_name).classifier:  # pyright: ignore
        raise ValueError(f"model {name!r} has no classifier: images with labels neither train nor judge it")


def register(
    name: str,
    model_class: type[nn.Module],
    options: dict[str, Any],
    *,
    convert: Convert,
    stages: int = 4,
    feature_cls: str = "list",
    **data_config: Any,
) -> Callable[..., nn.Module]:
    """Register one variant, a model class with its options, with timm as ``manyheads_<name>``.

    Args:
        name: the variant, without the prefix.
        model_class: its constructor takes ``options`` and whatever the user overrides.
        options: what makes the variant.
        convert: the model's ``checkpoint_filter_fn``.
        stages: how many feature maps ``features_only`` returns by default, for models without an option ``depths``.
        feature_cls: how timm takes them: "list" rewires the modules named in ``feature_info``, "getter" asks
            ``forward_intermediates``.
        data_config: entries of timm's data configuration that differ from 224 pixels, ImageNet mean and deviation.
    """
    full_name = PREFIX + name
    allowed = [option for option in inspect.signature(model_class).parameters if option != "kwargs"]

    def entry(pretrained: bool = False, checkpoint: str | Path | None = None, **overrides: Any) -> nn.Module:
        for option in overrides:
            if option not in allowed and option not in _BUILDER_OPTIONS:
                near = _nearest(option, [*allowed, *_BUILDER_OPTIONS])
                raise TypeError(f"model {name!r} has no option {option!r}{near}")

        def build(**arguments: Any) -> nn.Module:
            model = model_class(**arguments)
            # Before timm wraps the model for features_only, because the wrapper renames its parameters.
            if checkpoint is not None:
                load_checkpoint(model, checkpoint, convert)
            return model

        merged = {**options, **overrides}
        maps = range(len(merged["depths"]) if "depths" in merged else stages)
        features = {"flatten_sequential": True, "out_indices": tuple(maps), "feature_cls": feature_cls}
        return build_model_with_cfg(
            build, full_name, pretrained, pretrained_filter_fn=convert, feature_cfg=features, **merged
        )

    module = sys.modules[model_class.__module__]
    entry.__name__ = entry.__qualname__ = full_name
    entry.__module__ = model_class.__module__
    entry.__doc__ = f"The variant {name!r} of ``{model_class.__name__}``."
    setattr(module, full_name, entry)
    configs = module.__dict__.setdefault("default_cfgs", {})
    configs.update(generate_default_cfgs({full_name: {**_IMAGENET, **data_config}}))
    return register_with_timm(entry)


_IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0].removeprefix(PREFIX)!r}?" if near else f"; known: {', '.join(names)}"

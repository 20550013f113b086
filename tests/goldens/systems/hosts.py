"""What agent attention and InLine attention share: host backbones built from the authors' configurations."""

from __future__ import annotations

import re

from torch import Tensor

from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.hosts import Host, HostCSwin, HostDeiT, HostDense, HostPVT, HostSwin
from manyheads.models.vision.hosts.common import checkpoint_filter_fn, dense_filter_fn

_RENAMED = {
    "agent_layer": "mixed",
    "depth": "depth",
    "la_split_size": "mixer_split_size",
    "agent_split_size": "mixer_split_size",
    "la_sr_ratios": "mixer_sr_ratios",
    "agent_sr_ratios": "mixer_sr_ratios",
    "kernel_function": "kernel",
    "qk_kernel": "kernel",
}
_PLAIN = (
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "embed_dims", "depths", "num_heads", "mlp_ratio",
    "mlp_ratios", "qkv_bias", "window_size", "attn_type", "sr_ratios", "agent_num", "split_size", "kernel",
)  # fmt: skip


# What only one host's state has, for configurations that name no model.
_MARKS = {"stage1_conv_embed": HostCSwin, "layers": HostSwin, "patch_embed1": HostPVT, "cls_token": HostDeiT}
_LETTERS = {"agent": "A", "inline": "I"}


def build(config: dict, mixer: str, weights: dict[str, Tensor]) -> Host:
    """The host that ``config["model"]`` names or the weights tell, with the mixer in place of its softmax attention."""
    name = str(config.get("model", "")).lower()
    options = {key: config[key] for key in _PLAIN if key in config}
    options |= {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    for key in ("kernel",):
        options[key] = str(options.get(key) or "identity").lower()
    for key, value in list(options.items()):
        if isinstance(value, str) and "-" in value:
            options[key] = [int(part) for part in value.split("-")]
        elif isinstance(value, str) and value.isdigit():
            options[key] = [int(part) for part in value]
    hosts = (HostCSwin, HostSwin, HostPVT, HostDeiT)
    told = (host for host in hosts if host.__name__.removeprefix("Host").lower() in name)
    first = {key.split(".")[0] for key in weights}
    host = next(told, None) or next(host for mark, host in _MARKS.items() if mark in first)
    if "head.weight" in weights or host is not HostDeiT:
        options["num_classes"] = weights["head.weight"].shape[0] if "head.weight" in weights else 0
    if host is HostDeiT:
        options.pop("depths", None)
        options.setdefault("embed_dim", weights["cls_token"].shape[-1])
        options.setdefault("depth", len({key.split(".")[1] for key in weights if key.startswith("blocks.")}))
    elif "depth" in options:
        options["depths"] = options.pop("depth")
    if host is not HostDeiT and "attn_type" not in options:
        options["attn_type"] = _LETTERS[mixer] * len(options.get("depths", (0,) * 4))
    if host is HostPVT:
        options.setdefault("mixer_sr_ratios", (1,) * len(options.get("depths", (0,) * 4)))
    if isinstance(options.get("agent_num"), int) and host is not HostDeiT:
        options["agent_num"] = (options["agent_num"],) * len(options["depths"])
    if host is HostSwin and isinstance(options.get("mlp_ratio"), list):
        options["mlp_ratio"] = options["mlp_ratio"][0]
    if config.get("dense") or "dense" in name or any(re.match(r"norm\d\.", key) for key in weights):
        grids = config.get("agent_grids", config.get("agent_grid", config.get("agent_hw")))
        options |= {"any_size": True, "agent_grids": grids if mixer == "agent" else None}
    return host(mixer=mixer, **options).eval()


def run_model(model: Host, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features before the classifier, logits, maps of the stages; the image's gradient where one is asked for."""
    name = "image" if "image" in given else "x"
    if not any(key.startswith(("norm.", "head.")) for key in weights):
        norms = any(re.match(r"norm\d\.", key) for key in weights)
        stages = [s for s in range(len(model.feature_info)) if not norms or f"norm{s}.weight" in weights]
        dense = HostDense(model, stages, norms=norms).eval()
        load_checkpoint(dense, weights, dense_filter_fn)
        maps = dense(given[name])
        return {f"{kind}{stage}": x for stage, x in enumerate(maps) for kind in ("out", "map", "feature", "stage")}
    load_checkpoint(model, weights, checkpoint_filter_fn)
    grad_out = next((given[key] for key in ("grad_out", "dlogits") if key in given), None)
    image = given[name].requires_grad_(grad_out is not None)
    last, maps = model.forward_intermediates(image)
    outputs = {"features": model.forward_head(last, pre_logits=True), "logits": model.forward_head(last)}
    outputs |= {f"feature{stage}": x for stage, x in enumerate(maps, 1)}
    outputs |= {f"stage{stage}": x for stage, x in enumerate(maps, 1)}
    if grad_out is not None:
        (outputs["logits"] * grad_out).sum().backward()
        outputs[f"d{name}"] = image.grad
    return outputs


def scale_of(config: dict, *names: str, head_dim: int) -> float | None:
    """The scale under one of these names: a number, a power of the head's width ("head_dim**-0.5"), or None."""
    scale = next((config[name] for name in names or ("scale",) if config.get(name) is not None), None)
    if not isinstance(scale, str):
        return None if scale is None else float(scale)
    power = 1.0
    for part in re.findall(r"\*\*\s*\(?\s*(-?[\d.]+)", scale):
        power *= float(part)
    # "scale ** 0.3" is a power of the usual scale, not of the width.
    return head_dim ** (power if re.search(r"head_dim|\bd\b", scale) else -0.5 * power)


def grid_of(config: dict, tokens: int) -> tuple[int, int]:
    """The map's sizes: as configured under one of the usual names, else a square."""
    for rows, columns in (("H", "W"), ("height", "width")):
        if rows in config and columns in config:
            return config[rows], config[columns]
    for name in ("grid", "resolution", "input_resolution", "size"):
        value = config.get(name)
        if isinstance(value, (list, tuple)):
            return value[0], value[1]
        if isinstance(value, int):
            return value, value
    side = int(tokens**0.5)
    return side, tokens // side

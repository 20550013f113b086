"""What agent attention and InLine attention share: host backbones built from the authors' configurations."""

from __future__ import annotations

from torch import Tensor

from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.hosts import Host, HostCSwin, HostDeiT, HostPVT, HostSwin
from manyheads.models.vision.hosts.common import checkpoint_filter_fn

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


def build(config: dict, mixer: str) -> Host:
    """The host that ``config["model"]`` names, with the mixer in place of its softmax attention."""
    name = config["model"].removeprefix("dense_").removesuffix("_dense")
    options = {key: config[key] for key in _PLAIN if key in config}
    options |= {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    for key in ("kernel",):
        options[key] = str(options.get(key) or "identity").lower()
    for key, value in list(options.items()):
        if isinstance(value, str) and "-" in value:
            options[key] = [int(part) for part in value.split("-")]
    host = next(h for h in (HostCSwin, HostSwin, HostPVT, HostDeiT) if h.__name__.removeprefix("Host").lower() in name)
    if host is HostDeiT:
        options.pop("depths", None)
        for key in ("num_heads", "embed_dim", "depth"):
            options[key] = options[key] if key in options else config[key]
    elif "depth" in options:
        options["depths"] = options.pop("depth")
    if isinstance(options.get("agent_num"), int) and host is not HostDeiT:
        options["agent_num"] = (options["agent_num"],) * len(options["depths"])
    if host is HostSwin and isinstance(options.get("mlp_ratio"), list):
        options["mlp_ratio"] = options["mlp_ratio"][0]
    if config.get("dense"):
        options |= {"any_size": True, "agent_grids": config.get("agent_grids", config.get("agent_grid"))}
    return host(mixer=mixer, **options).eval()


def run_model(model: Host, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features before the classifier, logits, maps of the stages; the image's gradient where one is asked for."""
    load_checkpoint(model, weights, checkpoint_filter_fn)
    name = "image" if "image" in given else "x"
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


def scale_of(config: dict) -> float | None:
    """The scale of a configuration: a number, or None for ``head_dim ** -0.5``."""
    scale = config.get("scale")
    return None if scale is None or isinstance(scale, str) else float(scale)


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

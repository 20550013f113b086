"""What the four host backbones share: which blocks hold the exchanged attention, the classifier, timm's interface.

A host is a published backbone (DeiT, PVT, Swin, CSwin) in which some blocks have their softmax attention exchanged for
agent attention or InLine attention ("mixer"). ``attn_type`` has one letter for each stage: A (agent) or I (InLine) for
the mixer, S or B for softmax, M for both, the mixer in as many first blocks as the number at its end says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.agent import AgentAttention
from manyheads.layers.inline import InLineAttention
from manyheads.models.checkpoints import State
from manyheads.models.vision.features import check_image, stage_indices

MIXERS = {"agent": "A", "inline": "I"}
FIRST_CONV = {
    "HostDeiT": "patch_embed.proj",
    "HostPVT": "patch_embed1.proj",
    "HostSwin": "patch_embed.proj",
    "HostCSwin": "stage1_conv_embed.0",
}
Grid = tuple[int, int]


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input; tokens of a map (H, W)."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: int | float, drop: float, path: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(path) if path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Host(nn.Module):
    """The classifier's end of a host and what timm asks of a model; subclasses give ``stages``.

    ``stages(image, last)`` returns, for every stage up to ``last``, its tokens and the sizes of its map. Attributes
    that subclasses set: ``norm`` and ``head``, ``feature_info``, ``stem_pattern`` and ``block_pattern`` of their
    parameter names, ``options`` (the constructor's arguments), ``class_token``.
    """

    class_token = False
    stem_pattern, block_pattern = "", ""
    norm: nn.Module
    head: nn.Module
    feature_info: list[dict[str, Any]]

    def finish(self, in_chans: int, num_classes: int, dims: Sequence[int], options: dict[str, Any]) -> None:
        """The attributes and the initial values that all hosts have; the last call of a constructor."""
        self.in_chans, self.num_classes, self.options = in_chans, num_classes, options
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = float(options["drop_rate"])
        self.grad_checkpointing = False
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Tokens (batch, tokens, channels) and map sizes of every stage up to ``last`` (all for None)."""
        raise TypeError(f"{type(self).__name__} has no stages of its own")

    def through(self, blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor, grid: Grid) -> Tensor:
        """The tokens after these blocks, recomputed in the backward pass if so set."""
        for block in blocks:
            x = recompute(block, x, grid) if self.grad_checkpointing and self.training else block(x, grid)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize what belongs to one image size: position embeddings, agent biases, relative position tables.

        As the authors do when they fine-tune at another resolution: bicubically, agent biases linearly.
        """
        like = next(self.parameters())
        sized = dict(img_size=both_sides(img_size))
        if "window_size" in self.options:
            old, new = both_sides(self.options["img_size"]), both_sides(img_size)
            sized["window_size"] = max(1, self.options["window_size"] * max(new) // max(old))
        fresh = type(self)(**{**self.options, **sized}).to(like.device, like.dtype)
        fresh.load_state_dict(self.resize(self.state_dict(), fresh))
        fresh.train(self.training)
        kept = {name: self.__dict__[name] for name in ("grad_checkpointing", "pretrained_cfg", "default_cfg")
                if name in self.__dict__}  # fmt: skip
        self.__dict__.update({**fresh.__dict__, **kept})

    def position_grids(self) -> dict[str, Grid]:
        """The map of every learned position embedding, by its name; hosts without any have none."""
        return {}

    def resize(self, state: State, model: nn.Module) -> State:
        """A state of this kind of model, its tensors that belong to one image size resized for ``model``."""
        return resize_state(state, model, self.position_grids())

    def no_weight_decay(self) -> set[str]:
        """Position embeddings of DeiT and tables of relative positions are not decayed."""
        ends = ("relative_position_bias_table", "cls_token", "pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": self.stem_pattern, "blocks": [(self.block_pattern, None), (r"^norm", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width; the pooling is the host's own."""
        pool = "token" if self.class_token else "avg"
        check_choice("global_pool", global_pool or pool, (pool,))
        self.num_classes = self.options["num_classes"] = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(next(self.parameters()).device)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages ``indices`` (all for None, the last n for an int); ``norm`` norms the last stage's."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted = stage_indices(len(self.feature_info), indices)
        check_image(x, self.in_chans)
        found = self.stages(x, max(wanted) if stop_early else None)
        maps = []
        for index in wanted:
            tokens, grid = found[index]
            tokens = self.norm(tokens) if norm and index == len(self.feature_info) - 1 else tokens
            tokens = tokens[:, 1:] if self.class_token else tokens
            maps.append(tokens.unflatten(1, grid).permute(0, 3, 1, 2))
        return maps if intermediates_only else (self.norm(found[-1][0]), maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's normed tokens, (batch, tokens, channels)."""
        check_image(x, self.in_chans)
        return self.norm(self.stages(x)[-1][0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token or the mean over tokens, then the classifier; ``pre_logits`` stops before it."""
        pooled = F.dropout(x[:, 0] if self.class_token else x.mean(1), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class HostDense(nn.Module):
    """A host as detection and segmentation heads want it: the maps of its stages, no classifier.

    Args:
        model: the trunk, usually made with ``any_size``; its classifier is dropped.
        out_indices: the stages whose maps are returned.
        norms: a LayerNorm for each of them (``norm0``, ...), as dense Swin has and dense PVT has not.

    >>> import torch
    >>> from manyheads.models import create_model
    >>> trunk = create_model("agent_pvt_tiny", img_size=64, depths=(1, 1, 1, 1), any_size=True)
    >>> [tuple(x.shape) for x in HostDense(trunk, (0, 3))(torch.randn(1, 3, 72, 64))]
    [(1, 64, 18, 16), (1, 512, 2, 2)]
    """

    def __init__(self, model: Host, out_indices: Sequence[int] = (0, 1, 2, 3), *, norms: bool = False) -> None:
        super().__init__()
        self.out_indices = tuple(out_indices)
        self.feature_info = [model.feature_info[stage] for stage in self.out_indices]
        model.norm, model.head = nn.Identity(), nn.Identity()
        self.trunk = model
        for stage, info in zip(self.out_indices, self.feature_info):
            self.add_module(f"norm{stage}", nn.LayerNorm(info["num_chs"]) if norms else nn.Identity())

    def forward(self, x: Tensor) -> list[Tensor]:
        check_image(x, self.trunk.in_chans)
        found = self.trunk.stages(x, max(self.out_indices))
        maps = []
        for stage in self.out_indices:
            tokens, grid = found[stage]
            maps.append(self.get_submodule(f"norm{stage}")(tokens).unflatten(1, grid).permute(0, 3, 1, 2))
        return maps


def mixed_blocks(attn_type: str, mixer: str, depths: Sequence[int]) -> list[list[bool]]:
    """For every block of every stage, whether it holds the mixer.

    Raises:
        ValueError: an unknown mixer, letters that it does not have, another number of letters than stages, an M
            without a number or a number without an M.

    >>> mixed_blocks("IIMS2", "inline", (1, 1, 3, 1))
    [[True], [True], [True, True, False], [False]]
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    parts = re.fullmatch(rf"([{MIXERS[mixer]}SBM]+)(\d*)", attn_type)
    if parts is None or len(parts[1]) != len(depths) or ("M" in parts[1]) != bool(parts[2]):
        raise ValueError(
            f"attn_type={attn_type!r} must have a letter for each of {len(depths)} stages, {MIXERS[mixer]} ({mixer}), "
            "S or B (softmax) or M (both), and with an M, and only then, the number of mixed blocks at its end"
        )
    first = {MIXERS[mixer]: max(depths), "M": int(parts[2] or 0)}
    return [[block < first.get(letter, 0) for block in range(depth)] for letter, depth in zip(parts[1], depths)]


def mixer_attention(
    mixer: str, dim: int, heads: int, grid: Grid, *, agents: int, kernel: str = "identity", **options: Any
) -> nn.Module:
    """The layer that stands where softmax attention stood; ``options`` are those of both kinds of layers."""
    if mixer == "agent":
        return AgentAttention(dim, heads, grid, agents=agents, **options)
    known = ("class_token", "fused", "qkv_bias", "proj_drop")
    if options.get("reduction", 1) > 1:
        raise ValueError(f"InLine attention has no key reduction, got {options['reduction']}; take 1 in its stages")
    return InLineAttention(dim, heads, kernel=kernel, **{name: options[name] for name in known if name in options})


def path_rates(rate: int | float, blocks: int) -> Iterator[float]:
    """Stochastic depth of every block, rising from 0."""
    return iter(torch.linspace(0, rate, blocks, device="cpu").tolist())


def check_stages(**named: Sequence) -> None:
    """Raise ValueError unless all sequences have the same length."""
    if len({len(value) for value in named.values()}) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in named.items())
        raise ValueError(f"{listed} differ in length")


def agents_of(mixer: str, agent_num: Sequence[int], depths: Sequence[int]) -> Sequence[int]:
    """The agents of each stage; InLine attention has none, so that any number of stages needs no option for them."""
    return agent_num if mixer == "agent" else (1,) * len(depths)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout: buffers that are computed here are dropped, another image size's tables are resized."""
    state = {
        name: value for name, value in state.items() if not name.endswith(("attn_mask", "relative_position_index"))
    }
    if getattr(model, "num_classes", 1) == 0:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    return resize_state(state, model)


def dense_filter_fn(state: State, model: HostDense) -> State:
    """The backbone of the authors' detectors and segmenters, with or without its prefix: all but ``norm0``, ... is the
    trunk's; what belongs to the detector is left out.
    """
    inner = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    norms = {name: value for name, value in (inner or state).items() if re.match(r"norm\d+\.", name)}
    trunk = {name: value for name, value in (inner or state).items() if name not in norms}
    trunk = {name: value for name, value in trunk.items() if not name.startswith(("norm.", "head."))}
    return norms | {f"trunk.{name}": value for name, value in checkpoint_filter_fn(trunk, model.trunk).items()}


def resize_state(state: State, model: nn.Module, grids: dict[str, Grid] | None = None) -> State:
    """Tensors that belong to another image size, resized to the model's; other differences are left as they are.

    Agent biases of rows and columns are resized linearly, position embeddings (their grid, not a class token's),
    relative position tables and patch kernels bicubically. A classifier of another width starts at zero. ``grids``
    names the maps that position embeddings of ``state`` belong to; without it, those of another length are of squares.
    """
    wanted, targets = model.state_dict(), model.position_grids() if isinstance(model, Host) else {}
    grids = grids or {}
    resized: State = {}
    for name, value in state.items():
        target = wanted.get(name)
        # Maps of 4 x 8 and of 8 x 4 places have position embeddings of one shape.
        same_map = grids.get(name) == targets.get(name) or name not in grids
        if target is None or (target.shape == value.shape and same_map) or target.ndim != value.ndim:
            resized[name] = value
        elif re.search(r"(ah|aw|ha|wa)_bias$", name) and target.shape[1] == value.shape[1]:
            resized[name] = _resize_lines(value, tuple(target.shape))
        elif name.endswith("relative_position_bias_table") and target.shape[1] == value.shape[1]:
            old, new = (isqrt(table.shape[0]) for table in (value, target))
            resized[name] = _resize_map(value[None], (old, old), (new, new))[0]
        elif name in targets and target.shape[-1] == value.shape[-1]:
            extra = int(bool(getattr(model, "class_token", False)))
            side = isqrt(value.shape[1] - extra)
            places = _resize_map(value[:, extra:], grids.get(name, (side, side)), targets[name])
            resized[name] = torch.cat([value[:, :extra], places], dim=1)
        elif re.search(r"patch_embed\d*\.proj\.weight$", name) and target.shape[:2] == value.shape[:2]:
            size = tuple(target.shape[2:])
            resized[name] = F.interpolate(value.float(), size, mode="bicubic", align_corners=False).to(value.dtype)
        elif name.startswith("head."):
            resized[name] = torch.zeros_like(target)
        else:
            resized[name] = value
    return resized


def _resize_lines(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Agent biases (1, heads, ., ., .) along the one axis whose length differs."""
    axis = next(axis for axis in count(2) if value.shape[axis] != shape[axis])
    moved = value.movedim(axis, -1)
    flat = F.interpolate(moved.reshape(1, -1, moved.shape[-1]).float(), shape[axis], mode="linear", align_corners=False)
    return flat.view(*moved.shape[:-1], shape[axis]).movedim(-1, axis).to(value.dtype)


def _resize_map(value: Tensor, old: Grid, new: Grid) -> Tensor:
    """(1, places, channels) bicubically from one map to another; as it is where its places are not the old map's."""
    if old[0] * old[1] != value.shape[1]:
        return value
    maps = value.unflatten(1, old).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, new, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(value.dtype)


def keep_options(scope: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from its ``locals()``."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

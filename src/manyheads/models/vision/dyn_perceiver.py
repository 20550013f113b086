"""Dynamic Perceiver: a convolutional branch for the image, a branch of latent tokens for its class, and early exits.

    x = stem(image);  Z = read(Z_0, x);  Z = self(Z);  x = stage_1(x)
    for i = 2, 3, 4:   Z = widen(shrink(Z));  x = write(x, Z);  Z = read(Z, x);  Z = self(Z);  x = stage_i(x)
    read(Z, x)  = cross layer from Z to the 7 x 7 pooled map x + DW7x7(x)
    write(x, Z) = cross layer from the positions of x to Z

    exit 1   mean Z_3 -> logits            exit 3   mean x -> logits
    exit 2   mean Z_4, exit 1 -> logits    exit 4   mean write(x, Z), mean Z_4, exit 2 -> logits

The exits of the latent branch do not force the early maps to be linearly separable. Exits 2 and 4 also read the logits
of the latent exit before them ("forward knowledge transfer"). ``step`` computes what lies between two exits;
``manyheads.models.early_exit`` stops there for images that are decided.

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.latent import CrossLayer, SelfLayer
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.dyn_perceiver_checkpoints import checkpoint_filter_fn
from manyheads.models.vision.dyn_perceiver_cnn import REGNETS, build_branch
from manyheads.models.vision.dyn_perceiver_exits import EXITS, Exits, joined
from manyheads.models.vision.features import check_image, stage_indices
from manyheads.objectives.self_distillation import self_distillation_loss

POOLED = 7
SMALLEST = 32
DEPTHS = (3, 3, 9, 3)

Step = tuple[Tensor | None, Tensor, Tensor, Tensor | None]


class Stage(nn.Module):
    """What both branches do in a stage: ``exchange`` between them, then the stage of the convolutional branch."""

    def __init__(
        self,
        cnn: nn.Module,
        dim: int,
        tokens: int,
        latent: Sequence[nn.Module],
        *,
        previous_dim: int = 0,
        read: bool = True,
        conv: bool = True,
        write: bool = True,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        first = not previous_dim
        self.shrink = None if first else nn.Sequential(nn.LayerNorm(2 * tokens), nn.Linear(2 * tokens, tokens))
        self.widen = None if first else nn.Sequential(nn.LayerNorm(previous_dim), nn.Linear(previous_dim, dim))
        self.write = CrossLayer(dim, dim, qk_dim=dim // 8) if write and not first else None
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim) if conv and (read or first) else None
        self.read = CrossLayer(dim, dim, keys=POOLED**2) if read or first else None
        self.latent = nn.ModuleList(latent)
        self.cnn = cnn

    def exchange(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, C, X, Y) and latents of the stage before to both of this stage, before its convolutions."""
        if self.shrink is not None and self.widen is not None:
            z = self.widen(self.shrink(z.mT).mT)
        if self.write is not None:
            x = write_map(self.write, x, z)
        if self.read is not None:
            source = x if self.conv is None else x + self.conv(x)
            z = self.read(z, F.adaptive_avg_pool2d(source, POOLED).flatten(2).mT)
        for layer in self.latent:
            z = self._run(layer, z)
        return x, z

    def convolve(self, x: Tensor) -> Tensor:
        """The stage of the convolutional branch."""
        for block in self.cnn.children():
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return recompute(block, x) if self.grad_checkpointing and self.training else block(x)


class DynPerceiver(Backbone):
    """The Dynamic Perceiver classifier and backbone, for images of any size from 32 pixels.

    In training it returns the logits of its four exits, in evaluation those of the last one; ``forward_exits`` always
    gives all. As a backbone it gives the maps of its convolutional branch.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifiers; 0 leaves them away.
        cnn: the convolutional branch, one of ``manyheads.models.vision.dyn_perceiver_cnn.FAMILIES``.
        width: factor on the branch's channels (MobileNetV3 and ResNet).
        num_latents: latent tokens M of the first stage, halved from stage to stage; a multiple of 8.
        num_heads: attention heads of the four stages' self layers.
        mlp_ratio: width of the self layers' MLPs over their tokens'.
        depth_factor: factors on the numbers of self layers, 3, 3, 9 and 3.
        read, write: exchange between the branches in stages 2 to 4, image to latents and back (x2z, z2x).
        read_conv: the depthwise convolution in front of the pooling (dwc).
        last_write: the exchange behind stage 4.
        transfer: exits 2 and 4 read the logits of the latent exit before (forward knowledge transfer, isc).
        distillation: weight of the self-distillation in ``training_loss``; 0 has none.
        temperature: of the self-distillation.
        drop_rate: dropout of exits 3 and 4.
        drop_path_rate: stochastic depth of ResNet's last block, rising linearly from 0.
        cnn_classes: width of exit 3, None for ``num_classes``. The authors' RegNets and ResNets always have 1,000
            there; their files with other ``num_classes`` load with ``cnn_classes=1000``.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: four values are needed and others given, a number of latents that is no multiple of 8, heads that
            do not divide a stage's width, an unknown branch; in ``forward``, an image below 32 pixels or with another
            number of channels.

    Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248.

    >>> import torch
    >>> model = DynPerceiver(cnn="mobilenet_v3", width=0.5, num_latents=16, mlp_ratio=1, num_classes=10).eval()
    >>> [tuple(logits.shape) for logits in model.forward_exits(torch.randn(1, 3, 64, 48))]
    [(1, 10), (1, 10), (1, 10), (1, 10)]
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        cnn: str = "regnet_y_800mf",
        width: int | float = 1,
        num_latents: int = 128,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: int = 4,
        depth_factor: Sequence[int] = (1, 1, 1, 1),
        read: bool = True,
        write: bool = True,
        read_conv: bool = True,
        last_write: bool = True,
        transfer: bool = True,
        distillation: int | float = 0.5,
        temperature: int | float = 1.0,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
        cnn_classes: int | None = None,
    ) -> None:
        super().__init__()
        if len(depth_factor) != 4 or len(num_heads) != 4:
            raise ValueError(f"depth_factor={depth_factor} and num_heads={num_heads} must have a value for each stage")
        if num_latents < 8 or num_latents % 8:
            raise ValueError(f"num_latents={num_latents} must be a multiple of 8: three stages halve it")
        branch = build_branch(cnn, width, in_chans, drop_path_rate)
        dims = branch.widths
        self.in_chans, self.num_classes = in_chans, num_classes
        self.distillation, self.temperature = distillation, temperature
        self.stem = branch.stem
        self.latent = nn.Parameter(torch.empty(num_latents, dims[0]))
        with torch.no_grad():
            self.latent.normal_(0.0, 0.02).clamp_(-2.0, 2.0)
        self.stages = nn.ModuleList(
            Stage(
                branch.stages[i],
                dims[i],
                num_latents // 2**i,
                [
                    SelfLayer(dims[i], num_heads[i], mlp_ratio=mlp_ratio)
                    for _ in range(DEPTHS[i] * depth_factor[i])
                ],
                previous_dim=dims[i - 1] if i else 0,
                read=read,
                conv=read_conv,
                write=write,
            )
            for i in range(4)
        )  # fmt: skip
        self.last_write = CrossLayer(dims[4], dims[3], qk_dim=dims[4] // 8) if last_write else None
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims[1:], branch.reductions))
        ]
        self.num_features = dims[4]
        self._exit_options = ((dims[2], dims[3], dims[4]), branch.hidden, drop_rate, transfer)
        self.exits = Exits(num_classes, cnn_classes or num_classes, *self._exit_options) if num_classes else None

    @property
    def head_hidden_size(self) -> int:
        """Width of what the last exit reads."""
        (_, fourth, last), *_, transfer = self._exit_options
        return last + fourth * (1 + (transfer and self.exits is not None))

    def step(self, index: int, x: Tensor, z: Tensor | None = None, hint: Tensor | None = None) -> Step:
        """What lies between exit ``index`` - 1 and exit ``index`` (0 to 3), for the images that are still undecided.

        Args:
            index: the exit to reach.
            x: the image for exit 0, then what the step before returned, likewise ``z`` and ``hint``.
            z: the latents.
            hint: logits that the next latent exit reads.

        Returns:
            The exit's logits (None without classifiers), and x, z and hint for the next step. All are batches of the
            same images, of which any may be left out before the next step.
        """
        if index == 0:
            x, latents = self._start(x)
            for stage in self._list()[:2]:
                x, latents = stage.exchange(x, latents)
                x = stage.convolve(x)
            x, latents = self._list()[2].exchange(x, latents)
            logits = None if self.exits is None else self.exits.read_first(latents)
            return logits, x, latents, logits
        if not 0 < index < EXITS:
            raise ValueError(f"step({index}): the exits are 0 to {EXITS - 1}")
        if z is None:
            raise ValueError(f"step({index}) needs the latents that step({index - 1}) returned")
        third, fourth = self._list()[2:]
        if index == 1:
            x, z = fourth.exchange(third.convolve(x), z)
            logits = None if self.exits is None or hint is None else self.exits.read_latents(z, hint)
            return logits, x, z, logits
        if index == 2:
            x = fourth.convolve(x)
            return None if self.exits is None else self.exits.read_map(x), x, z, hint
        x = x if self.last_write is None else write_map(self.last_write, x, z)
        return None if self.exits is None else self.forward_head((x, z, hint)), x, z, hint

    def forward_exits(self, image: Tensor, last: int = EXITS) -> tuple[Tensor, ...]:
        """Logits of the first ``last`` exits: latents of stage 3, of stage 4, the map, both together."""
        if self.exits is None:
            raise ValueError("a model with num_classes=0 has no exits")
        if not 1 <= last <= EXITS:
            raise ValueError(f"last={last} must be between 1 and {EXITS}")
        found, x, z, hint = [], image, None, None
        for index in range(last):
            logits, x, z, hint = self.step(index, x, z, hint)
            found.append(logits)
        return tuple(found)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The last map, the last latents and the logits of exit 2, which the last exit reads together."""
        _, x, z, hint = self.step(0, x)
        _, x, z, hint = self.step(1, x, z, hint)
        x = self._list()[3].convolve(x)
        return (x if self.last_write is None else write_map(self.last_write, x, z)), z, hint

    def forward_head(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: tuple[Tensor, Tensor, Tensor | None], pre_logits: bool = False
    ) -> Tensor:
        """The last exit, from what ``forward_features`` gives; ``pre_logits`` stops before the classifier."""
        last_map, z, hint = x
        features = joined([last_map.mean((2, 3)), z.mean(1)], getattr(self.exits, "transfer4", None), hint)
        return features if pre_logits or self.exits is None else self.exits.read_all(features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of the last exit; in training, of all."""
        if self.training and self.exits is not None:
            return self.forward_exits(x)
        return self.forward_head(self.forward_features(x))

    def training_loss(self, outputs: tuple[Tensor, ...], targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What training minimises, from the four logits: ``self_distillation_loss``."""
        return self_distillation_loss(
            outputs, targets, alpha=self.distillation, temperature=self.temperature, label_smoothing=label_smoothing
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the convolutional branch behind the stages ``indices``, the last one with what the latents wrote.

        Args:
            x: images (batch, in_chans, height, width).
            indices: which stages: all for None, the last n for an int.
            norm: without effect, the model has no norm behind its stages.
            stop_early: run no stage after the last one wanted.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone, not the pair (final map, maps).
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted = stage_indices(len(self.feature_info), indices)
        if max(wanted) >= len(self.stages):
            raise ValueError(f"indices={indices}: the model is pruned to {len(self.stages)} stages")
        maps = []
        x, z = self._start(x)
        for index, stage in enumerate(self._list()[: max(wanted) + 1] if stop_early else self._list()):
            x, z = stage.exchange(x, z)
            x = stage.convolve(x)
            if index == 3 and self.last_write is not None:
                x = write_map(self.last_write, x, z)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and the exits."""
        wanted = stage_indices(len(self.stages), indices)
        self.stages = self.stages[: max(wanted) + 1]
        if len(self.stages) < 4:
            self.last_write = None
        if prune_head:
            self.exits, self.num_classes = None, 0
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(?:latent|cnn)\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        )
        return {"stem": r"^stem|^latent", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear layer of the last exit."""
        return nn.Identity() if self.exits is None else self.exits.merge[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh exits of another width; the pooling is always the mean."""
        check_choice("global_pool", global_pool or "avg", ("avg",))
        self.num_classes = num_classes
        exits = Exits(num_classes, num_classes, *self._exit_options) if num_classes else None
        self.exits = None if exits is None else exits.to(self.latent.device).train(self.training)

    def _start(self, image: Tensor) -> tuple[Tensor, Tensor]:
        check_image(image, self.in_chans)
        if min(image.shape[2:]) < SMALLEST:
            size = f"{image.shape[2]} x {image.shape[3]}"
            raise ValueError(f"image is {size} pixels; its last stage needs sides of at least {SMALLEST}")
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        return x, self.latent.repeat(image.shape[0], 1, 1)

    def _list(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))


def write_map(layer: CrossLayer, x: Tensor, z: Tensor) -> Tensor:
    """The map (batch, C, X, Y) after each of its positions has read the latents (z2x)."""
    tokens = x.permute(0, 2, 3, 1)
    return layer(tokens.flatten(1, 2), z).unflatten(1, tokens.shape[1:3]).permute(0, 3, 1, 2)


WIDTHS = {
    "mobilenet_v3": {"0x5": 0.5, "0x75": 0.75, "1x0": 1.0, "1x25": 1.25, "1x5": 1.5},
    "resnet50": {"0x375": 0.375, "0x5": 0.5, "0x625": 0.625, "0x75": 0.75, "1x0": 1.0},
}
VARIANTS = {
    **{f"dyn_perceiver_{cnn}": {"cnn": cnn, "depth_factor": (1, 1, 1, 2)} for cnn in REGNETS},
    **{
        f"dyn_perceiver_mobilenet_v3_{name}": {
            "cnn": "mobilenet_v3", "width": width, "depth_factor": (1, 1, 1, 3), "drop_rate": 0.2,
        }
        for name, width in WIDTHS["mobilenet_v3"].items()
    },
    **{
        f"dyn_perceiver_resnet50_{name}": {"cnn": "resnet50", "width": width, "drop_rate": 0.2}
        for name, width in WIDTHS["resnet50"].items()
    },
}  # fmt: skip
for _name, _variant in VARIANTS.items():
    register(
        _name,
        DynPerceiver,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="stem.0" if "resnet" in _name or "regnet" in _name else "stem.0.0",
        classifier="exits.merge.4" if "mobilenet" in _name else "exits.merge.1",
        crop_pct=0.875,
    )

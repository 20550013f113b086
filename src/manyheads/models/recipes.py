"""How the vision models were trained: one small record a model, with the numbers of its paper and code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from manyheads.models.registry import PREFIX


@dataclass(frozen=True)
class Recipe:
    """AdamW or SGD, linear warm-up, cosine decay, timm's augmentations.

    Attributes:
        optimizer: "adamw", or "sgd" with Nesterov momentum of 0.9.
        lr: peak learning rate for 1,024 images a step.
        linear_scaling: other batches scale the learning rates linearly; False takes them as they are.
        epochs, warmup_epochs, cooldown_epochs: length of the training, and of its parts in which the rate rises and in
            which it stays at its lowest.
        warmup_lr, min_lr: where the rate starts and ends, likewise.
        weight_decay: on matrices and kernels only.
        clip_grad: largest norm of the gradient; 0 does not clip.
        adaptive_clip: largest norm of a row of the gradient in units of its weights' norm, in all layers but the
            classifier; 0 does not clip (arXiv 2102.06171).
        drop_path: stochastic depth of the last block.
        label_smoothing: share of the target spread over all classes.
        auto_augment: timm's name of a RandAugment policy; "" has none.
        mixup, cutmix: their beta distributions' parameters; 0 has none. A batch gets one or the other evenly.
        random_erasing: probability.
        color_jitter: strength; used where there is no ``auto_augment``.
        crop_scale: smallest share of the image's area that a random crop keeps.
        crop_padding: pixels around the image within which a crop of its full size is shifted; such a crop and the
            mirror take the place of all other augmentations of single images. 0 has none.
        affine: largest rotation in degrees, shift as a share of the side, and shear in degrees; they, ``intensity`` and
            the mirror take the place of the other augmentations of single images. () has none.
        intensity: with ``affine``, largest relative change of all values' scale, and shift of them (1 is white).
        hflip: probability of a mirror image.
        crop_pct: share of the image's side that evaluation keeps (224 of 256 pixels is 0.875).
        diversification: weight of the attention diversification loss, see ``manyheads.objectives.diversification``.
        patch_augmentation: probability of each change to single patches of an image (``augment_patches``). A step has a
            second pass on images changed so, without the diversification loss; its loss adds to the first one's. 0 has
            no such pass.
        head_balance: weight of the load-balancing loss, in models whose tokens choose their heads.
        repeats: differently augmented copies of an image (``RepeatedAugmentation``).
        balanced: every class is as frequent as any other (``BalancedClasses``).
        ema: decay of the averaged weights, which are judged and saved; 0 has none.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    linear_scaling: bool = True
    epochs: int = 300
    warmup_epochs: int = 5
    cooldown_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    adaptive_clip: float = 0.0
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25
    color_jitter: float = 0.4
    crop_scale: float = 0.08
    crop_padding: int = 0
    affine: tuple[int | float, ...] = ()
    intensity: tuple[float, float] = (0.0, 0.0)
    hflip: float = 0.5
    crop_pct: float = 0.875
    diversification: float = 0.0
    patch_augmentation: float = 0.0
    head_balance: float = 0.01
    repeats: int = 1
    balanced: bool = False
    ema: float = 0.0


# arXiv 2204.03645; arXiv 2303.08810 (without the averaged weights, which its evaluation does not use).
_DAVIT = Recipe(
    epochs=310, cooldown_epochs=10, clip_grad=1.0, auto_augment="rand-m9-n2-mstd0.5-inc1", crop_pct=0.9
)  # fmt: skip
_BIFORMER = Recipe(repeats=3)
# arXiv 2204.07143 and 2209.15001.
_NAT = Recipe(epochs=310, cooldown_epochs=10, warmup_epochs=20, min_lr=5e-6, clip_grad=5.0, drop_path=0.2)
# arXiv 2205.13213; the offsets of its mergings learn at a hundredth of the rate (``LITv2.lr_scales``).
_LITV2 = Recipe(warmup_epochs=20, clip_grad=5.0, drop_path=0.2)
# arXiv 2204.01697: batches of 4,096 (10,000 steps of warm-up are 32 epochs), no CutMix, no erasing; at 384 and 512
# pixels 30 epochs at one rate with batches of 512.
_MAXVIT = Recipe(
    lr=7.5e-4, warmup_epochs=32, warmup_lr=1e-8, min_lr=2.5e-6, clip_grad=1.0, drop_path=0.2,
    auto_augment="rand-m15-n2", cutmix=0.0, random_erasing=0.0, crop_pct=0.95, ema=0.9999,
)  # fmt: skip
_MAXVIT_TUNED = dataclasses.replace(
    _MAXVIT, lr=1e-4, epochs=30, warmup_epochs=0, min_lr=1e-4, weight_decay=1e-8, crop_pct=1.0
)
_MAXVIT_DROP = {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6, "xlarge": 0.6}
# arXiv 2311.17132; its learning rate is the same for every batch.
_TRANSNEXT = Recipe(linear_scaling=False, clip_grad=1.0, drop_path=0.15, repeats=3)
_TRANSNEXT_384 = dataclasses.replace(
    _TRANSNEXT, lr=1e-5, min_lr=1e-5, warmup_lr=1e-5, epochs=5, warmup_epochs=0, cutmix=0.0, drop_path=0.7, crop_pct=1.0
)
# arXiv 2410.11842: the backbone's own, with the default weight of the load-balancing loss.
_MOH_SMALL, _MOH_BASE = (dataclasses.replace(_TRANSNEXT, drop_path=drop) for drop in (0.45, 0.6))
# arXiv 2401.16456, batches of 2,048; without the averaged weights, which its evaluation does not use.
_SHVIT = Recipe(lr=2e-3, min_lr=5e-6, drop_path=0.0, adaptive_clip=0.02, repeats=3)
# arXiv 2312.08874 and 2412.06590 share one program. CSwin's average decays by 0.9996 to the power of the images a step
# over 4,096 in the latter (1,024 images, for the base 512).
_HOST = Recipe(warmup_epochs=20, clip_grad=5.0)
_HOST_PVT = dataclasses.replace(
    _HOST, epochs=310, cooldown_epochs=10, warmup_epochs=5, warmup_lr=2e-6, min_lr=2e-5, clip_grad=0.0
)
_HOST_CSWIN = dataclasses.replace(
    _HOST, epochs=310, cooldown_epochs=10, warmup_lr=2e-6, min_lr=2e-5, clip_grad=0.0, ema=0.9999
)
_CSWIN_BASE_EMA = 0.99995
_AGENT_CSWIN_EMA = {"tiny": 0.99984, "small": 0.99984, "base": 0.99992, "base_384": 0.9998}
_HOST_SIZES = {
    "pvt_tiny": _HOST_PVT,
    "pvt_small": _HOST_PVT,
    "pvt_medium": dataclasses.replace(_HOST_PVT, clip_grad=1.0, drop_path=0.3),
    "pvt_large": dataclasses.replace(_HOST_PVT, clip_grad=1.0, drop_path=0.3),
    "swin_tiny": dataclasses.replace(_HOST, drop_path=0.2),
    "swin_small": dataclasses.replace(_HOST, drop_path=0.3),
    "swin_base": dataclasses.replace(_HOST, drop_path=0.5),
    "swin_base_384": dataclasses.replace(
        _HOST, lr=2e-5, linear_scaling=False, epochs=30, warmup_epochs=5, weight_decay=1e-8, drop_path=0.5, crop_pct=1.0
    ),
    "cswin_tiny": dataclasses.replace(_HOST_CSWIN, drop_path=0.2),
    "cswin_small": dataclasses.replace(_HOST_CSWIN, drop_path=0.4),
    "cswin_base": dataclasses.replace(_HOST_CSWIN, weight_decay=0.1, drop_path=0.5, ema=_CSWIN_BASE_EMA),
    "cswin_base_384": dataclasses.replace(
        _HOST_CSWIN,
        lr=5e-6,
        linear_scaling=False,
        epochs=30,
        cooldown_epochs=10,
        warmup_epochs=0,
        weight_decay=1e-8,
        drop_path=0.7,
        ema=_CSWIN_BASE_EMA,
    ),
}
# arXiv 2304.06446: 320 epochs and 10 at the lowest rate; the hierarchical models without their token labels, which need
# an annotator's label maps (``manyheads.objectives.token_label`` has the loss).
_SPECTFORMER = Recipe(epochs=330, cooldown_epochs=10, clip_grad=1.0, random_erasing=0.0, drop_path=0.0, crop_pct=0.9)
_SPECTFORMER_PYRAMID = Recipe(epochs=310, drop_path=0.1, crop_pct=0.9)
# arXiv 2103.12731: 350 epochs by SGD with batches of 4,096; rate and decay are the usual ones of ResNets, 0.1 for 256
# images and 4e-5, and of averaged weights 0.9999.
_HALONET = Recipe(
    optimizer="sgd", lr=0.4, warmup_lr=1e-3, min_lr=0.0, weight_decay=4e-5, epochs=350, cutmix=0.0, mixup=0.0,
    random_erasing=0.0, crop_pct=0.95, ema=0.9999,
)  # fmt: skip
# arXiv 2403.02411: Adam at one rate, batches of 128. Its program shifts and mirrors the test images too; ours does not.
_NINFORMER = Recipe(
    linear_scaling=False, epochs=100, warmup_epochs=0, warmup_lr=1e-3, min_lr=1e-3, weight_decay=0.0, drop_path=0.0,
    label_smoothing=0.0, auto_augment="", mixup=0.0, cutmix=0.0, random_erasing=0.0, color_jitter=0.0, crop_padding=4,
    crop_pct=1.0,
)  # fmt: skip
# arXiv 2304.03282 trains as DeiT does.
_DEPENDENCY = Recipe(crop_pct=0.9, repeats=3)
# arXiv 2303.11126. FAN: batches of 4,096, its averaged weights with timm's usual decay; its program cannot augment
# patches, RVT's does.
_FAN_TAP = Recipe(
    warmup_epochs=10, warmup_lr=2.5e-7, min_lr=2.5e-7, drop_path=0.35, auto_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.3, crop_pct=1.0, diversification=1.0, ema=0.9998,
)  # fmt: skip
_RVT_TAP = Recipe(diversification=1.0, patch_augmentation=0.1)
# arXiv 2309.12424 names epochs and optimiser only: the rest is LightViT's (arXiv 2207.05557).
_DUALTOKEN = Recipe(
    warmup_epochs=20, warmup_lr=1e-7, min_lr=1e-6, weight_decay=0.04, mixup=0.2, color_jitter=0.3, crop_pct=0.9
)
# arXiv 2306.11248: its loss is the model's own (``DynPerceiver.training_loss``).
_DYN_PERCEIVER = Recipe(warmup_epochs=20, min_lr=1e-6, drop_path=0.0, ema=0.9999)
_DYN_PERCEIVER_RESNET = dataclasses.replace(_DYN_PERCEIVER, lr=6e-4, drop_path=0.2)
# arXiv 2303.13755, the 45 epochs after the predictors' 5, from the weights of a trained model, 8 x 168 images a step.
_SPARSIFINER = Recipe(lr=8e-5, min_lr=2e-6, linear_scaling=False, epochs=45, warmup_epochs=3)
# arXiv 2110.06063: Adam without decay at one rate, whatever the batch (16); shifts of 20 of 480 pixels, a shear of 0.15
# (radians). The number of epochs is not published, nor are the weights of the classes, which are left out.
_MEDUSA = Recipe(
    lr=1e-4, linear_scaling=False, epochs=50, warmup_epochs=0, warmup_lr=1e-4, min_lr=1e-4, weight_decay=0.0,
    drop_path=0.0, label_smoothing=0.0, auto_augment="", mixup=0.0, cutmix=0.0, random_erasing=0.0,
    affine=(5.0, 1 / 24, 8.6), intensity=(0.1, 10 / 255), balanced=True, crop_pct=1.0,
)  # fmt: skip
RECIPES = {
    **{f"dyn_perceiver_regnet_y_{size}": _DYN_PERCEIVER for size in ("400mf", "800mf", "1_6gf", "3_2gf")},
    **{
        f"dyn_perceiver_mobilenet_v3_{width}": dataclasses.replace(_DYN_PERCEIVER, epochs=600)
        for width in ("0x5", "0x75", "1x0", "1x25", "1x5")
    },
    **{f"dyn_perceiver_resnet50_{width}": _DYN_PERCEIVER_RESNET for width in ("0x375", "0x5", "0x625", "0x75", "1x0")},
    **dict.fromkeys(("halonet26t", "lamhalobotnet50ts", "halo2botnet50ts"), _HALONET),
    **dict.fromkeys(
        ("halonet50ts", "sehalonet33ts", "eca_halonext26ts", "haloregnetz_b"),
        dataclasses.replace(_HALONET, crop_pct=0.94),
    ),
    **{f"{mixer}_{size}": recipe for mixer in ("agent", "inline") for size, recipe in _HOST_SIZES.items()},
    **{
        f"agent_cswin_{size}": dataclasses.replace(_HOST_SIZES[f"cswin_{size}"], ema=decay)
        for size, decay in _AGENT_CSWIN_EMA.items()
    },
    "agent_deit_tiny": dataclasses.replace(_HOST, drop_path=0.0),
    "agent_deit_base": dataclasses.replace(_HOST, drop_path=0.3),
    "agent_pvt_medium_256": dataclasses.replace(_HOST_PVT, clip_grad=1.0, drop_path=0.3),
    "agent_swin_small_288": dataclasses.replace(_HOST, drop_path=0.3),
    **{
        f"shvit_s{size}": dataclasses.replace(_SHVIT, weight_decay=decay)
        for size, decay in enumerate((0.025, 0.032, 0.035, 0.03), 1)
    },
    **{f"maxvit_{size}": dataclasses.replace(_MAXVIT, drop_path=drop) for size, drop in _MAXVIT_DROP.items()},
    **{f"maxvit_{size}_tf_224": dataclasses.replace(_MAXVIT, drop_path=drop) for size, drop in _MAXVIT_DROP.items()},
    **{
        f"maxvit_{size}_tf_{pixels}": dataclasses.replace(_MAXVIT_TUNED, drop_path=drop)
        for size, drop in _MAXVIT_DROP.items()
        for pixels in (384, 512)
    },
    "davit_tiny": _DAVIT,
    "davit_small": dataclasses.replace(_DAVIT, drop_path=0.2),
    "davit_base": dataclasses.replace(_DAVIT, drop_path=0.4),
    "biformer_tiny": _BIFORMER,
    "biformer_small": dataclasses.replace(_BIFORMER, drop_path=0.15),
    "biformer_base": dataclasses.replace(_BIFORMER, drop_path=0.4),
    **{
        f"{kind}_{size}": dataclasses.replace(_NAT, drop_path=drop)
        for kind in ("nat", "dinat", "dinat_s")
        for size, drop in (("small", 0.3), ("base", 0.5))
    },
    **{f"moh_transnext_small_{share}": _MOH_SMALL for share in (80, 75)},
    **{f"moh_transnext_base_{share}": _MOH_BASE for share in (75, 50)},
    "transnext_tiny": dataclasses.replace(_TRANSNEXT, drop_path=0.25),
    "transnext_small": dataclasses.replace(_TRANSNEXT, drop_path=0.45),
    "transnext_base": dataclasses.replace(_TRANSNEXT, drop_path=0.6),
    "transnext_small_384": _TRANSNEXT_384,
    "transnext_base_384": dataclasses.replace(_TRANSNEXT_384, drop_path=0.8),
    "spectformer_vanilla_s": dataclasses.replace(_SPECTFORMER, drop_path=0.15),
    "spectformer_vanilla_b": dataclasses.replace(_SPECTFORMER, drop_path=0.25),
    "spectformer_s": _SPECTFORMER_PYRAMID,
    "spectformer_b": _SPECTFORMER_PYRAMID,
    "spectformer_l": dataclasses.replace(_SPECTFORMER_PYRAMID, drop_path=0.3, clip_grad=1.0),
    **dict.fromkeys(("litv2_medium", "litv2_medium_ws4"), dataclasses.replace(_LITV2, drop_path=0.3)),
    **dict.fromkeys(("litv2_base", "litv2_base_ws4"), dataclasses.replace(_LITV2, drop_path=0.5)),
    "litv2_base_384": dataclasses.replace(
        _LITV2, lr=2e-5, epochs=30, warmup_epochs=0, weight_decay=1e-8, drop_path=0.5, crop_pct=1.0
    ),
}


def recipe_for(model: str, *, small_images: bool = False) -> Recipe:
    """The published recipe of a model, of its nearest relative, or a general one.

    Args:
        model: registered name, with or without prefix.
        small_images: soften what a few thousand images of 8 x 8 pixels do not survive: mirror images of digits are no
            digits, a crop of a twelfth of one shows nothing, and mixing two leaves neither.

    >>> recipe_for("davit_base").drop_path, recipe_for("biformer_stl").clip_grad
    (0.4, 0.0)
    """
    name = model.removeprefix(PREFIX)
    families = {
        "davit": _DAVIT,
        "biformer": _BIFORMER,
        "nat": _NAT,
        "dinat": _NAT,
        "moh": _MOH_BASE,
        "litv2": _LITV2,
        "transnext": _TRANSNEXT,
        "spectformer": _SPECTFORMER,
        "maxvit": _MAXVIT,
        "agent": _HOST,
        "inline": _HOST,
        "shvit": _SHVIT,
        "fan": _FAN_TAP,
        "rvt": _RVT_TAP,
        "halonet": _HALONET,
        "medusa": _MEDUSA,
        "ninformer": _NINFORMER,
        "dependency": _DEPENDENCY,
        "dualtoken": _DUALTOKEN,
        "sparsifiner": _SPARSIFINER,
    }
    recipe = RECIPES.get(name, families.get(name.split("_")[0], Recipe()))
    if not small_images:
        return recipe
    return dataclasses.replace(
        recipe, optimizer="adamw", epochs=20, warmup_epochs=1, cooldown_epochs=0, lr=8e-3, linear_scaling=True,
        min_lr=1e-4, warmup_lr=1e-4, repeats=1, balanced=False, ema=0.0, drop_path=0.0, hflip=0.0, crop_scale=0.7,
        crop_padding=0, affine=(), auto_augment="rand-m3-n1-mstd0.5-inc1", mixup=0.1, cutmix=0.0, random_erasing=0.0,
        patch_augmentation=0.0, crop_pct=1.0,
    )  # fmt: skip

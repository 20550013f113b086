"""MoH-ViT: published sizes, the authors' layout, the balance loss in training, what timm expects of a model."""

from __future__ import annotations

import pytest
import torch

from manyheads.layers.mixture_of_heads import collect_routing
from manyheads.models import create_model, load_checkpoint
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.training import _Classifier
from manyheads.models.vision.moh import VARIANTS
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn

SMALL = {
    "embed_dims": (16, 32),
    "depths": (1, 2),
    "num_heads": (2, 4),
    "mlp_ratios": (4, 3),
    "sr_ratios": (4, 1),
    "shared_heads": (2, 1),
    "active_heads": (0, 2),
    "img_size": 64,
    "num_classes": 7,
    "drop_path_rate": 0.0,
}
PUBLISHED = {
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}


def _small(**options) -> TransNeXt:
    return create_model("moh_transnext_small_80", **{**SMALL, **options}).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    routers = [stage.blocks[0].attn.router for stage in model.stages]
    assert tuple(router.shared for router in routers) == VARIANTS[name]["shared_heads"]
    assert tuple(router.active for router in routers) == VARIANTS[name]["active_heads"]
    assert recipe_for(name).drop_path == VARIANTS[name]["drop_path_rate"]
    # Every block has a router of its own.
    assert len({id(block.attn.router) for stage in model.stages for block in stage.blocks}) == sum(
        VARIANTS[name]["depths"]
    )


def test_the_authors_layout() -> None:
    source, target = _small(), _small()
    state = {}
    for key, value in source.state_dict().items():
        key = key.replace("stages.0.blocks", "block1").replace("stages.1.blocks", "block2")
        key = key.replace("stages.0.patch", "patch_embed1.").replace("stages.1.patch", "patch_embed2.")
        key = key.replace("patch_embed1._embed.", "patch_embed1.").replace("patch_embed2._embed.", "patch_embed2.")
        key = key.replace("stages.0.norm", "norm1").replace("stages.1.norm", "norm2")
        key = key.replace("attn.router.", "attn.").replace(".position.", ".").replace("mlp.dwconv", "mlp.dwconv.dwconv")
        state[key] = value[:, :, None, None] if key.endswith("attn.sr.weight") else value
    assert {"block1.0.attn.wg_1.weight", "block2.1.attn.wg.weight", "block2.0.attn.wg_0.weight"} <= set(state)
    load_checkpoint(target, {"model": state}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_a_plain_transnext_is_the_model_with_gates_of_one() -> None:
    plain = create_model("transnext_micro", **{k: v for k, v in SMALL.items() if "_heads" not in k or k == "num_heads"})
    # With all heads shared and equal scores, every gate is 1.
    gated = _small(shared_heads=(2, 4), active_heads=(0, 0))
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert all(".router.wg_1." in name for name in missing)
    assert not unexpected
    for name, parameter in gated.named_parameters():
        if ".router." in name:
            torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 50, 64)
    torch.testing.assert_close(gated(x), plain.eval()(x))


def test_training_adds_the_balance_loss() -> None:
    model, x, labels = _small(), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    without, with_it = (
        _Classifier(model, Recipe(label_smoothing=0.0, head_balance=weight), None).train() for weight in (0.0, 0.01)
    )
    model.train()
    with collect_routing(model) as routing:
        model(x)
    assert len(routing) == 3
    expected = without(x, labels)["loss"] + 0.01 * routing.balance_loss()
    torch.testing.assert_close(with_it(x, labels)["loss"], expected)
    torch.testing.assert_close(with_it.eval()(x, labels)["loss"], without.eval()(x, labels)["loss"])


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model, x, labels = _small(), torch.randn(2, 3, 40, 33), torch.tensor([0, 1])
    classifier = _Classifier(model, Recipe(label_smoothing=0.0, head_balance=0.5), None).train()
    parameters = list(model.parameters())
    plain = torch.autograd.grad(classifier(x, labels)["loss"], parameters)
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(classifier(x, labels)["loss"], parameters), plain)


def test_features_and_other_images_channels_and_classes() -> None:
    net = create_model("moh_transnext_base_50", features_only=True, **SMALL)
    assert [tuple(x.shape) for x in net(torch.randn(1, 3, 50, 64))] == [(1, 16, 13, 16), (1, 32, 7, 8)]
    model = _small(in_chans=1, num_classes=2)
    assert model(torch.randn(2, 1, 96, 80)).shape == (2, 2)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model, x = _small(depths=(1, 1)), torch.randn(2, 3, 48, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 48, 64)
    torch.testing.assert_close(program.module()(more), model(more))


def test_bfloat16_stays_close() -> None:
    # All heads shared, because choices flip between precisions.
    model, x = _small(shared_heads=(2, 4), active_heads=(0, 0)), torch.randn(1, 3, 48, 48)
    expected = model(x)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": (1, 1, 1)}, "differ in length"),
        ({"shared_heads": (1, 1)}, "active=0 would leave 1 of heads=2 unused"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


def test_shared_and_active_heads_belong_together() -> None:
    with pytest.raises(ValueError, match=r"shared_heads=\(2, 1\) and active_heads=None belong together"):
        TransNeXt(**{**SMALL, "active_heads": None})

"""MEDUSA: published sizes, the authors' layouts, the plain ResNet as oracle, the schedule, what timm expects."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import set_seed

from manyheads.layers.medusa import semantic_image
from manyheads.models import create_model, load_checkpoint
from manyheads.models.image_data import ImageData, LabelledImages
from manyheads.models.recipes import recipe_for
from manyheads.models.training import train_vision
from manyheads.models.vision.medusa import Medusa, checkpoint_filter_fn

SMALL = dict(img_size=197, semantic_size=32, num_classes=3, depths=(1, 1, 1, 1), width=4, body_width=2)
VARIANTS = ("medusa", "medusa_single_scale", "medusa_residual", "medusa_mask")


def _small(name: str = "medusa", **options) -> Medusa:
    model = create_model(name, **{**SMALL, **options}).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def _counts(model: torch.nn.Module) -> tuple[int, int]:
    """What is learned, and with the statistics of batch norms, which Keras counts too."""
    learned = sum(parameter.numel() for parameter in model.parameters())
    return learned, learned + sum(b.numel() for name, b in model.named_buffers() if "running" in name)


@pytest.mark.parametrize(("name", "published"), [("medusa", 29_165_795), ("medusa_224", 29_155_556)])
def test_published_sizes(name: str, published: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    learned, counted = _counts(model)
    assert counted == published
    heads = sum(p.numel() for key, p in model.named_parameters() if key.startswith("sem.6"))
    assert heads == 92_800
    assert counted - learned == 2 * 26_560
    if name == "medusa":
        assert counted - _counts(model.sem)[0] == 23_604_098
        assert model.final_output.in_features == 8192


@pytest.mark.parametrize(("attention", "heads"), [("medusa_single_scale", 51_200), ("medusa_residual", 0)])
def test_variants_have_one_head_or_none(attention: str, heads: int) -> None:
    with torch.device("meta"):
        model = create_model(attention)
    assert sum(p.numel() for key, p in model.named_parameters() if key.startswith("sem.6")) == heads


def _norm(x: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)


def _by_hand(model: Medusa, image: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
    weights = model.sem(semantic)
    pad = {197: (3, 3), 240: (2, 3)}[image.shape[-1]]
    x = F.conv2d(F.pad(image, pad * 2), model.conv1.weight, model.conv1.bias, stride=2)
    x = F.max_pool2d(_norm(x, model.bn_conv1).relu(), 3, 2)
    for scale, stage in enumerate([None, *model.stages]):
        for index, block in enumerate(stage if stage is not None else ()):
            stride = 2 if scale > 1 and index == 0 else 1
            y = _norm(F.conv2d(x, block.conv1.weight, block.conv1.bias, stride), block.bn1).relu()
            y = _norm(F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1), block.bn2).relu()
            y = _norm(F.conv2d(y, block.conv3.weight, block.conv3.bias), block.bn3)
            if index == 0:
                x = _norm(F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride), block.bn_shortcut)
            x = (x + y).relu()
        if scale < 4:
            x = x + x * getattr(model.sem, str(600 + scale)).attention(weights, x.shape[2:])
    pooled = F.avg_pool2d(x, 7, 7).permute(0, 2, 3, 1).flatten(1)
    return F.linear(pooled, model.final_output.weight, model.final_output.bias)


@pytest.mark.parametrize("side", [197, 240])
def test_the_network_is_the_equation(side: int) -> None:
    model = _small(img_size=side, depths=(2, 1, 1, 1)).double()
    image, semantic = torch.rand(2, 3, side, side).double(), torch.randn(2, 1, 32, 48).double()
    torch.testing.assert_close(model(image, semantic), _by_hand(model, image, semantic))
    made = semantic_image(image, (32, 32))
    torch.testing.assert_close(model(image), model(image, made))


def test_the_image_is_masked_in_the_variants_without_heads() -> None:
    image, semantic = torch.rand(1, 3, 197, 197), torch.randn(1, 1, 32, 32)
    model = _small("medusa_mask")
    weights = F.interpolate(model.attend(image, semantic), (197, 197), mode="bilinear", align_corners=True)
    other = _small("medusa_residual")
    load_checkpoint(other, model.state_dict())
    # x + x R = (1 + R) x: what the mask does to an image that was divided by R and multiplied by 1 + R.
    torch.testing.assert_close(
        other(image, semantic), model(image * (1 + weights) / weights, semantic), rtol=1e-3, atol=1e-3
    )


def _theirs(model: Medusa) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stages":
            which = parts[3]
            branch = "1" if "shortcut" in which else "2" + "abc"[int(which[-1]) - 1]
            kind = "bn" if which.startswith("bn") else "res"
            name = f"{kind}{int(parts[1]) + 2}{'abcdef'[int(parts[2])]}_branch{branch}.{parts[4]}"
        if not name.endswith("num_batches_tracked"):
            state[name] = value
    return state


@pytest.mark.parametrize("layout", ["torch", "tensorflow"])
def test_the_authors_layouts_load(layout: str, tmp_path) -> None:
    model = _small(depths=(2, 1, 1, 1))
    state = _theirs(model)
    assert "res2b_branch2c.weight" in state
    if layout == "tensorflow":
        words = {"running_mean": "moving_mean", "running_var": "moving_variance"}
        graph = {}
        for name, value in state.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and "bn" not in layer:
                kind, value = "kernel", value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
            elif "bn" in layer:
                kind = {"weight": "gamma", "bias": "beta", **words}[kind]
            graph[f"{layer.replace('.', '/')}/{kind}:0"] = value.contiguous()
        state = graph
        assert "sem/600/kernel:0" in state
    torch.save({"model": state}, tmp_path / "medusa.pth")
    again = create_model("medusa", checkpoint=tmp_path / "medusa.pth", **{**SMALL, "depths": (2, 1, 1, 1)}).eval()
    x = torch.rand(1, 3, 197, 197)
    torch.testing.assert_close(again(x), model(x))
    bare = create_model("medusa", checkpoint=tmp_path / "medusa.pth",
                        **{**SMALL, "depths": (2, 1, 1, 1), "num_classes": 0}).eval()  # fmt: skip
    torch.testing.assert_close(bare(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_a_single_head_may_be_called_600() -> None:
    model = _small("medusa_single_scale")
    state = {name.replace("sem.603.", "sem.600."): value for name, value in _theirs(model).items()}
    again = _small("medusa_single_scale")
    load_checkpoint(again, state, checkpoint_filter_fn)
    x = torch.rand(1, 3, 197, 197)
    torch.testing.assert_close(again(x), model(x))


def test_other_sizes_and_features() -> None:
    model = _small()
    last, maps = model.forward_intermediates(torch.rand(1, 3, 480, 230))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (4, 119, 57), (16, 119, 57), (32, 60, 29), (64, 30, 15), (128, 15, 8)
    ]  # fmt: skip
    assert last is maps[-1]
    with pytest.raises(ValueError, match=r"2 x 1 tiles, but .* images of 197 x 197 pixels: set_input_size"):
        model(torch.rand(1, 3, 480, 230))
    model.set_input_size((480, 230))
    assert model(torch.rand(1, 3, 480, 230)).shape == (1, 3)
    assert model.final_output.in_features == 256
    net = create_model("medusa", features_only=True, out_indices=(1, 3), **SMALL).eval()
    assert [tuple(m.shape[1:]) for m in net(torch.rand(1, 3, 197, 197))] == [(16, 49, 49), (64, 13, 13)]
    assert net.feature_info.reduction() == [4, 16]


def test_classifier_and_channels_can_be_others() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(5)
    assert model.eval()(torch.rand(1, 1, 197, 197)).shape == (1, 5)
    model.reset_classifier(0)
    assert model(torch.rand(1, 1, 197, 197)).shape == (1, 128)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.rand(2, 3, 197, 197)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_export_and_compile(compiling: None) -> None:
    model = _small()
    x = torch.rand(2, 3, 197, 197)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        more = torch.rand(3, 3, 197, 197)
        torch.testing.assert_close(program.module()(more), model(more))
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_stays_close() -> None:
    model, x = _small(), torch.rand(1, 3, 197, 197)
    exact = model(x)
    scale = exact.abs().max().item()
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), exact, rtol=0.1, atol=0.1 * scale)


def test_body_and_rest_learn_in_turn(tmp_path) -> None:
    model = _small()
    everything = {id(parameter) for parameter in model.parameters()}
    body = {id(parameter) for parameter in model.sem.parameters()}
    frozen = [{id(parameter) for parameter in model.frozen_parameters(epoch)} for epoch in range(4)]
    assert frozen == [everything - body, body, body, everything - body]
    model.body_starts = 2
    assert {id(parameter) for parameter in model.frozen_parameters(0)} == body
    assert (recipe_for("medusa").weight_decay, recipe_for("medusa").balanced) == (0, True)

    def read(index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (32, 32), (40 * index % 256, 99, 20)), index % 3

    data = ImageData(LabelledImages(8, read), LabelledImages(4, read), 3)
    train_vision(
        "medusa", data, output=tmp_path, epochs=2, batch_size=4, device="cpu", image_size=197, lr=1e-2,
        model_options=SMALL, progress=False,
    )  # fmt: skip
    set_seed(0)
    states = [create_model("medusa", **SMALL).state_dict(), load_file(tmp_path / "checkpoint-2" / "model.safetensors")]
    states = [{name.removeprefix("network."): value for name, value in state.items()} for state in states]
    states.append(load_file(tmp_path / "model.safetensors"))
    learned = {name for name, _ in model.named_parameters()}
    for epoch, (before, after) in enumerate(pairwise(states)):
        changed = {name for name in learned if not torch.equal(before[name], after[name])}
        assert changed
        assert all(name.startswith("sem.") == (epoch == 0) for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "three"}, "attention='three' is not one of"),
        ({"img_size": 196}, "196 x 196 pixels are too small: a side needs at least 197 pixels"),
        ({"semantic_size": 40}, "semantic_size=40 must be divisible by 16"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\) must be four numbers"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


def test_bad_images() -> None:
    model = _small()
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        model(torch.rand(1, 4, 197, 197))
    with pytest.raises(ValueError, match="150 x 197 pixels are too small"):
        model(torch.rand(1, 3, 150, 197))
    with pytest.raises(ValueError, match="image has a batch of 2, the semantic image of 1"):
        model(torch.rand(2, 3, 197, 197), torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match="sides divisible by 16"):
        model(torch.rand(1, 3, 197, 197), torch.rand(1, 1, 30, 32))

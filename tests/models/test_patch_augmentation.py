"""Augmentation of single patches, and the second pass of a training step that uses it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from manyheads.models import training
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.patch_augmentation import augment_patches
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.training import train_vision
from manyheads.models.vision.token_robustness import attention_maps
from manyheads.objectives.diversification import attention_diversification_loss

MODEL = {"base_dims": (8, 8), "depths": (1, 1), "num_heads": (2, 2), "masked_blocks": 1}
RECIPE = Recipe(
    warmup_epochs=0, drop_path=0.0, auto_augment="", diversification=1.0, patch_augmentation=0.4, clip_grad=0.0
)


def _patches(images: torch.Tensor, side: int = 16) -> torch.Tensor:
    return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)


def test_nothing_happens_at_probability_zero_and_the_input_stays() -> None:
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(augment_patches(images, probability=0), images)
    before = images.clone()
    assert not torch.equal(augment_patches(images, probability=1), images)
    assert torch.equal(images, before)


def test_mirrors_stay_in_their_patch_and_the_margin_stays() -> None:
    images = torch.randn(2, 3, 37, 50, dtype=torch.double)
    out = augment_patches(images, probability=1, crop_scale=1, noise=0)
    torch.testing.assert_close(_patches(out), _patches(images).flip(-1))
    assert torch.equal(out[:, :, 32:], images[:, :, 32:])
    assert torch.equal(out[..., 48:], images[..., 48:])


def test_noise_has_its_deviation() -> None:
    noise = augment_patches(torch.zeros(8, 3, 64, 64), probability=1, crop_scale=1, noise=0.2)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert abs(noise.mean().item()) < 0.005


def test_crops_are_squares_of_the_share_and_lie_in_the_patch() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = torch.stack([rows, columns]).repeat(20, 1, 4, 4).double()
    out = _patches(augment_patches(images, probability=1, crop_scale=0.5, noise=0)).flatten(0, 2)
    # Away from the border a crop of a ramp is a ramp, whose slope is the side of the crop.
    down = out[:, 0, 9, 8] - out[:, 0, 8, 8]
    across = (out[:, 1, 8, 9] - out[:, 1, 8, 8]).abs()
    torch.testing.assert_close(down, across)
    assert 0.5**0.5 <= down.min() < 0.75
    assert 0.97 < down.max() <= 1
    assert down.square().mean().item() == pytest.approx(0.75, abs=0.02)
    middle = out[:, 0].mean((1, 2)) - 7.5
    assert (middle.abs() <= 8 * (1 - down) + 1e-9).all()
    assert middle.abs().max() > 1


def test_each_change_meets_its_share_of_patches_alone() -> None:
    images = torch.randn(64, 1, 128, 128)
    changed = (_patches(augment_patches(images)) != _patches(images)).any(-1).any(-1).any(-1).float()
    assert changed.mean().item() == pytest.approx(1 - 0.9**3, abs=0.02)
    torch.manual_seed(5)
    first = augment_patches(images)
    torch.manual_seed(5)
    assert torch.equal(augment_patches(images), first)
    assert not torch.equal(augment_patches(images), first)
    assert augment_patches(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(3, 16, 16), {}, r"got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), {}, "must be floating-point"),
        (torch.zeros(1, 3, 15, 16), {}, "15 x 16 pixels have no patch of patch=16"),
        (torch.zeros(1, 3, 16, 16), {"patch": 0}, "patch=0"),
        (torch.zeros(1, 3, 16, 16), {"probability": 1.1}, r"probability=1.1 must be in \[0, 1\]"),
        (torch.zeros(1, 3, 16, 16), {"crop_scale": 0}, r"crop_scale=0 in \(0, 1\]"),
        (torch.zeros(1, 3, 16, 16), {"noise": -1}, "noise=-1 at least 0"),
    ],
)
def test_bad_input(images: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment_patches(images, **options)


def _few_digits() -> ImageData:
    data = load_images("digits", image_size=32)
    data.train.length, data.test.length = 32, 8
    return data


def _train(output, recipe: Recipe = RECIPE, **options):
    given = {"epochs": 2, "batch_size": 8, "seed": 3, "device": "cpu", "save_steps": 3, "progress": False}
    given |= {"model_options": MODEL, "recipe": recipe}
    return train_vision("rvt_tiny_plus_tap", _few_digits(), output=output, **{**given, **options})


class _CutOff(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


class _Gradients(TrainerCallback):
    """The network as it was before the first step, and the gradients with which it was made."""

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == 0:
            self.network = copy.deepcopy(model.network)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == 0:
            self.found = [parameter.grad.clone() for parameter in model.network.parameters()]


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_a_step_learns_from_both_passes(tmp_path, monkeypatch, mixup: float) -> None:
    recipe = dataclasses.replace(RECIPE, mixup=mixup, cutmix=0.0, diversification=3.0)
    passes, gradients, forward = [], _Gradients(), training._Classifier.forward

    def noted(self, pixel_values, labels, diverse=True):
        passes.append((pixel_values.clone(), labels, diverse))
        return forward(self, pixel_values, labels, diverse)

    monkeypatch.setattr(training._Classifier, "forward", noted)
    result = _train(tmp_path, recipe, epochs=1, callbacks=[gradients])
    (pixels, targets, first), (patches, same, second) = passes[:2]
    assert (first, second) == (True, False)
    assert targets is same or torch.equal(targets, same)
    assert targets.ndim == (2 if mixup else 1)
    assert patches.shape == pixels.shape
    assert not torch.equal(patches, pixels)

    network = gradients.network.train()
    smoothing = 0.0 if mixup else recipe.label_smoothing
    with attention_maps(network) as maps:
        logits = network(pixels)
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing) + 3 * attention_diversification_loss(maps)
    loss = loss + F.cross_entropy(network(patches), targets, label_smoothing=smoothing)
    assert result.losses[0][1] == pytest.approx(loss.item(), rel=1e-4)
    for found, expected in zip(gradients.found, torch.autograd.grad(loss, list(network.parameters()))):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_run_with_patches_goes_on_after_a_cut(tmp_path) -> None:
    whole = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", callbacks=[_CutOff()])
    resumed = _train(tmp_path / "cut")
    assert resumed.resumed_from == str(tmp_path / "cut" / "checkpoint-3")
    assert (resumed.losses, resumed.accuracy) == (whole.losses, whole.accuracy)
    without = _train(tmp_path / "without", dataclasses.replace(RECIPE, patch_augmentation=0.0), epochs=1)
    assert without.losses[0][1] < 0.7 * whole.losses[0][1]


def test_only_rvt_trains_on_patches(tmp_path) -> None:
    assert recipe_for("rvt_base_plus_tap").patch_augmentation == 0.1
    assert recipe_for("fan_base_hybrid_tap").patch_augmentation == 0
    assert recipe_for("rvt_tiny_tap", small_images=True).patch_augmentation == 0
    with pytest.raises(ValueError, match=r"patch_augmentation=2\.0 must be a probability"):
        _train(tmp_path, dataclasses.replace(RECIPE, patch_augmentation=2.0))

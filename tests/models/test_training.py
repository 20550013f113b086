"""Training: a run that was cut off goes on with the same losses; two processes; evaluation of what was trained."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from manyheads.models.balanced_classes import BalancedClasses
from manyheads.models.evaluation import _corrupt, count_flops, evaluate_vision
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.recipes import recipe_for
from manyheads.models.registry import create_model
from manyheads.models.repeated_augmentation import RepeatedAugmentation
from manyheads.models.schedule import cosine_schedule
from manyheads.models.training import make_optimizer, train_vision
from manyheads.models.transforms import test_transform as evaluation_transform
from manyheads.models.transforms import train_transform
from manyheads.models.weight_averaging import AVERAGED

MODEL = {"depths": (1, 1), "embed_dims": (32, 64), "topks": (2, -2), "regions": 2}
# Everything random at once: crops, RandAugment, erasing, mixup, cutmix, stochastic depth.
RECIPE = dataclasses.replace(
    recipe_for("biformer_tiny", small_images=True), warmup_epochs=0, random_erasing=0.25, mixup=0.8, cutmix=1.0
)


class _CutOff(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def _few_digits() -> ImageData:
    data = load_images("digits", image_size=16)
    data.train.length, data.test.length = 96, 40
    return data


def _train(output: Path, **options):
    given = {"epochs": 2, "batch_size": 16, "seed": 3, "device": "cpu", "save_steps": 3, "progress": False}
    drop = {**MODEL, "drop_path_rate": 0.2}
    return train_vision(
        "biformer_tiny", _few_digits(), output=output, model_options=drop, **{"recipe": RECIPE, **given, **options}
    )


def test_a_run_that_was_cut_off_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", callbacks=[_CutOff()])
    # A checkpoint that was being written when the power went has no trainer state yet.
    (tmp_path / "cut" / "checkpoint-99").mkdir()
    resumed = _train(tmp_path / "cut")
    assert resumed.resumed_from == str(tmp_path / "cut" / "checkpoint-3")
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 12
    assert resumed.accuracy == whole.accuracy
    assert json.loads((tmp_path / "cut" / "training.json").read_text())["steps"] == 12
    assert not list((tmp_path / "cut").glob(".*"))

    found = evaluate_vision(
        "biformer_tiny", _few_digits(), checkpoint=tmp_path / "cut" / "model.safetensors", model_options=MODEL,
        image_size=16, progress=False,
    )  # fmt: skip
    assert found.images == 40
    assert found.top1 == pytest.approx(resumed.accuracy[-1])
    assert found.flops > 0

    with pytest.raises(ValueError, match="batch_size: 16 then, 32 now"):
        _train(tmp_path / "cut", batch_size=32)
    with pytest.raises(ValueError, match="checkpoints of another run"):
        _train(tmp_path / "cut", resume=False)


def test_averaged_weights_and_repeated_images_survive_a_cut(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, ema=0.8, repeats=3, cooldown_epochs=3)
    options = {"recipe": recipe, "batch_size": 24}
    whole = _train(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", callbacks=[_CutOff()], **options)
    # The power went after the trainer's state of a checkpoint was written and before the average was.
    shutil.copytree(tmp_path / "cut" / "checkpoint-3", tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "checkpoint-4" / AVERAGED).unlink()
    resumed = _train(tmp_path / "cut", **options)
    assert resumed.resumed_from == str(tmp_path / "cut" / "checkpoint-3")
    assert (resumed.losses, resumed.accuracy) == (whole.losses, whole.accuracy)

    final, states = load_file(tmp_path / "cut" / "model.safetensors"), {}
    for step in (6, 8):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        raw = {name.removeprefix("network."): value for name, value in load_file(folder / "model.safetensors").items()}
        states[step] = (raw, load_file(folder / AVERAGED))
    name = "head.weight"
    assert torch.equal(final[name], states[8][1][name])
    assert not torch.equal(states[8][0][name], states[8][1][name])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_copies_of_an_image_go_to_different_processes(processes: int) -> None:
    order = RepeatedAugmentation(50, repeats=3, batch_size=4, processes=processes, seed=5)
    pairs = list(order)
    assert len(pairs) == len(order) == 50 - 50 % (4 * processes)
    assert len(set(pairs)) == len(pairs)
    images = Counter(image for image, _ in pairs)
    assert sorted(images.values())[1:] == [3] * (len(images) - 1)
    if processes == 4:
        batches = [pairs[start : start + 4] for start in range(0, len(pairs), 4)]
        assert all(len({image for image, _ in batch}) == 4 for batch in batches)
    order.set_epoch(1)
    assert list(order) != pairs
    data = _few_digits().train
    data.transform, data.seed = lambda image: torch.rand(3), 1
    copies = [data[2, copy]["pixel_values"] for copy in (0, 1, 0)]
    assert torch.equal(copies[0], copies[2])
    assert not torch.equal(copies[0], copies[1])


def test_balanced_batches_hold_every_class() -> None:
    labels = [0] * 20 + [1] * 3 + [2] * 7
    order = BalancedClasses(labels, steps=5, batch_size=6, seed=2)
    images = list(order)
    assert len(images) == len(order) == 30
    for start in range(0, 30, 6):
        assert sorted(labels[image] for image in images[start : start + 6]) == [0, 0, 1, 1, 2, 2]
    rare = Counter(image for image in images if labels[image] == 1)
    assert max(rare.values()) - min(rare.values()) <= 1
    order.set_epoch(1)
    assert list(order) != images
    order.set_epoch(0)
    assert list(order) == images
    assert _few_digits().train.labels() == [label for _, label in map(_few_digits().train.read, range(96))]


def test_images_are_turned_sheared_and_lit_as_the_recipe_says() -> None:
    with torch.device("meta"):
        model = create_model("medusa")
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    recipe = dataclasses.replace(recipe_for("medusa"), hflip=0.0)
    lit = dataclasses.replace(recipe, affine=(0, 0.0, 0))
    torch.manual_seed(0)
    values = torch.stack([train_transform(model, 32, lit)(grey)[0, 16, 16] for _ in range(200)])
    most, least = 1.1 * 128 / 255 + 10 / 255, 0.9 * 128 / 255 - 10 / 255
    assert least <= values.min() < least + 0.03
    assert most - 0.03 < values.max() <= most
    moved = dataclasses.replace(recipe, intensity=(0.0, 0.0))
    corners = torch.stack([train_transform(model, 32, moved)(grey)[0, 0, 0] for _ in range(50)])
    assert 0 < (corners == 0).float().mean() < 1


def test_the_rate_rises_falls_and_rests() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_schedule(optimizer, steps=20, warmup=4, cooldown=6, warmup_lr=0.2, min_lr=0.1)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[7] == pytest.approx(0.55)
    assert rates[14:] == pytest.approx([0.1] * 6)
    with pytest.raises(ValueError, match="leave none of steps=5"):
        cosine_schedule(optimizer, steps=5, warmup=2, cooldown=3)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    data = _few_digits().train
    data.transform = lambda image: torch.rand(3)
    data.seed = 1
    torch.manual_seed(0)
    first = [data[i]["pixel_values"] for i in range(3)]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(data[2]["pixel_values"], first[2])
    data.epoch = 1
    assert not torch.equal(data[2]["pixel_values"], first[2])


def test_operations_are_counted_inside_attention() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_flops(Attention(), torch.zeros(1, 1, 16, 8)) == 2 * 2 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 15}, "must be even"),
        ({"batch_size": 128}, "at most 96"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_options_name_themselves(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _train(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_unknown_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        load_images(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="none of the folders"):
        load_images(str(tmp_path))


SCRIPT = """
import sys
from manyheads.models.training import make_optimizer, train_vision
options = dict(depths=(1, 1), embed_dims=(32, 64), topks=(2, -2), regions=2)
train_vision("biformer_tiny", "digits", output=sys.argv[1], epochs=2, batch_size=64, image_size=16, device="cpu",
             save_steps=4, model_options=options, progress=False)
"""


def _launch(script: Path, output: Path, processes: int = 1) -> subprocess.Popen:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(several if processes > 1 else []), str(script), str(output)], env=environment
    )


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert _launch(script, tmp_path / "whole").wait() == 0
    process = _launch(script, tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _launch(script, tmp_path / "killed").wait() == 0
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed")]
    assert records[1]["resumed_from"] is not None
    assert records[0]["losses"] == records[1]["losses"]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert _launch(script, tmp_path / "two", processes=2).wait() == 0
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    assert record["settings"]["processes"] == 2
    assert record["steps"] == 2 * (1442 // 128)
    assert (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "left"), [("inline_deit_tiny", 0), ("transnext_micro", 255)])
def test_evaluation_resizes_as_the_authors_do(name: str, left: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    # Black on the outer quarters of the longer side: squashed, they stay in the picture; cropped, they do not.
    wide = Image.new("L", (512, 256), 0)
    wide.paste(255, (128, 0, 384, 256))
    pixels = evaluation_transform(model, 224, recipe_for(name))(wide.convert("RGB"))
    mean, deviation = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert (255 * (pixels * deviation + mean)).round()[:, 112, 2].tolist() == [left] * 3


def test_long_gradient_rows_are_clipped_but_not_the_classifiers(tmp_path: Path) -> None:
    norms: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            for name, weight in model.network.named_parameters():
                if weight.ndim > 1:
                    ratio = weight.grad.flatten(1).norm(dim=1) / weight.detach().flatten(1).norm(dim=1).clamp(min=1e-3)
                    norms[name] = torch.maximum(ratio, norms.get(name, torch.zeros(())))

    recipe = dataclasses.replace(RECIPE, adaptive_clip=1e-3)
    _train(tmp_path, recipe=recipe, epochs=1, callbacks=[Watch()])
    last = norms.pop("head.weight")
    assert last.max() > 1e-3
    assert max(ratio.max().item() for ratio in norms.values()) == pytest.approx(1e-3, rel=1e-3)


def test_halonet_learns_by_sgd_but_small_images_by_adamw() -> None:
    assert (recipe_for("halonet_h1").optimizer, recipe_for("halonet_h1", small_images=True).optimizer) == (
        "sgd",
        "adamw",
    )
    optimizer = make_optimizer(torch.nn.Linear(2, 2), 0.4, 4e-5, "sgd")
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(True, 0.9)] * 2
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 4e-5}
    assert recipe_for("shvit_s2").adaptive_clip == 0.02
    with pytest.raises(ValueError, match="optimizer='lion' is not one of"):
        make_optimizer(torch.nn.Linear(2, 2), 0.4, 0.0, "lion")


def test_grey_images_train_and_judge_a_model_of_one_channel(tmp_path: Path) -> None:
    options = {"depth": 1, "embed_dim": 16, "mlp_dim": 16, "patch_size": 8}
    result = train_vision(
        "ninformer_mnist", _few_digits(), output=tmp_path / "grey", epochs=1, batch_size=16, model_options=options,
        device="cpu", progress=False,
    )  # fmt: skip
    images = _few_digits()
    images.read_channels(1)
    pixels = images.test[0]["pixel_values"]
    assert pixels.mode == "L"
    with pytest.raises(ValueError, match="in_chans=4"):
        images.read_channels(4)
    found = evaluate_vision(
        "ninformer_mnist", images, checkpoint=result.output, model_options=options, progress=False
    )  # fmt: skip
    assert found.top1 == pytest.approx(result.accuracy[-1])
    assert _corrupt(Image.new("L", (32, 32), 128), "gaussian_noise", 1).mode == "L"

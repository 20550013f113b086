"""Early exits: thresholds by the authors' loop, inference that stops, budgets, the loss, the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from manyheads.cli.main import app
from manyheads.models import create_model, exit_evaluation
from manyheads.models.early_exit import (
    BUDGETS,
    EarlyExit,
    confidences,
    exit_fractions,
    find_thresholds,
    leaving,
)
from manyheads.models.exit_evaluation import evaluate_exits, exit_flops, thresholds_for
from manyheads.models.image_data import ImageData, LabelledImages
from manyheads.models.training import train_vision
from manyheads.models.vision.dyn_perceiver import DynPerceiver
from manyheads.objectives.self_distillation import self_distillation_loss

NAME = "dyn_perceiver_mobilenet_v3_0x5"
OPTIONS = {"num_latents": 8, "mlp_ratio": 1, "depth_factor": (1, 0, 0, 1)}


def _model(**options) -> DynPerceiver:
    torch.manual_seed(0)
    model = create_model(NAME, **OPTIONS, num_classes=4, **options).eval()
    with torch.no_grad():
        # An untrained model is unsure of everything alike.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _images(count: int) -> LabelledImages:
    shades = torch.rand(count, generator=torch.Generator().manual_seed(1))
    return LabelledImages(
        count, lambda i: (Image.new("RGB", (32, 32), (int(255 * shades[i]), 30 * (i % 8), 90)), i % 4)
    )


def _data(train: int = 24, test: int = 12) -> ImageData:
    return ImageData(_images(train) if train else None, _images(test), 4, 32)


def test_the_budgets_are_the_authors() -> None:
    assert len(BUDGETS) == 33
    assert BUDGETS[0] == 4 / 20
    assert BUDGETS[16] == BUDGETS[17] == 1
    assert BUDGETS[18] == 20 / 19
    assert BUDGETS[32] == 4


@pytest.mark.parametrize("p", [1e-3, 0.2, 1.0, 4.0, 1e3])
def test_fractions_by_hand(p: float) -> None:
    q = [p**k for k in range(1, 5)]
    q = [x / sum(q) for x in q]
    for j, kappa in enumerate((0.85, 1.0, 0.5)):
        q[j] *= kappa
        rest = 1 - sum(q[: j + 1])
        total = sum(q[j + 1 :])
        q = q[: j + 1] + [x / total * rest for x in q[j + 1 :]]
    assert exit_fractions(p) == pytest.approx(q)
    assert sum(exit_fractions(p)) == pytest.approx(1)


def _by_visiting(confidence: list[list[float]], fractions: list[float]) -> list[float]:
    images = len(confidence[0])
    gone, thresholds = [False] * images, []
    for at_exit, fraction in zip(confidence[:-1], fractions):
        count, threshold = 0, 1e8
        for image in sorted(range(images), key=lambda i: -at_exit[i]):
            if not gone[image]:
                count += 1
                if count == math.floor(images * fraction):
                    threshold = at_exit[image]
                    break
        gone = [before or at_exit[i] >= threshold for i, before in enumerate(gone)]
        thresholds.append(threshold)
    return [*thresholds, -1e8]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(images=st.integers(1, 30), p=st.floats(0.05, 20), seed=st.integers(0, 999), ties=st.booleans())
def test_thresholds_are_those_of_the_loop_over_images(images: int, p: float, seed: int, ties: bool) -> None:
    confidence = torch.rand(4, images, generator=torch.Generator().manual_seed(seed))
    if ties:
        confidence = (4 * confidence).round() / 4
    fractions = exit_fractions(p)
    assert list(find_thresholds(confidence, fractions)) == _by_visiting(confidence.tolist(), list(fractions))


def test_thresholds_let_about_their_share_leave() -> None:
    confidence = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    fractions = exit_fractions(1.0)
    exits = leaving(confidence, find_thresholds(confidence, fractions))
    shares = torch.bincount(exits, minlength=4) / 1000
    torch.testing.assert_close(shares, torch.tensor(fractions), atol=0.002, rtol=0)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.6, 1.0])
def test_inference_stops_where_the_thresholds_say(quantile: float) -> None:
    model, x = _model(), torch.randn(9, 3, 40, 32)
    with torch.no_grad():
        exits = torch.stack(model.forward_exits(x))
    found = confidences(exits)
    # Between two values, because a smaller batch may round the last digit otherwise.
    thresholds = [*(found[:3].quantile(quantile, dim=1) - 1e-4).tolist(), -1e8]
    expected = leaving(found, thresholds)
    seen: list[tuple[str, int]] = []
    for name, part in (("stage 3", model.stages[2].cnn), ("stage 4", model.stages[3].cnn), ("end", model.last_write)):
        first = next(iter(part.children()))
        first.register_forward_pre_hook(lambda _, given, name=name: seen.append((name, len(given[0]))))
    logits, at = EarlyExit(model, thresholds)(x)
    assert torch.equal(at, expected)
    torch.testing.assert_close(logits, exits[expected, torch.arange(9)], rtol=1e-4, atol=1e-4)
    left = [int((expected > index).sum()) for index in range(3)]
    assert seen == [(name, count) for name, count in zip(("stage 3", "stage 4", "end"), left) if count]


def test_extreme_thresholds() -> None:
    model, x = _model(), torch.randn(3, 3, 32, 32)
    assert EarlyExit(model, (0.0, 0.0, 0.0, 0.0))(x)[1].tolist() == [0, 0, 0]
    logits, at = EarlyExit(model, (1e8, 1e8, 1e8, 1e8))(x)
    assert at.tolist() == [3, 3, 3]
    torch.testing.assert_close(logits, model(x))
    with pytest.raises(ValueError, match=r"must be four"):
        EarlyExit(model, (0.5, 0.5))
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        EarlyExit(model.train(), (0.5, 0.5, 0.5, 0.5))(x)


def test_loss_by_hand() -> None:
    torch.manual_seed(0)
    exits = [torch.randn(3, 4, requires_grad=True) for _ in range(4)]
    target = torch.tensor([0, 3, 1])
    expected = sum(w * F.cross_entropy(y, target) for w, y in zip((0.5, 0.5, 1, 1), exits))
    teacher = (exits[3].detach() / 2).softmax(1)
    for y in exits[:3]:
        student = (y / 2).softmax(1)
        expected = expected + 0.5 * 4 * (teacher * (teacher / student).log()).sum(1).mean()
    found = self_distillation_loss(exits, target, temperature=2)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, exits), torch.autograd.grad(expected, exits)):
        torch.testing.assert_close(ours, theirs)
    soft = F.one_hot(target, 4).float()
    torch.testing.assert_close(self_distillation_loss(exits, soft, temperature=2), found)
    with pytest.raises(ValueError, match="one for each exit"):
        self_distillation_loss(exits[:2], target)
    with pytest.raises(ValueError, match="temperature=0"):
        self_distillation_loss(exits, target, temperature=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exit_fractions(0), "p=0 must be positive"),
        (lambda: find_thresholds(torch.rand(4, 0), (0.25,) * 4), "confidence must be"),
        (lambda: find_thresholds(torch.rand(3, 5), (0.25,) * 4), "4 exits"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_budget_is_kept_and_used() -> None:
    torch.manual_seed(0)
    known, flops = torch.rand(4, 500), (10, 20, 30, 40)
    costs = []
    for budget in (14.0, 20.0, 30.0):
        _, thresholds = thresholds_for(budget, known, flops)
        costs.append(torch.tensor(flops)[leaving(known, thresholds)].float().mean().item())
        assert budget - 0.5 < costs[-1] <= budget
    assert thresholds_for(1e9, known, flops)[0] == 1e3
    with pytest.raises(ValueError, match="the least that these exits take"):
        thresholds_for(5, known, flops)


def test_evaluation_of_exits() -> None:
    model = _model()
    flops = exit_flops(model, torch.zeros(1, 3, 32, 32))
    assert list(flops) == sorted(flops)
    found = evaluate_exits(model, _data(), budget=sum(flops) / 4, batch_size=5, progress=False)
    assert (found.images, found.calibration_images, len(found.curve)) == (12, 24, 33)
    assert tuple(point.flops for point in found.exits) == flops
    assert found.curve[0].flops <= found.curve[-1].flops
    chosen = found.chosen
    assert chosen is not None
    assert sum(chosen.shares) == pytest.approx(1)
    assert chosen.flops == pytest.approx(sum(s * f for s, f in zip(chosen.shares, flops)))
    assert found.images_per_second > 0
    json.dumps(found.to_dict())


def test_evaluation_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="no early exits"):
        evaluate_exits("shvit_s1", ImageData(_images(4), _images(4), 4, 64), progress=False)
    with pytest.raises(ValueError, match="no training part"):
        evaluate_exits(_model(), _data(train=0), progress=False)


def test_training_uses_the_models_loss(tmp_path, monkeypatch) -> None:
    seen = []
    original = DynPerceiver.training_loss

    def spy(self, outputs, targets, label_smoothing=0.0):
        seen.append((len(outputs), targets.shape))
        return original(self, outputs, targets, label_smoothing)

    monkeypatch.setattr(DynPerceiver, "training_loss", spy)
    result = train_vision(
        NAME, _data(), output=tmp_path / "run", epochs=1, batch_size=8, device="cpu", model_options=OPTIONS,
        progress=False,
    )  # fmt: skip
    assert result.steps == 3
    assert seen == [(4, (8, 4))] * 3
    assert len(result.accuracy) == 1


def test_command(monkeypatch) -> None:
    monkeypatch.setattr(exit_evaluation, "CALIBRATION", 16)
    shape = [f"--option={name}={value}" for name, value in OPTIONS.items()]
    arguments = ["evaluate", NAME, "--limit", "8", *shape]
    found = CliRunner().invoke(app, [*arguments, "--exits", "--budget", "1e9"])
    assert found.exit_code == 0, found.output
    assert "each exit for all" in found.output
    assert "images per second" in found.output
    with pytest.raises(ValueError, match="--corruptions cannot be used"):
        CliRunner().invoke(app, [*arguments, "--exits", "--corruptions", "fog"], catch_exceptions=False)

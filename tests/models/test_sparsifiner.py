"""Sparsifiner: published sizes, layouts, pruning, both training phases, what timm expects of a model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from safetensors.torch import load_file

from manyheads.adapt.sparsifiner import fine_tune, reconstruct, train_sparsifiner
from manyheads.layers.sparsifiner import ConnectivityPredictor, SparsifiedAttention
from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.recipes import recipe_for
from manyheads.models.vision.sparsifiner import Sparsifiner, checkpoint_filter_fn
from manyheads.objectives.sparse_attention import score_reconstruction, teacher_losses
from manyheads.ops.sparse_connectivity import PairRule

SMALL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 7, "mlp_ratio": 2.0,
    "reduce_n_factor": 3, "coefficient_top": 3,
}  # fmt: skip
LVVIT = {"stem": "conv", "aux_head": True, "skip_lam": 2.0, "qkv_bias": False}


def _small(**options) -> Sparsifiner:
    return create_model("sparsifiner_deit_small", **{**SMALL, **options}).eval()


def _images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


@pytest.mark.parametrize(
    ("name", "size"), [("sparsifiner_deit_small", 22_251_880), ("sparsifiner_lvvit_small", 26_420_112)]
)
def test_published_sizes(name: str, size: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"manyheads_{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    predictor = model.blocks[0].attn.mask_predictor
    assert sum(parameter.numel() for parameter in predictor.parameters()) == 16_768
    assert predictor.proj_n.shape == (197, 32)


def test_timms_deit_is_the_dense_model_and_loads_without_predictors() -> None:
    theirs = timm.create_model(
        "deit_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=7
    ).eval()
    dense = _small(sparse=False, mlp_ratio=4.0)
    load_checkpoint(dense, theirs.state_dict(), checkpoint_filter_fn)
    x = _images()
    torch.testing.assert_close(dense(x), theirs(x), rtol=1e-4, atol=1e-5)
    sparse = _small(mlp_ratio=4.0, attn_keep_rate=1.0)
    before = sparse.blocks[0].attn.mask_predictor.proj_n.clone()
    load_checkpoint(sparse, theirs.state_dict(), checkpoint_filter_fn)
    assert torch.equal(before, sparse.blocks[0].attn.mask_predictor.proj_n)
    # A mask that keeps every pair changes nothing.
    torch.testing.assert_close(sparse(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"share_inout_proj": True}, LVVIT])
def test_the_authors_layout_loads_whole(options: dict) -> None:
    source, target = _small(**options), _small(**options)
    state = source.state_dict()
    assert {f"blocks.3.attn.mask_predictor.{name}" for name in ("proj_n", "proj_back_n", "proj_c_q.bias")} <= set(state)
    load_checkpoint(target, {"model": state}, checkpoint_filter_fn)
    x = _images()
    torch.testing.assert_close(target(x), source(x))
    del state["blocks.0.attn.mask_predictor.proj_n"]
    with pytest.raises(CheckpointError):
        load_checkpoint(target, state, checkpoint_filter_fn)


@pytest.mark.parametrize("backend", ["gather", "dense", "reference"])
def test_what_is_inspected_is_what_is_computed(backend: str) -> None:
    model = _small(backend=backend, token_keep_rate=0.7, token_pruning_loc=(1, 2, 3), attn_keep_rate=0.4)
    x = _images()
    found = model.inspect(x)
    torch.testing.assert_close(model(x), found.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm(model.stages(x)[-1][0])[:, 1:], found.features, rtol=1e-4, atol=1e-5)
    kept = [16 if layer.token_mask is None else int(layer.token_mask[0].sum()) for layer in found.layers]
    assert kept == [16] + [math.ceil(0.7**power * 16) for power in (1, 2, 3)]
    assert set(found.sparsities()) == {"basis", "coefficients", "mask"}
    assert found.layers[0].mask.sum(-1)[0, 0].tolist() == [17] + [7] * 16


def test_dropped_tokens_stay_dropped_and_are_those_the_class_token_overlooks() -> None:
    model = _small(token_keep_rate=0.7, token_pruning_loc=(1, 3))
    layers = model.inspect(_images()).layers
    first, last = layers[1], layers[3]
    seen = first.masked[:, :, 0, 1:].mean(1)
    assert (seen.masked_fill(~first.token_mask, 2).amin(1) >= seen.masked_fill(first.token_mask, -1).amax(1)).all()
    assert not (last.token_mask & ~layers[2].token_mask).any()
    assert model.stages(_images())[1][0].eq(0).all(-1).sum(1).tolist() == [16 - math.ceil(0.7 * 16)] * 2


def test_blocks_of_pairs_cover_everything_at_rate_one() -> None:
    source, blocked = _small(attn_keep_rate=1.0), _small(attn_keep_rate=1.0, backend="blocks", block=4)
    blocked.load_state_dict(source.state_dict())
    x = _images()
    torch.testing.assert_close(blocked(x), source(x), rtol=1e-4, atol=1e-5)
    blocked.blocks[0].attn.mask_predictor.rule = type(blocked.blocks[0].attn.mask_predictor.rule)(
        0.25, coefficient_top=3
    )
    assert not torch.allclose(blocked(x), source(x))


def test_reconstruction_teaches_predictors_and_nothing_else() -> None:
    dense, model = _small(sparse=False), _small()
    load_checkpoint(model, dense.state_dict(), checkpoint_filter_fn)
    objective = reconstruct(model, dense)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("mask_predictor" in name for name in trained)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = _images(8), torch.randint(7, (8,))
    losses = []
    for _ in range(25):
        loss, logits = objective(x, labels, 0.0)
        # While predictors are trained, attention is dense.
        torch.testing.assert_close(logits, dense(x), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_fine_tuning_leaves_predictors_alone_unless_they_distil_themselves() -> None:
    dense, x, labels = _small(sparse=False), _images(4), torch.randint(7, (4,))
    for weight in (0.0, 0.002):
        model = _small(token_keep_rate=0.7, token_pruning_loc=(1, 2, 3)).train()
        loss, _ = fine_tune(model, dense, self_distillation=weight)(x, labels, 0.1)
        loss.backward()
        predictor = model.blocks[0].attn.mask_predictor
        assert (predictor.proj_back_n.grad is not None) == bool(weight)
        assert all(p.grad is not None for name, p in model.named_parameters() if "mask_predictor" not in name)
    with pytest.raises(ValueError, match="no predictors"):
        fine_tune(dense, dense)
    with pytest.raises(ValueError, match="sparse=False"):
        fine_tune(model, model)(x, labels, 0.0)


def test_losses() -> None:
    scores, real = torch.zeros(2, 1, 2, 3), torch.ones(2, 1, 3, 3)
    assert score_reconstruction([scores, scores + 1], [real, real]) == 6.0
    kept = torch.tensor([[True, False]])
    tokens = torch.tensor([[[1.0], [5.0]]])
    divergence, error = teacher_losses(torch.zeros(1, 2), torch.tensor([[0.0, 50.0]]), tokens, 0 * tokens, kept)
    assert error == 1.0
    assert divergence == pytest.approx(math.log(2))
    for broken in (([], []), ([scores], [real, real]), ([scores], [real[:, :, 1:]])):
        with pytest.raises(ValueError, match=r"go together|do not fit"):
            score_reconstruction(*broken)


@pytest.mark.slow
def test_both_phases_from_the_command_line_function(tmp_path) -> None:
    tiny = {"depth": 1, "embed_dim": 12, "num_heads": 3, "patch_size": 16}
    result = train_sparsifiner(
        "sparsifiner_deit_small", "digits", output=tmp_path, epochs=1, batch_size=256, device="cpu", progress=False,
        model_options=tiny,
    )  # fmt: skip
    assert result.steps == 5
    assert result.settings["image_size"] == 112
    states = [
        load_file(path)
        for path in (tmp_path / "dense/model.safetensors", tmp_path / "predictor/model.safetensors",
                     tmp_path / "model.safetensors")
    ]  # fmt: skip
    dense, predictor, last = states
    assert torch.equal(dense["head.weight"], predictor["head.weight"])
    assert not torch.equal(predictor["head.weight"], last["head.weight"])
    name = "blocks.0.attn.mask_predictor.proj_n"
    assert name not in dense
    assert torch.equal(predictor[name], last[name])
    with pytest.raises(ValueError, match="no predictors to train"):
        train_sparsifiner("davit_tiny", "digits", output=tmp_path)


def test_the_recipe_is_the_published_one() -> None:
    recipe = recipe_for("sparsifiner_deit_small")
    assert (recipe.lr, recipe.min_lr, recipe.epochs, recipe.warmup_epochs) == (8e-5, 2e-6, 45, 3)
    assert (recipe.weight_decay, recipe.linear_scaling) == (0.05, False)


def test_other_image_sizes() -> None:
    source, target = _small(), _small(img_size=48)
    load_checkpoint(target, source.state_dict(), checkpoint_filter_fn)
    source.set_input_size((48, 48))
    x = _images(1, 48)
    torch.testing.assert_close(target(x), source(x))
    assert source.blocks[0].attn.mask_predictor.proj_n.shape == (37, 12)
    with pytest.raises(ValueError, match="images of 48 x 48, got 32 x 32"):
        source(_images())


@pytest.mark.parametrize("options", [{}, LVVIT])
def test_features_channels_and_classifiers(options: dict) -> None:
    model, x = _small(**options), _images(1)
    net = _small(features_only=True, out_indices=(1, 3), **options)
    assert [tuple(y.shape) for y in net(x)] == [(1, 24, 4, 4)] * 2
    assert _small(in_chans=1, **options)(x[:, :1]).shape == (1, 7)
    model.reset_classifier(2)
    assert model(x).shape == (1, 2)
    model.reset_classifier(0)
    assert model(x).shape == (1, 24)
    backbone = _small(num_classes=0, **options)
    load_checkpoint(backbone, _small(**options).state_dict(), checkpoint_filter_fn)


def test_the_auxiliary_head_adds_half_of_its_best() -> None:
    model, x = _small(**LVVIT), _images()
    tokens = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1))


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small(token_keep_rate=0.7, token_pruning_loc=(1, 2)).train()
    x, chosen = _images(), [p for n, p in model.named_parameters() if "mask_predictor" not in n]
    plain = torch.autograd.grad(model(x).square().sum(), chosen)
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), chosen))


def test_compiles_and_exports(compiling: None) -> None:
    model, x = _small(depth=2, token_keep_rate=0.7, token_pruning_loc=(1,), backend="dense"), _images()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), rtol=1e-4, atol=1e-5
    )
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [PairRule(0.4, coefficient_top=2), PairRule(score_threshold=0.01, coefficient_top=2)])
def test_the_layer_compiles_with_either_rule(compiling: None, rule: PairRule) -> None:
    layer = SparsifiedAttention(16, 2, ConnectivityPredictor(8, 70, reduce_tokens=9, rule=rule)).eval()
    with torch.no_grad():
        layer.mask_predictor.proj_back_n.mul_(4)
        x = torch.randn(2, 70, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_close() -> None:
    model, x = _small(attn_keep_rate=1.0), _images(1)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small(img_size=36), "whole patches of 8"),
        (lambda: _small(attn_keep_rate=0.0), "attn_keep_rate"),
        (lambda: _small(attn_keep_rate=(0.5, 0.5)), "one rate or 4"),
        (lambda: _small(token_keep_rate=1.5, token_pruning_loc=(1,)), "token_keep_rate"),
        (lambda: _small(token_pruning_loc=(4,)), "must name blocks below 4"),
        (lambda: _small(aux_head=True, token_pruning_loc=(1,)), "drops no tokens"),
        (lambda: _small(token_keep_rate=0.5, token_pruning_loc=(1,), backend="blocks"), "does not go with dropped"),
        (lambda: _small(reduce_n_factor=18), "leaves nothing of 17 tokens"),
        (lambda: _small(reduce_c_factor=9), "leaves nothing of 8 channels"),
        (lambda: _small(coefficient_top=6), "exceeds the 5 reduced tokens"),
        (lambda: _small(score_threshold=-1.0), "score_threshold=-1.0"),
        (lambda: _small(stem="resnet"), "stem='resnet'"),
        (lambda: _small(stem="conv", patch_size=1), "must be even"),
        (lambda: _small(num_heads=5), "must be a multiple of num_heads=5"),
        (lambda: SparsifiedAttention(16, 3, None), "multiple of heads=3"),
        (lambda: SparsifiedAttention(16, 2, None, token_keep_rate=0), "token_keep_rate=0"),
        (
            lambda: SparsifiedAttention(16, 2, ConnectivityPredictor(8, 17, reduce_tokens=2))(torch.randn(1, 16, 16)),
            "built for 17 tokens",
        ),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

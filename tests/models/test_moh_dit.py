"""MoH-DiT: published sizes, diffusers' DiT as the yardstick, guidance, latents of any size."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from manyheads.layers.mixture_of_heads import collect_routing
from manyheads.models import create_model, load_checkpoint
from manyheads.models.diffusion_training import DiffusionRecipe, train_diffusion
from manyheads.models.evaluation import evaluate_vision
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.moh_dit import VARIANTS, MoHDiT, TimestepEmbedding, checkpoint_filter_fn
from manyheads.models.training import train_vision

SMALL = {
    "img_size": 8,
    "embed_dim": 32,
    "head_dim": 8,
    "num_heads": (4, 4),
    "shared_heads": (2, 1),
    "active_heads": (1, 2),
    "num_classes": 10,
}
PUBLISHED = {
    "moh_dit_s_2_90": 32_997_152,
    "moh_dit_s_2_75": 32_998_688,
    "moh_dit_b_2_90": 130_638_368,
    "moh_dit_b_2_75": 130_638_368,
    "moh_dit_l_2_90": 458_512_416,
    "moh_dit_l_2_75": 458_528_800,
    "moh_dit_xl_2_90": 675_666_464,
    "moh_dit_xl_2_75": 675_689_504,
}


def _small(**options) -> MoHDiT:
    model = create_model("moh_dit_s_2_75", **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def _given(batch: int = 2, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, side, side), torch.randint(0, 1000, (batch,)), torch.randint(0, 11, (batch,))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    used = [shared + active for shared, active in zip(VARIANTS[name]["shared_heads"], VARIANTS[name]["active_heads"])]
    assert sum(used) / sum(VARIANTS[name]["num_heads"]) == pytest.approx(int(name[-2:]) / 100, abs=0.05)


def test_with_gates_of_one_it_is_diffusers_dit() -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    ours = _small(shared_heads=(4, 4), active_heads=(0, 0))
    state = {"pos_embed": ours.pos_embed}
    theirs_state = {key: torch.randn_like(value) * 0.1 for key, value in theirs.state_dict().items()}
    theirs_state |= {key: value for key, value in theirs.state_dict().items() if "pos_embed.pos_embed" in key}
    theirs.load_state_dict(theirs_state)
    first = "transformer_blocks.0.norm1.emb."
    for part, name in (("timestep_embedder.linear_1", "mlp.0"), ("timestep_embedder.linear_2", "mlp.2")):
        state |= {f"t_embedder.{name}.{kind}": theirs_state[f"{first}{part}.{kind}"] for kind in ("weight", "bias")}
    state["y_embedder.embedding_table.weight"] = theirs_state[f"{first}class_embedder.embedding_table.weight"]
    # diffusers keeps embeddings of time and class in every block.
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    for kind in ("weight", "bias"):
        state[f"x_embedder.proj.{kind}"] = theirs_state[f"pos_embed.proj.{kind}"]
        state[f"final_layer.linear.{kind}"] = theirs_state[f"proj_out_2.{kind}"]
        state[f"final_layer.adaLN_modulation.1.{kind}"] = theirs_state[f"proj_out_1.{kind}"]
        for i in range(2):
            block = f"transformer_blocks.{i}."
            qkv = [theirs_state[f"{block}attn1.to_{x}.{kind}"] for x in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            for a, b in (
                ("attn.proj", "attn1.to_out.0"), ("mlp.fc1", "ff.net.0.proj"), ("mlp.fc2", "ff.net.2"),
                ("adaLN_modulation.1", "norm1.linear"),
            ):  # fmt: skip
                state[f"blocks.{i}.{a}.{kind}"] = theirs_state[f"{block}{b}.{kind}"]
    state |= {f"blocks.{i}.attn.wg_1.weight": torch.zeros(4, 32) for i in range(2)}
    load_checkpoint(ours, state, checkpoint_filter_fn)
    x, _, y = _given()
    # At other times the two differ: diffusers spaces its frequencies a little wider than the authors.
    t = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(ours(x, t, y), theirs(x, t, class_labels=y).sample, rtol=1e-4, atol=1e-4)


def test_times_are_cosines_and_sines() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    embedding = TimestepEmbedding(8)
    waves: list[torch.Tensor] = []
    embedding.mlp.register_forward_pre_hook(lambda module, args: waves.append(args[0]))
    t = torch.tensor([0.0, 1.0, 999.0])
    embedding(t)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(waves[0], theirs, rtol=1e-4, atol=1e-4)


def test_layers_may_have_heads_of_any_number() -> None:
    model = _small(num_heads=(2, 8), shared_heads=(2, 4), active_heads=(0, 3))
    assert [block.attn.qkv.out_features for block in model.blocks] == [48, 192]
    assert model(*_given()).shape == (2, 8, 8, 8)


def test_a_fresh_model_predicts_nothing() -> None:
    model = create_model("moh_dit_s_2_90", **SMALL).eval()
    assert model(*_given()).eq(0).all()


def test_guidance_mixes_the_first_three_channels() -> None:
    model = _small()
    x, t, y = _given()
    with_class, without = model(x, t, y), model(x, t, torch.full_like(y, 10))
    guided = model.guided(x, t, y, 2.5)
    torch.testing.assert_close(guided[:, :3], without[:, :3] + 2.5 * (with_class - without)[:, :3])
    torch.testing.assert_close(guided[:, 3:], with_class[:, 3:])
    torch.testing.assert_close(model.guided(x, t, y, 1.0), with_class)


def test_training_forgets_some_labels() -> None:
    model = _small(class_dropout=1.0)
    x, t, y = _given()
    torch.testing.assert_close(model.train()(x, t, y), model.eval()(x, t, torch.full_like(y, 10)))
    never = _small(class_dropout=0.0)
    torch.testing.assert_close(never.train()(x, t, y), never.eval()(x, t, y))


def test_other_latents_get_a_table_of_their_own() -> None:
    model, larger = _small(), _small(img_size=12)
    larger.load_state_dict({**model.state_dict(), "pos_embed": larger.pos_embed})
    given = _given(side=12)
    torch.testing.assert_close(model(*given), larger(*given))
    assert model(torch.randn(1, 4, 6, 10), torch.tensor([5]), torch.tensor([0])).shape == (1, 8, 6, 10)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model, given = _small(class_dropout=0.0).train(), _given()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        with collect_routing(model) as routing:
            loss = model(*given).square().sum()
        return torch.autograd.grad(loss + routing.balance_loss(), parameters)

    plain = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)


def test_exports_whole_with_a_free_batch(compiling: None) -> None:
    model, given = _small(num_heads=(4,), shared_heads=(2,), active_heads=(1,)), _given()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    more = _given(batch=5)
    torch.testing.assert_close(program.module()(*more), model(*more))


def test_bfloat16_stays_close() -> None:
    model, (x, t, y) = _small(shared_heads=(4, 4), active_heads=(0, 0)), _given()
    expected = model(x, t, y)
    out = model.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (4,)}, "differ in length"),
        ({"embed_dim": 34}, "embed_dim=34 must be a multiple of 4"),
        ({"class_dropout": 1.5}, "class_dropout=1.5"),
        ({"shared_heads": (2, 5)}, "shared=5 must lie between 0 and heads=4"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


def test_labelled_images_do_not_train_or_judge_it(tmp_path) -> None:
    with pytest.raises(ValueError, match="'moh_dit_s_2_90' has no classifier"):
        train_vision("moh_dit_s_2_90", "digits", output=tmp_path)
    with pytest.raises(ValueError, match="'moh_dit_s_2_90' has no classifier"):
        evaluate_vision("moh_dit_s_2_90", "digits")


def test_latents_that_patches_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="whole 2 x 2 patches"):
        _small()(torch.randn(1, 4, 7, 8), torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"x must be \(batch, 4, height, width\)"):
        _small()(torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.tensor([1]))


TINY = {"embed_dim": 16, "head_dim": 8, "num_heads": (2, 2), "shared_heads": (1, 2), "active_heads": (1, 0)}


def _few_digits(count: int = 48) -> ImageData:
    data = load_images("digits", image_size=8)
    data.train.length, data.test.length = count, 16
    return data


def test_training_averages_its_weights_and_goes_on_where_it_was_stopped(tmp_path) -> None:
    arguments = dict(output=tmp_path, epochs=3, batch_size=16, model_options=TINY, progress=False, device="cpu")
    whole = train_diffusion("moh_dit_s_2_90", _few_digits(), **arguments)
    assert (whole.steps, len(whole.test_losses)) == (9, 3)
    assert whole.test_losses[-1] < whole.test_losses[0]
    averaged, last = (load_file(tmp_path / name) for name in ("model.safetensors", "last.safetensors"))
    assert not averaged["blocks.0.attn.proj.bias"].equal(last["blocks.0.attn.proj.bias"])
    # Killed while it wrote the last checkpoint: the averaged weights come at its very end.
    (tmp_path / "checkpoint-9" / "averaged.safetensors").unlink()
    resumed = train_diffusion("moh_dit_s_2_90", _few_digits(), **arguments)
    assert resumed.resumed_from == str(tmp_path / "checkpoint-6")
    assert resumed.losses == whole.losses
    for name, before in (("model.safetensors", averaged), ("last.safetensors", last)):
        torch.testing.assert_close(load_file(tmp_path / name), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train_diffusion("moh_dit_s_2_90", _few_digits(), **{**arguments, "resume": False})


def test_latents_come_from_an_encoder(tmp_path) -> None:
    sizes = dict(block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    AutoencoderKL(**sizes, **kinds).save_pretrained(tmp_path / "encoder")
    found = train_diffusion(
        "moh_dit_s_2_90", _few_digits(4), output=tmp_path / "run", epochs=1, batch_size=4, image_size=32, device="cpu",
        encoder=str(tmp_path / "encoder"), model_options=TINY, progress=False,
    )  # fmt: skip
    state = load_file(tmp_path / "run" / "last.safetensors")
    assert state["x_embedder.proj.weight"].shape[1] == 4
    assert state["pos_embed"].shape[1] == 4  # 32 pixels are 4 x 4 latents, 2 x 2 tokens
    assert not any("encoder" in name for name in state)
    assert found.settings["recipe"]["ema"] == 0.99
    with pytest.raises(ValueError, match="image_size=36 must be a multiple of 8"):
        train_diffusion("moh_dit_s_2_90", _few_digits(4), output=tmp_path, batch_size=4, image_size=36, encoder="x")


def test_the_published_recipe() -> None:
    recipe = DiffusionRecipe()
    assert (recipe.lr, recipe.ema, recipe.head_balance, recipe.hflip) == (1e-4, 0.9999, 0.01, 0.5)

"""AgentSD on a tiny U-Net of diffusers: exactness, schedule, what is put back, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from manyheads.adapt.agent_diffusion import AgentDiffusion

FEW = {"ratio": 0.4, "agent_ratio": 0.9, "cell": (4, 4)}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
    ).eval()  # fmt: skip


def _call(unet, timestep=10, batch=2, size=(8, 12), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 4, *size, generator=generator).to(dtype)
    text = torch.randn(batch, 5, 12, generator=generator).to(dtype)
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=text).sample


def test_ratio_zero_is_the_model_itself(unet) -> None:
    plain = _call(unet)
    with AgentDiffusion(ratio=0.0, agent_ratio=0.0)(unet):
        assert torch.equal(_call(unet), plain)


@pytest.mark.parametrize("options", [FEW, {"ratio": 0.5, "agent_ratio": 0.0}, {"ratio": 0.0, "agent_ratio": 0.9}])
def test_it_changes_the_model_and_puts_everything_back(unet, options) -> None:
    plain = _call(unet)
    processors, state = unet.attn_processors, set(unet.state_dict())
    with AgentDiffusion(**options)(unet):
        changed = _call(unet)
        assert changed.isfinite().all()
        assert not torch.allclose(changed, plain, atol=1e-4)
        assert set(unet.state_dict()) == state
    assert torch.equal(_call(unet), plain)
    assert {name: id(p) for name, p in unet.attn_processors.items()} == {n: id(p) for n, p in processors.items()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_an_error_inside_puts_everything_back_too(unet) -> None:
    plain = _call(unet)
    with pytest.raises(ValueError, match="do not fit a map"), AgentDiffusion(cell=(16, 2))(unet):
        _call(unet)
    assert torch.equal(_call(unet), plain)


def _calls_of_agents(monkeypatch) -> list[tuple[int, int]]:
    import manyheads.adapt.agent_diffusion as room

    seen, original = [], room.agent_attention

    def spy(query, key, value, agents, **options):
        seen.append((query.shape[2], agents.shape[2]))
        return original(query, key, value, agents, **options)

    monkeypatch.setattr(room, "agent_attention", spy)
    return seen


def test_only_large_maps_are_changed(unet, monkeypatch) -> None:
    seen = _calls_of_agents(monkeypatch)
    with AgentDiffusion(**FEW)(unet):
        _call(unet)
    assert set(seen) == {(96 - 38, 96 - 86)}
    first = len(seen)
    seen.clear()
    with AgentDiffusion(ratio=0.0, agent_ratio=0.8, max_downsample=2, cell=(2, 2))(unet):
        _call(unet)
    assert len(seen) > first
    assert {queries for queries, _ in seen} == {96, 24}


def test_the_schedule_turns_from_agents_to_merging(unet, monkeypatch) -> None:
    seen = _calls_of_agents(monkeypatch)
    method = AgentDiffusion.published(0.4)
    assert (method.later.agent_ratio, method.later.cell, method.later_from) == (0.5, (2, 2), 20)
    made = []
    with method(unet):
        for timestep in [*range(24, -1, -1), *range(24, 21, -1)]:
            before = len(seen)
            _call(unet, timestep)
            made.append(len(seen) > before)
    assert made == [True] * 20 + [False] * 5 + [True] * 3


def test_random_places_are_repeatable_and_leave_the_global_generator_alone(unet) -> None:
    method = AgentDiffusion(ratio=0.5, agent_ratio=0.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with method(unet):
        first, again = _call(unet), _call(unet)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, again)
    with method(unet):
        assert torch.equal(_call(unet), first)
    with AgentDiffusion(ratio=0.5, agent_ratio=0.0, use_rand=False)(unet):
        corner = _call(unet)
        assert torch.equal(_call(unet), corner)


def test_odd_batches_keep_the_corner(unet) -> None:
    with AgentDiffusion(ratio=0.5, agent_ratio=0.0)(unet):
        assert torch.equal(_call(unet, batch=1), _call(unet, batch=1))


@pytest.mark.parametrize("part", ["merge_crossattn", "merge_mlp"])
def test_other_parts_can_be_merged(unet, part) -> None:
    options = {"use_rand": False, **FEW}
    with AgentDiffusion(**options)(unet):
        attention_only = _call(unet)
    with AgentDiffusion(**options, **{part: True})(unet):
        assert not torch.allclose(_call(unet), attention_only, atol=1e-5)
    with AgentDiffusion(**{**options, "ratio": 0.0, "agent_ratio": 0.0}, **{part: True})(unet):
        merged_nothing = _call(unet)
    assert torch.equal(merged_nothing, _call(unet))


def test_merging_the_mlp_is_the_mlp_of_merged_tokens() -> None:
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    x = torch.ones(2, 16, 16) * torch.randn(2, 1, 16)
    text = torch.randn(2, 5, 12)
    method = AgentDiffusion(ratio=0.5, agent_ratio=0.0, merge_mlp=True, merge_crossattn=True)
    with torch.no_grad():
        plain = block(x, encoder_hidden_states=text)
        with method(block):
            # All tokens are equal, so that merging them changes nothing.
            torch.testing.assert_close(block(x, encoder_hidden_states=text), plain)


def test_float32_logits_in_half_precision(unet) -> None:
    half = unet.to(torch.bfloat16)
    try:
        with AgentDiffusion(**FEW, use_rand=False, attn_precision="fp32")(half):
            precise = _call(half, dtype=torch.bfloat16)
        with AgentDiffusion(**FEW, use_rand=False)(half):
            torch.testing.assert_close(_call(half, dtype=torch.bfloat16), precise, atol=0.1, rtol=0.1)
    finally:
        unet.to(torch.float32)


def test_twice_is_refused(unet) -> None:
    again = AgentDiffusion()(unet)
    with AgentDiffusion()(unet), pytest.raises(RuntimeError, match="attached to this model already"):
        again.__enter__()


def test_masks_are_refused() -> None:
    block = BasicTransformerBlock(16, 2, 8).eval()
    with AgentDiffusion()(block), pytest.raises(ValueError, match="under an attention mask"):
        block(torch.randn(2, 16, 16), attention_mask=torch.zeros(2, 1, 16))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="pass the U-Net"), AgentDiffusion()(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio=1.0 must be at least 0 and below 1"),
        ({"agent_ratio": -0.1}, "agent_ratio=-0.1"),
        ({"cell": (0, 2)}, "at least one row"),
        ({"attn_precision": "fp8"}, "attn_precision='fp8'"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        AgentDiffusion(**options)


def test_a_pipeline_from_files_generates_with_it(unet, tmp_path) -> None:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8).eval()
    # PLMS with a repeated timestep at its start, as Stable Diffusion 1.5 is published with.
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        unet=unet, vae=vae, scheduler=scheduler, **parts, requires_safety_checker=False
    ).save_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, **parts)
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        return pipeline(
            prompt_embeds=torch.ones(1, 5, 12), negative_prompt_embeds=torch.zeros(1, 5, 12), num_inference_steps=4,
            height=8, width=8, generator=torch.Generator().manual_seed(2), output_type="pt",
        ).images  # fmt: skip

    plain = generate()
    method = replace(AgentDiffusion.published(0.4), later_from=2)
    with method(pipeline.unet):
        changed = generate()
    assert changed.isfinite().all()
    assert not torch.equal(changed, plain)
    assert torch.equal(generate(), plain)
    with AgentDiffusion(ratio=0.0, agent_ratio=0.0)(pipeline.unet):
        assert torch.equal(generate(), plain)

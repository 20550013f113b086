"""One transformer block of a latent diffusion model, as it is and with AgentSD attached."""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from manyheads.adapt.agent_diffusion import AgentDiffusion
from manyheads.ops.token_merge import match_tokens


class _OneBlock(nn.Module):
    """A U-Net of one block: a map in, a map out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, sample: Tensor, context: Tensor) -> Tensor:
        tokens = self.block(sample.flatten(2).transpose(1, 2), encoder_hidden_states=context)
        return tokens.transpose(1, 2).unflatten(2, sample.shape[2:])


def run_block(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's outputs, and what its self-attention's input becomes."""
    block = BasicTransformerBlock(
        config["channels"], config["heads"], config["dim_head"], cross_attention_dim=config["context_dim"]
    ).eval()
    block.load_state_dict({name.removeprefix("block."): value for name, value in weights.items()})
    plain = ("ratio", "agent_ratio", "max_downsample", "use_rand", "k_scale2", "k_shortcut")
    method = AgentDiffusion(
        cell=(config["sy"], config["sx"]),
        attn_precision=config.get("attn_precision") or "",
        **{name: config[name] for name in (*plain, "merge_attn", "merge_crossattn", "merge_mlp") if name in config},
    )
    model, x, context = _OneBlock(block), given["x"], given["context"]
    outputs = {"base": model(x, context)}
    with method(model):
        outputs["y"] = model(x, context)
    tokens = x.flatten(2).transpose(1, 2)
    matching = match_tokens(tokens, (x.shape[2], x.shape[3]), method.cell)
    gone, kept_from_agents = matching.count(method.ratio), matching.count(method.agent_ratio)
    normed = outputs["normed"] = block.norm1(tokens)
    outputs["merged"] = matching.merge(normed, gone)
    outputs["unmerged"] = matching.unmerge(outputs["merged"], gone)
    if 2 * (tokens.shape[1] - kept_from_agents) < tokens.shape[1] - gone:
        outputs["agent"] = matching.merge(normed, kept_from_agents)
    return outputs

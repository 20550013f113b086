"""Lightning attention: the operator with slopes (or their rule) and the TNL attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.lightning import TNLAttention
from manyheads.ops.lightning import lightning_attention, lightning_slopes
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict, inputs: dict) -> dict:
    given = tensors(inputs)
    return arrays(_layer(config, state, given) if "x" in given else operator(config, given))


def operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, final state, states after every block, and the gradients of all inputs."""
    flipped = config.get("layout", "").replace(" ", "").startswith("batch,tokens")
    grad_out, grad_state = given.pop("grad_out", None), given.pop("grad_final_state", None)
    cu_seqlens = given.pop("cu_seqlens", None)
    if cu_seqlens is None and config.get("cu_seqlens") is not None:
        cu_seqlens = torch.tensor(config["cu_seqlens"])
    mask = given.pop("mask", given.pop("padding_mask", None))
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "initial_state") if name in given}
    query, key, value = (leaves[name].transpose(1, 2) if flipped else leaves[name] for name in ("q", "k", "v"))
    if mask is not None:
        value = value * mask.to(value.dtype)[:, None, :, None]
    options = dict(
        slopes=_slopes(config, query.shape[1], given),
        scale=config.get("scale", 1.0),
        causal=config.get("causal", True),
        block=config.get("block") or 64,
    )
    out, final = lightning_attention(
        query,
        key,
        value,
        initial_state=leaves.get("initial_state"),
        cu_seqlens=cu_seqlens,
        return_state=True,
        **options,
    )
    outputs = {"out": out.transpose(1, 2) if flipped else out, "final_state": final}
    if options["causal"] and cu_seqlens is None:
        outputs["block_states"] = _block_states(query, key, value, leaves.get("initial_state"), options)
    if grad_out is not None or grad_state is not None:
        loss = outputs["out"].sum() * 0 if grad_out is None else (outputs["out"] * grad_out).sum()
        loss = loss if grad_state is None else loss + (final * grad_state).sum()
        loss.backward()
        outputs |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return outputs


def _slopes(config: dict, heads: int, given: dict[str, Tensor]) -> Tensor | None:
    if "slopes" in given:
        return given["slopes"].reshape(heads)
    if config.get("slopes") is not None:
        return torch.tensor(config["slopes"]).reshape(heads)
    if config.get("log_decay") is not None:
        return -torch.tensor(config["log_decay"]).reshape(heads)
    named = str(config.get("slope_rule", "")).split(",")[0].strip().lower()
    rule = {"paper": "linear", "fla": "linear", "code": "geometric", "alibi": "geometric"}.get(named, named)
    layer, layers = config.get("layer_idx"), config.get("num_layers")
    if not rule and layer is None:
        return None
    return lightning_slopes(heads, layer=layer, layers=layers, rule=rule or "geometric")


def _block_states(query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, options: dict) -> Tensor:
    states = []
    for start in range(0, query.shape[2], options["block"]):
        cut = slice(start, start + options["block"])
        _, state = lightning_attention(
            query[:, :, cut], key[:, :, cut], value[:, :, cut], initial_state=state, return_state=True, **options
        )
        states.append(state)
    return torch.stack(states, dim=2)


def _layer(config: dict, state: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = TNLAttention(
        config["embed_dim"],
        config["num_heads"],
        bias=config.get("bias", False),
        layer_idx=config.get("layer_idx", 0),
        num_layers=config.get("num_layers", 1),
    )
    layer.load_state_dict(tensors(state))
    x = given["x"].requires_grad_()
    mask = given.get("mask", given.get("padding_mask"))
    out, final = layer(
        x, state=given.get("initial_state"), mask=None if mask is None else mask.bool(), return_state=True
    )
    outputs = {"out": out, "final_state": final}
    if "grad_out" in given:
        (out * given["grad_out"]).sum().backward()
        outputs["grad_x"] = x.grad
        outputs |= {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return outputs

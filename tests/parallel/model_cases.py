"""Functions that the ranks of the tests run: a model with its sequence sharded against the same model on one device."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from manyheads.data.language_models import load_language_model
from manyheads.data.text import python_documentation
from manyheads.layers.lightning import TNLAttention
from manyheads.parallel import context_parallel, record, shard
from manyheads.parallel.local import group_of
from manyheads.reproduce.byte_lm import ByteLM

VOCABULARY = 61
_WIDE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=VOCABULARY)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_WIDE, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": MistralConfig(**_WIDE, num_key_value_heads=1, sliding_window=16),
    "qwen3": Qwen3Config(
        **_WIDE, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gemma2": Gemma2Config(**_WIDE, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**_WIDE, num_key_value_heads=1, head_dim=8, sliding_window=7),
    "gpt_oss": GptOssConfig(
        **_WIDE, num_key_value_heads=2, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama4": Llama4TextConfig(**_WIDE, num_key_value_heads=2, head_dim=8, attention_chunk_size=8, pad_token_id=0),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    ),
}


class _Linear(nn.Module):
    """A TNL layer in the place of a Llama attention, called as that is."""

    def __init__(self, layer: int):
        super().__init__()
        self.mixer = TNLAttention(32, 4, layer_idx=layer, num_layers=2)

    def forward(self, hidden_states: Tensor, **_: Any):
        return self.mixer(hidden_states), None


def tiny(kind: str, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    if kind == "linear":
        return ByteLM("tnl").to(dtype)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama" if kind == "hybrid" else kind]))
    if kind == "hybrid":
        model.model.layers[1].self_attn = _Linear(1)
    # Routed experts are multiplied by a kernel that knows no float64.
    return model.to(torch.float32 if kind == "gpt_oss" else dtype).train()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    # Relative to the largest gradient of the model: biases before a norm have none but rounding.
    scale = max(float(w.abs().max()) for w in want.values())
    return max(float((got[name] - want[name]).abs().max()) / scale for name in want)


def sharded_case(kind: str, world: int, call: dict[str, Tensor], **options: Any) -> dict[str, Any] | None:
    """Errors of logits, loss and gradients of one call, relative; and what travelled forward."""
    group = group_of(world)
    if group is None:
        return None
    model, checkpointing = tiny(kind), options.pop("checkpointing", False)
    expected = model(**call)
    expected.loss.backward()
    want, before = gradients(model), {n: p.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with context_parallel(model, group, **options) as context, record() as log:
        output = model(**call)
        if checkpointing:
            model(**{name: tensor[:1, :8] for name, tensor in call.items()})
        output.loss.backward()
        logits = expected.logits if options.get("gather_logits") else context.shard(expected.logits)
    again = model(**call)
    return {
        "logits": gap(output.logits, logits),
        "loss": gap(output.loss, expected.loss),
        "gradients": worst(gradients(model), want),
        "undone": torch.equal(again.logits, expected.logits)
        and all(torch.equal(p, before[n]) for n, p in model.named_parameters()),
        "calls": sorted({message.call for message in log.messages}),
        "type": type(output).__name__ == type(expected).__name__ and next(iter(output)) == "loss",
    }


def linear_case(world: int, length: int) -> dict[str, Any] | None:
    """ByteLM with TNL layers, which is no Hugging Face model, called with ids alone."""
    group = group_of(world)
    if group is None:
        return None
    model, ids = tiny("linear"), tokens(2, length)
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    want = gradients(model)
    model.zero_grad()
    with context_parallel(model, group) as context, record() as log:
        own = model(ids)
        total = context.loss(own, ids)
        total.backward()
    states = log.chosen(kind="all_gather", what="state")
    return {
        "logits": gap(own, context.shard(logits)),
        "loss": gap(total, loss),
        "gradients": worst(gradients(model), want),
        "undone": torch.equal(model(ids), logits),
        "states": (len(states), sum(message.sent for message in states)),
        "gradient states": len(log.chosen(kind="all_gather", what="gradient of state")),
    }


@functools.cache
def mesh_of(*shape: int):
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp"))


def two_dimensions_case(wrap: str, steps: int = 2) -> dict[str, float]:
    """Data parallel x sequence parallel, 2 x 2: losses and weights after some steps, against one device."""
    mesh = mesh_of(2, 2)
    data = mesh.get_local_rank("dp")
    ids = [tokens(4, 24, seed=step) for step in range(steps)]
    labels = [x.clone() for x in ids]
    for x in labels:
        x[0, 3:] = -100  # so that the two halves of the batch have different numbers of labels
    alone, model = tiny("llama"), tiny("llama")
    averaged = wrap in ("DDP over all", "FSDP over all")
    inner: nn.Module = model
    if wrap == "DDP":
        model = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    elif wrap == "DDP over all":
        model = DistributedDataParallel(model)
    elif wrap.startswith("FSDP"):
        over = mesh._flatten() if averaged else mesh["dp"]
        for layer in model.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    learners = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, model)]
    losses = []
    with context_parallel(inner, mesh, gradients="averaged" if averaged else "sum"):
        for x, y in zip(ids, labels):
            expected = alone(input_ids=x, labels=y).loss
            expected.backward()
            mine = slice(2 * data, 2 * data + 2)
            loss = model(input_ids=x[mine], labels=y[mine]).loss
            loss.backward()
            losses.append(gap(loss, expected))
            found = worst(gradients(model), gradients(alone))
            for learner in learners:
                learner.step()
                learner.zero_grad()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in inner.named_parameters()}
    weights = max(gap(whole[n], p) for n, p in alone.named_parameters())
    return {"loss": max(losses), "gradients": found, "weights": weights}


def accumulated_case() -> float:
    """Gradients of two calls add up as they do on one device."""
    model, alone = tiny("llama"), tiny("llama")
    with context_parallel(model):
        for seed in (1, 2):
            ids = tokens(1, 16, seed)
            model(input_ids=ids, labels=ids).loss.backward()
            alone(input_ids=ids, labels=ids).loss.backward()
    return worst(gradients(model), gradients(alone))


def refused(kind: str, call: dict[str, Any], differ: bool = False, **options: Any) -> str:
    """What a rank says to a call that cannot be."""
    model = tiny(kind)
    if differ and dist.get_rank() == 2:
        call = {**call, "input_ids": call["input_ids"].flip(1)}
    try:
        with context_parallel(model, timeout=10, **options):
            model(**call)
    except (TypeError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


def dies_in_the_middle(culprit: int) -> str:
    """A rank fails within the model; what the others say."""
    model = tiny("llama")
    ids = tokens(1, 16)

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    try:
        with context_parallel(model, timeout=10):
            if dist.get_rank() == culprit:
                model.model.layers[1].register_forward_pre_hook(fail)
            model(input_ids=ids, labels=ids).loss.backward()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


def smollm2_case(world: int, length: int, method: str) -> dict[str, Any] | None:
    """SmolLM2 on documentation text."""
    group = group_of(world)
    if group is None:
        return None
    model, tokenizer = load_language_model("smollm2", dtype="float32")
    ids = tokenizer(python_documentation()[: 8 * length], return_tensors="pt").input_ids[:, :length]
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    want = gradients(model)
    model.zero_grad()
    with context_parallel(model, group, method=method) as context:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        logits = context.shard(expected.logits)
    assert output.logits.shape[1] == length // world == shard(ids, 0, world, dim=1, layout="zigzag").shape[1]
    return {
        "logits": gap(output.logits, logits),
        "loss": gap(output.loss, expected.loss),
        "gradients": worst(got := gradients(model), want),
        # Every parameter by itself: a small gradient does not hide behind the largest one.
        "each gradient": max(float((got[name] - g).norm() / g.norm()) for name, g in want.items()),
    }

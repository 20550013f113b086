"""Finding retrieval heads by optimising one gate per key/value head, the model itself staying frozen.

Two streams run through the model. The full one is the model as it is. In every layer of the mixed one::

    o_mixed = clamp(gate, 0, 1) * A_full(h_full) + (1 - clamp(gate, 0, 1)) * A_stream(h_mixed)

where A_full is the attention output of the *full* stream (no gradient; the paper's formula reads as if both terms used
the same input, the authors' code does not) and A_stream attends with the streaming mask to the mixed stream's own keys.
The gates learn to bring the final hidden states of both together while paying for being open.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819,
section 2.2, and the authors' training code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from manyheads.adapt.duo_attention import check_fits
from manyheads.data.files import write_atomically
from manyheads.data.needles import passkey_example
from manyheads.interpret.attach import attention_function, decoder, geometry
from manyheads.objectives.distillation import gate_regulariser, hidden_distillation


@dataclass(frozen=True)
class GateResult:
    """What an optimisation found.

    Attributes:
        gates: (layers, key/value heads) in [0, 1], on the CPU.
        losses: per step (distillation, mean gate).
        options: the settings, as they go into the config.json of a pattern folder.
    """

    gates: Tensor
    losses: list[tuple[float, float]]
    options: dict[str, Any] = field(default_factory=dict)


def two_way_hidden(
    model: PreTrainedModel, input_ids: Tensor, gates: Tensor, *, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Final hidden states (after the last norm) of the full and of the mixed stream.

    The two streams are run one after the other rather than as halves of one batch: the numbers are the same, and the
    backward pass costs one stream instead of two.

    Args:
        model: a Hugging Face causal language model; its weights get no gradient.
        input_ids: (batch, tokens) without padding.
        gates: (layers, key/value heads); values outside [0, 1] are clamped on use.
        sinks: S of the streaming mask.
        recent: R of the streaming mask.

    Returns:
        (full, mixed), each (batch, tokens, channels); ``mixed`` is differentiable in the gates.

    Source: arXiv 2410.10819, equation 1.
    """
    if recent < 1 or sinks < 0:
        raise ValueError(f"sinks={sinks} must be at least 0 and recent={recent} at least 1")
    outputs: dict[int, Tensor] = {}
    mask = streaming_mask(input_ids.shape[1], sinks, recent, input_ids.device)

    def full(call, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        out = sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)[0]
        outputs[call.layer] = out.detach()
        return out, None

    def mixed(call, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        gate = gates[call.layer].to(query.device).clamp(0, 1)
        gate = gate.repeat_interleave(query.shape[1] // key.shape[1])[:, None].to(query.dtype)
        stream = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        return gate * outputs[call.layer] + (1 - gate) * stream, None

    def no_mask(*_, attention_mask: Tensor | None = None, **__):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("the two-way step takes sequences of one length, without padding")
        return None

    check_fits(model, gates)
    body = decoder(model)[0]
    with _frozen(model):
        with attention_function(model, full, mask=no_mask), torch.no_grad():
            teacher = body(input_ids=input_ids, use_cache=False).last_hidden_state
        with attention_function(model, mixed, mask=no_mask):
            student = body(input_ids=input_ids, use_cache=False).last_hidden_state
    return teacher, student


def optimise_gates(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    steps: int = 2000,
    lr: float = 0.02,
    reg_weight: float = 0.05,
    sinks: int = 128,
    recent: int = 256,
    lengths: tuple[int, int] = (1000, 32000),
    passkeys: int = 10,
    words: int = 32,
    text: Any = None,
    examples: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    progress: bool = False,
    resume: str | Path | None = None,
) -> GateResult:
    """Gates of all key/value heads, optimised on passkeys hidden in a book; the model's weights stay as they are.

    AdamW without weight decay; the learning rate rises over the first fifth of the steps and falls over the last, never
    below a tenth. Gates start at 1 and are clamped to [0, 1] in place before every step.

    Args:
        model: any Hugging Face causal language model with full attention.
        tokenizer: its tokenizer; needed unless ``examples`` is given.
        steps, lr, reg_weight: as in the paper (2000, 0.02, 0.05).
        sinks, recent: of the streaming mask while training (the authors train with 128, 256 and deploy with 64, 256).
        lengths: shortest and longest book in tokens; 50 lengths evenly spaced between are drawn from.
        passkeys, words: of each example (10 and 32 in the paper).
        text: the book; None takes Python's documentation.
        examples: ``examples(step) -> (input_ids (1, tokens), supervised (1, tokens) bool)`` instead of passkeys.
        seed: of the examples; step s sees the same example in every run, so a resumed run equals a whole one.
        progress: show a progress bar.
        resume: a file that keeps the state: written every 20 steps and at the end, continued from where it exists.

    Raises:
        ValueError: steps < 1, neither tokenizer nor examples, a state file of other settings or another model.

    Source: arXiv 2410.10819, section 2.2; defaults of the authors' training script.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if tokenizer is None and examples is None:
        raise ValueError("optimise_gates needs a tokenizer, or examples of its own")
    if examples is None:
        examples = _passkeys(tokenizer, lengths, passkeys, words, text, seed)
    device = model.device
    sizes = geometry(model)
    gates = torch.ones(sizes.layers, sizes.kv_heads, device=device, requires_grad=True)
    options = dict(steps=steps, lr=lr, reg_weight=reg_weight, sink_size=sinks, recent_size=recent, seed=seed,
                   lengths=list(lengths), passkeys=passkeys, words=words)  # fmt: skip
    optimiser = torch.optim.AdamW([gates], lr=lr, weight_decay=0.0)
    losses = _load_state(resume, gates, optimiser, options) if resume is not None else []
    for step in _track(range(len(losses), steps), steps, progress):
        with torch.no_grad():
            gates.clamp_(0, 1)
        optimiser.param_groups[0]["lr"] = lr * _schedule(step, steps)
        input_ids, supervised = (tensor.to(device) for tensor in examples(step))
        full, mixed = two_way_hidden(model, input_ids, gates, sinks=sinks, recent=recent)
        distil, price = hidden_distillation(mixed, full, supervised), gate_regulariser(gates)
        (gates.grad,) = torch.autograd.grad(distil + reg_weight * price, [gates])
        optimiser.step()
        losses.append((distil.item(), price.item()))
        if resume is not None and (len(losses) % 20 == 0 or len(losses) == steps):
            _save_state(resume, gates, optimiser, losses, options)
    return GateResult(gates.detach().clamp(0, 1).cpu(), losses, options)


def streaming_mask(tokens: int, sinks: int, recent: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (1, 1, tokens, tokens): key j <= query i, and i - j < recent or j < sinks."""
    query, key = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    return ((key <= query) & ((query - key < recent) | (key < sinks)))[None, None]


def _schedule(step: int, steps: int) -> float:
    fifth = max(steps / 5, 1)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _passkeys(tokenizer, lengths, passkeys, words, text, seed) -> Callable[[int], tuple[Tensor, Tensor]]:
    steps = torch.linspace(lengths[0], lengths[1], 50).round().long().tolist()

    def example(step: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        length = steps[int(torch.randint(len(steps), (), generator=draw))]
        offset = int(torch.randint(1_000_000, (), generator=draw))
        made = passkey_example(
            tokenizer, length=length, passkeys=passkeys, words=words, text=text, offset=offset,
            seed=seed * 1_000_003 + step,
        )  # fmt: skip
        return torch.tensor([made.ids]), torch.tensor([made.supervised])

    return example


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _track(steps: range, total: int, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, "optimising gates", total=total, completed=steps.start)


def _save_state(path, gates: Tensor, optimiser, losses: list, options: dict) -> None:
    state = optimiser.state[gates]
    tensors = {
        "gates": gates.detach().cpu(),
        "exp_avg": state["exp_avg"].cpu(),
        "exp_avg_sq": state["exp_avg_sq"].cpu(),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }
    write_atomically(path, save(tensors, metadata={"options": json.dumps(options)}))


def _load_state(path, gates: Tensor, optimiser, options: dict) -> list[tuple[float, float]]:
    if not Path(path).is_file():
        return []
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = json.loads((file.metadata() or {})["options"])
            tensors = {name: file.get_tensor(name) for name in ("gates", "exp_avg", "exp_avg_sq", "losses")}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not the state of a gate optimisation: {error}") from error
    differing = sorted(name for name, value in options.items() if stored.get(name) != value)
    if differing:
        raise ValueError(f"{path} belongs to a run with other settings: {', '.join(differing)}")
    if tensors["gates"].shape != gates.shape:
        raise ValueError(f"{path} has gates {tuple(tensors['gates'].shape)}, this model needs {tuple(gates.shape)}")
    with torch.no_grad():
        gates.copy_(tensors["gates"])
    losses = [tuple(pair) for pair in tensors["losses"].tolist()]
    state = {
        "step": torch.tensor(float(len(losses))),
        **{k: tensors[k].to(gates.device) for k in ("exp_avg", "exp_avg_sq")},
    }
    optimiser.load_state_dict({"state": {0: state}, "param_groups": optimiser.state_dict()["param_groups"]})
    return losses

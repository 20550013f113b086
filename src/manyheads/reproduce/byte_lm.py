"""A byte-level language model small enough to train in a minute: what the lightning claims compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data.text import documentation_split
from manyheads.layers.lightning import TNLAttention

WIDTH, LAYERS, HEADS, TOKENS, BATCH = 128, 4, 4, 128, 12


class _SoftmaxAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class _GatedUnit(nn.Module):
    """SGLU of TNL: (W1 x) * (W2 x), then W3, no activation."""

    def __init__(self, hidden: int = 352):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).chunk(2, dim=-1)
        return self.down(left * right)


class _SimpleRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class ByteLM(nn.Module):
    """``kind`` "tnl" (lightning attention, gated unit, simple RMS norm, no positions) or "gpt" of about equal size.

    ``decay=False`` sets all slopes to 0; ``backend`` is the operator's.
    """

    def __init__(self, kind: str, *, decay: bool = True, backend: str = "auto"):
        super().__init__()
        self.tnl = kind == "tnl"
        self.embed = nn.Embedding(256, WIDTH)
        self.positions = None if self.tnl else nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList()
        for layer in range(LAYERS):
            if self.tnl:
                mixer = TNLAttention(WIDTH, HEADS, layer_idx=layer, num_layers=LAYERS, backend=backend)
                if not decay:
                    mixer.slopes.zero_()
                parts = _SimpleRMSNorm(), mixer, _SimpleRMSNorm(), _GatedUnit()
            else:
                mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
                parts = nn.LayerNorm(WIDTH), _SoftmaxAttention(), nn.LayerNorm(WIDTH), mlp
            self.blocks.append(nn.ModuleList(parts))
        self.norm = _SimpleRMSNorm() if self.tnl else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x * WIDTH**0.5 if self.positions is None else x + self.positions
        for first, mixer, second, channel in self.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            x = x + mixer(first(x))
            x = x + channel(second(x))
        return self.head(self.norm(x))


def train_byte_lm(model: ByteLM, seed: int, *, steps: int = 300, rate: float = 3e-3) -> tuple[list[float], float]:
    """(training losses, test loss) in nats per byte, on Python's documentation; the seed fixes the batches."""
    train, test = (torch.tensor(list(text.encode()), dtype=torch.long) for text in documentation_split())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warmup, 1)),
        ],
        [warmup],
    )
    window, losses = torch.arange(TOKENS + 1), []
    for _ in range(steps):
        starts = torch.randint(len(train) - TOKENS, (BATCH, 1), generator=generator)
        loss = _loss(model, train[starts + window])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    starts = torch.linspace(0, len(test) - TOKENS - 1, 64).long()[:, None]
    with torch.no_grad():
        return losses, _loss(model, test[starts + window]).item()


def _loss(model: ByteLM, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

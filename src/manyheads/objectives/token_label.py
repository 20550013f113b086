"""Training with a label for every token, and with images mixed after the stem.

    mix-token:  a box of the stem's map is swapped with another image's, the dense logits in it are swapped back
    loss:       CE(class logits, class target) + 0.5 CE(dense logits, dense targets)

Source: "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858, as
"SpectFormer", arXiv 2304.06446, trains its hierarchical models.
"""

from __future__ import annotations

import torch
from torch import Tensor

Box = tuple[int, int, int, int]


def mix_tokens(maps: Tensor, *, cell: int = 8, generator: torch.Generator | None = None) -> tuple[Tensor, Box]:
    """Swap a random box of every map with that of the image at the other end of the batch.

    With lambda uniform in (0, 1) (a Beta(1, 1)), the box has sqrt(1 - lambda) of each side and lies anywhere, cut at
    the border, in whole cells.

    Args:
        maps: (batch, X, Y, channels), sides that ``cell`` divides.
        cell: positions of the map a side that one dense label covers.
        generator: of the random numbers, on the CPU.

    Returns:
        The mixed maps, and the box (x1, y1, x2, y2) in cells, x counting rows.

    Raises:
        ValueError: sides that ``cell`` does not divide.

    >>> import torch
    >>> mixed, box = mix_tokens(torch.randn(4, 56, 56, 8))
    >>> mixed.shape, 0 <= box[0] <= box[2] <= 7
    (torch.Size([4, 56, 56, 8]), True)
    """
    if maps.ndim != 4 or maps.shape[1] % cell or maps.shape[2] % cell:
        raise ValueError(
            f"maps must be (batch, X, Y, channels) with sides divisible by {cell}, got {tuple(maps.shape)}"
        )
    share, *centre = torch.rand(3, generator=generator).tolist()
    spans = []
    for side, middle in zip((maps.shape[1] // cell, maps.shape[2] // cell), centre):
        half, at = int(side * (1 - share) ** 0.5) / 2, int(middle * side)
        spans.append((max(int(at - half), 0), min(int(at + half), side)))
    (x1, x2), (y1, y2) = spans
    mixed = maps.clone()
    rows, columns = slice(x1 * cell, x2 * cell), slice(y1 * cell, y2 * cell)
    mixed[:, rows, columns] = maps.flip(0)[:, rows, columns]
    return mixed, (x1, y1, x2, y2)


def unmix_tokens(dense: Tensor, box: Box, grid: tuple[int, int]) -> Tensor:
    """Dense logits (batch, tokens, classes) with those inside the box swapped back to their own images.

    >>> import torch
    >>> unmix_tokens(torch.randn(4, 49, 10), (0, 0, 3, 3), (7, 7)).shape
    torch.Size([4, 49, 10])
    """
    inside = torch.zeros(grid, dtype=torch.bool, device=dense.device)
    inside[box[0] : box[2], box[1] : box[3]] = True
    return torch.where(inside.flatten()[:, None], dense.flip(0), dense)


def token_label_loss(
    class_logits: Tensor, dense_logits: Tensor, target: Tensor, *, box: Box | None = None, ground_truth: bool = False
) -> Tensor:
    """Cross entropy of the class and, at half weight, of every token, against soft targets.

    Args:
        class_logits: (batch, classes).
        dense_logits: (batch, tokens, classes), swapped back (``unmix_tokens``).
        target: (batch, classes, 2 + tokens): the ground truth, the annotator's class target, its dense targets.
        box: where tokens were mixed; the class target then mixes those of both images by the area of the box.
        ground_truth: first mix the ground truth into the class target, by half where both name the same class, by a
            tenth where they do not.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit.

    Source: arXiv 2104.10858, equation 4.

    >>> import torch
    >>> token_label_loss(torch.zeros(2, 10), torch.zeros(2, 4, 10), torch.full((2, 10, 6), 0.1)).item() > 3.4
    True
    """
    tokens = dense_logits.shape[1]
    wanted = (*class_logits.shape, 2 + tokens)
    if tuple(target.shape) != wanted or dense_logits.shape[2] != class_logits.shape[1]:
        raise ValueError(f"target for {tokens} tokens must have shape {wanted}, got {tuple(target.shape)}")
    truth, label, dense = target[..., 0], target[..., 1], target[..., 2:].mT
    if ground_truth:
        agree = truth.argmax(1, keepdim=True) == label.argmax(1, keepdim=True)
        kept = torch.where(agree, 0.5, 0.9).to(label.dtype)
        label = kept * label + (1 - kept) * truth
    if box is not None:
        own = 1 - (box[2] - box[0]) * (box[3] - box[1]) / tokens
        label = own * label + (1 - own) * label.flip(0)
    return _cross_entropy(class_logits, label) + 0.5 * _cross_entropy(dense_logits, dense)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.float().log_softmax(-1)).sum(-1).mean()

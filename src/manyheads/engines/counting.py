"""Operations inside our custom operators, for torch's counter, to which an operator is one opaque call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula


def count_inside(operator: CustomOpDef, *, more: Callable[..., int] | None = None) -> CustomOpDef:
    """Let ``FlopCounterMode`` count what the operator computes: while it counts, the operator runs a second time.

    Args:
        operator: computes by functions that the counter knows.
        more: of the operator's arguments, the operations that the counter does not know.

    >>> @count_inside
    ... @torch.library.custom_op("manyheads::doctest_product", mutates_args=())
    ... def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ...     return a @ b
    >>> with FlopCounterMode(display=False) as counter:
    ...     _ = product(torch.ones(2, 3), torch.ones(3, 5))
    >>> counter.get_total_flops()
    60
    """
    namespace, name = operator._qualname.split("::")

    @register_flop_formula(getattr(getattr(torch.ops, namespace), name), get_raw=True)
    def count(*args: Any, out_val: Any = None, **options: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            operator._init_fn(*args, **options)
        return int(counter.get_total_flops()) + (more(*args, **options) if more else 0)

    return operator

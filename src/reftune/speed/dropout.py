"""Dropout on CPUs by 16-bit random numbers, four of which come from one draw of the generator.

torch draws one number for each element there, and most of the time of dropout goes into it. The
share that is dropped is p to 2^-17; the seed decides which elements, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from reftune.speed.patch import forward_replaced

VALUES = 1 << 16


def kept(like: Tensor, p: float) -> Tensor:
    """Return, of the shape and dtype of `like`, 0 for the share p, else what keeps the mean."""
    dropped = round(p * VALUES)
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    numbers = draws.random_(-(1 << 63), None).view(torch.int16)[: like.numel()]
    keep = numbers >= dropped - VALUES // 2
    return keep.to(like.dtype).mul_(VALUES / max(VALUES - dropped, 1)).view(like.shape)


def faster(model: nn.Module) -> AbstractContextManager[None]:
    """Let the dropout of a model on a CPU draw its numbers so, in a block."""
    modules = [
        m for m in model.modules() if type(m) is nn.Dropout and not m.inplace and 0 < m.p < 1
    ]
    return forward_replaced(modules, _forward)


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    plain, p = module.forward, float(module.p)  # type: ignore[arg-type]

    def run(x: Tensor) -> Tensor:
        if not module.training or x.device.type != "cpu" or torch.compiler.is_compiling():
            return plain(x)  # type: ignore[no-any-return]
        return x * kept(x, p)

    return run

"""Cross-entropy of the rows that have a label, with the logits of a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256
"""Rows whose logits exist at a time: with 256k words and float32, 256 MiB."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `F.linear(h, weight, bias)`, both constants.

    The gradient is computed along with the loss, chunk by chunk, so that no chunk's logits are kept
    or computed twice (as in Liger's kernel; torch 2.13's own `linear_cross_entropy` returns the
    loss in the dtype of h, which in bfloat16 has three digits).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        gradient = torch.empty_like(h)
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            wanted = target[rows, None]
            log_p = F.linear(h[rows], weight, bias).float().log_softmax(-1)
            loss -= log_p.gather(1, wanted).sum()
            p = log_p.exp_()
            p.scatter_add_(1, wanted, p.new_full((1, 1), -1.0).expand_as(wanted))
            gradient[rows] = p.to(h.dtype) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In float32: in bfloat16 one over the number of labels has three digits.
        return (gradient.float() * grads[0]).to(gradient.dtype), None, None, None


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | int | None
) -> Tensor:
    """Return the cross-entropy, float32, of rows h (N, d) and target (N,), over `count` (None: N).

    `weight` (V, d) and `bias` (V,) are frozen.
    """
    if len(h) <= CHUNK:
        loss = F.cross_entropy(F.linear(h, weight, bias).float(), target, reduction="sum")
    else:
        loss = _LinearCrossEntropy.apply(h, weight, bias, target)  # type: ignore[no-untyped-call]
    return loss / (len(target) if count is None else count)


def cross_entropy(logits: Tensor, target: Tensor, count: Tensor | int | None) -> Tensor:
    """Return the cross-entropy of logits (N, V), as transformers' `ForCausalLMLoss` computes it."""
    loss = F.cross_entropy(logits.float(), target, reduction="sum")
    return loss / (len(target) if count is None else count)

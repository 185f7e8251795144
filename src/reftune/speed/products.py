"""Attention of short sequences on CPUs, by plain matrix products.

torch's attention on CPUs takes two to three times as long in its backward as these products do
(torch 2.13), and in bfloat16 longer still. Query heads that share a key head are folded into one
product, and causal attention is computed in blocks of queries, each with the keys up to its end.
The probabilities of long sequences are computed again in the backward.

Shapes: B batch, H query heads, K key heads, N = B*K, G = H/K, S queries, T keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reftune.speed.dropout import kept

BLOCK = 32
"""Queries per block of causal attention."""
KEPT = 256
"""Keys up to which the S*T probabilities of each head are kept for the backward."""
LONGEST = 2048
"""Keys up to which the products are used."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scale * Q K^T + mask) V, (B, H, S, D), of Q (B, H, S, D), K, V (B, K, T, D).

    `mask` (B or 1, 1, S or 1, T) is added, or tells what is attended. With `causal`, query i
    attends to keys up to i (S = T). The share `dropout` of the probabilities is dropped.
    """
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, _LOWEST)
    elif mask is not None:
        mask = mask.clamp(min=torch.finfo(mask.dtype).min)
    out: Tensor = _Attention.apply(query, key, value, mask, causal, scale, dropout)  # type: ignore[no-untyped-call]
    return out


_LOWEST = torch.finfo(torch.float32).min  # not -inf: a row may have nothing to attend to


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
    ) -> Tensor:
        B, H, S, D = query.shape
        k, v = (t.reshape(-1, t.shape[2], D) for t in (key, value))
        q = (query * scale).reshape(len(k), -1, S, D)
        if k.dtype.itemsize < 4:
            # The softmax is the same of keys less any vector. What they have in common, a bias of
            # Qwen2's, adds up to nothing in the gradient, but for its rounding.
            k = (k - k.mean(1, keepdim=True, dtype=torch.float32)).to(k.dtype)
        out, saved = q.new_empty(q.shape), []
        for rows, columns in _blocks(S, k.shape[1], causal):
            q_i = _folded(q, rows)
            p = _probabilities(q_i, k[:, columns], mask, rows, causal, B)
            dropped = kept(p, dropout) if dropout else None
            out[:, :, rows] = ((p if dropped is None else p * dropped) @ v[:, columns]).view(
                out[:, :, rows].shape
            )
            keep = dropout > 0 or columns.stop <= KEPT
            saved += [q_i, p if keep else None, dropped]
        ctx.save_for_backward(k, v, mask, *saved)
        ctx.causal, ctx.scale = causal, scale
        return out.view(B, H, S, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, mask, *saved = ctx.saved_tensors
        B, _, S, D = grads[0].shape
        g = grads[0].reshape(len(k), -1, S, D)
        dq = g.new_empty(g.shape)
        dk, dv = (torch.zeros_like(t, dtype=_exact(t.dtype)) for t in (k, v))
        parts = iter(saved)
        for rows, columns in _blocks(S, k.shape[1], ctx.causal):
            q_i, p, dropped = next(parts), next(parts), next(parts)
            if p is None:
                p = _probabilities(q_i, k[:, columns], mask, rows, ctx.causal, B)
            g_i = _folded(g, rows)
            dv[:, columns] += (p if dropped is None else p * dropped).mT @ g_i
            dp = g_i @ v[:, columns].mT
            if dropped is not None:
                dp *= dropped
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, rows] = (ds @ k[:, columns]).view(dq[:, :, rows].shape)
            dk[:, columns] += ds.mT @ q_i
        shape = (B, -1, k.shape[1], D)
        dq = dq.mul_(ctx.scale).view(grads[0].shape)
        return dq, dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape), None, None, None, None


def _blocks(S: int, T: int, causal: bool) -> list[tuple[slice, slice]]:
    """Return queries and the keys that they attend to."""
    if not causal:
        return [(slice(0, S), slice(0, T))]
    ends = [*range(BLOCK, S, BLOCK), S]
    return [(slice(max(end - 1, 0) // BLOCK * BLOCK, end), slice(0, end)) for end in ends]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _folded(t: Tensor, rows: slice) -> Tensor:
    """Return rows of t (N, G, S, x) as (N, G*rows, x)."""
    return t[:, :, rows].reshape(len(t), -1, t.shape[-1])


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, causal: bool, B: int
) -> Tensor:
    """Return the softmax (N, G*rows, columns) of q (N, G*rows, D), scaled, k (N, columns, D)."""
    n, T = rows.stop - rows.start, k.shape[1]
    exact = _exact(q.dtype)
    s = (q.to(exact) @ k.to(exact).mT).view(B, -1, n, T)
    if mask is not None:
        s = s + (mask if mask.shape[2] == 1 else mask[:, :, rows])
    if causal:
        later = torch.ones(n, n, dtype=torch.bool, device=s.device).triu_(1)
        s[..., rows].masked_fill_(later, torch.finfo(s.dtype).min)
    return s.softmax(-1).to(q.dtype).view(len(q), -1, T)

"""Attention of short sequences on CPUs, by plain matrix products.

torch's attention on CPUs takes two to three times as long in its backward as these products do
(torch 2.13), and in bfloat16 longer still. Query heads that share a key head are folded into one
product, and causal attention is computed in blocks of queries, each with the keys up to its end.
The probabilities of long sequences are computed again in the backward.

Shapes: B batch, H query heads, K key heads, N = B*K, G = H/K, S queries, T keys, D head size.
Queries, outputs and their gradients stay as the projections lay them out, (B, S, H, D) in memory.
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
    return out.transpose(1, 2)


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
        if k.dtype.itemsize < 4:
            # The softmax is the same of keys less any vector. What they have in common, a bias of
            # Qwen2's, adds up to nothing in the gradient, but for its rounding.
            k = (k - k.mean(1, keepdim=True, dtype=torch.float32)).to(k.dtype)
        out = query.new_empty(B, S, H, D)
        heads = key.shape[1]
        q, out_q, saved = _by_key_head(query, heads), _by_key_head(out.transpose(1, 2), heads), []
        for rows, columns in _blocks(S, k.shape[1], causal):
            q_i = _folded(q, rows, scale)
            p = _probabilities(q_i, k[:, columns], mask, rows, causal, B)
            dropped = kept(p, dropout) if dropout else None
            block = (p if dropped is None else p * dropped) @ v[:, columns]
            out_q[:, :, :, rows] = block.view(out_q[:, :, :, rows].shape)
            keep = dropout > 0 or columns.stop <= KEPT
            saved += [q_i, p if keep else None, dropped]
        ctx.save_for_backward(k, v, mask, *saved)
        ctx.shape, ctx.causal, ctx.scale = key.shape, causal, scale
        return out  # not a view of it, which could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, mask, *saved = ctx.saved_tensors
        B, S, H, D = grads[0].shape
        dq, dk, dv = grads[0].new_empty(B, S, H, D).transpose(1, 2), None, None
        g, dq_q = (_by_key_head(t, ctx.shape[1]) for t in (grads[0].transpose(1, 2), dq))
        blocks = _blocks(S, k.shape[1], ctx.causal)
        # Backwards, as the last queries attend to all keys.
        for at in reversed(range(len(blocks))):
            rows, columns = blocks[at]
            q_i, p, dropped = saved[3 * at : 3 * at + 3]
            if p is None:
                p = _probabilities(q_i, k[:, columns], mask, rows, ctx.causal, B)
            g_i = _folded(g, rows)
            dv = _added(dv, columns, (p if dropped is None else p * dropped).mT @ g_i)
            dp = g_i @ v[:, columns].mT
            if dropped is not None:
                dp *= dropped
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq_i = dq_q[:, :, :, rows]
            torch.mul((ds @ k[:, columns]).view(dq_i.shape), ctx.scale, out=dq_i)
            dk = _added(dk, columns, ds.mT @ q_i)
        assert dk is not None
        assert dv is not None
        dk, dv = (t.to(k.dtype).view(ctx.shape) for t in (dk, dv))
        return dq, dk, dv, None, None, None, None


def _blocks(S: int, T: int, causal: bool) -> list[tuple[slice, slice]]:
    """Return queries and the keys that they attend to."""
    if not causal:
        return [(slice(0, S), slice(0, T))]
    ends = [*range(BLOCK, S, BLOCK), S]
    return [(slice(max(end - 1, 0) // BLOCK * BLOCK, end), slice(0, end)) for end in ends]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_key_head(t: Tensor, heads: int) -> Tensor:
    """Return a view (B, K, G, S, D) of t (B, H, S, D), with K key heads."""
    B, H, S, D = t.shape
    return t.view(B, heads, H // heads, S, D)


def _folded(t: Tensor, rows: slice, scale: float = 1.0) -> Tensor:
    """Return rows of t (B, K, G, S, D), times `scale`, as (N, G*rows, D)."""
    picked = t[:, :, :, rows]
    if scale != 1.0:
        scaled = picked.new_empty(picked.shape)
        picked = torch.mul(picked, scale, out=scaled)
    return picked.reshape(t.shape[0] * t.shape[1], -1, t.shape[-1])


def _added(total: Tensor | None, columns: slice, part: Tensor) -> Tensor:
    """Return the sum over keys (N, T, D), in float32 at least; the first part is of all keys."""
    part = part.to(_exact(part.dtype))
    if total is None:
        return part
    total[:, columns] += part
    return total


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, causal: bool, B: int
) -> Tensor:
    """Return the softmax (N, G*rows, columns) of q (N, G*rows, D), scaled, k (N, columns, D)."""
    n, T = rows.stop - rows.start, k.shape[1]
    exact = _exact(q.dtype)
    s = (q.to(exact) @ k.to(exact).mT).view(B, -1, n, T)
    if mask is not None:
        s += mask if mask.shape[2] == 1 else mask[:, :, rows]
    if causal:
        later = torch.ones(n, n, dtype=torch.bool, device=s.device).triu_(1)
        s[..., rows].masked_fill_(later, torch.finfo(s.dtype).min)
    return s.softmax(-1).to(q.dtype).view(len(q), -1, T)

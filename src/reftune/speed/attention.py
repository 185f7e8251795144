"""Attention in training: transformers' SDPA, where it is slow done otherwise, and for packed rows.

Registered with transformers as an attention implementation of its own; `in_training` puts it in
the place of "sdpa" for a block.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reftune.speed import products

NAME = "reftune_sdpa"
_PACKING = ("cu_seq_lens_k", "max_length_k", "position_ids")
# Code that does something else where the implementation is "sdpa", by its name.
_ASKS = re.compile(r"_attn_implementation\s*(?:==|!=|in\b|not in\b)[^\n]*[\"']sdpa[\"']")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention (B, S, H, D) of query, key and value (B, H, S, D), as transformers does.

    On a CPU short sequences take plain products (`speed.products`). For the others the backward of
    SDPA in bfloat16 takes up to ten times as long as in float32 (torch 2.13), so it is computed in
    float32 there.
    """
    if kwargs.get("cu_seq_lens_q") is not None and _fits_window(kwargs):
        return _packed(module, query, key, value, **kwargs), None
    if (scale := _short(module, query, key, value, attention_mask, kwargs)) is not None:
        causal, dropout = attention_mask is None, kwargs.get("dropout", 0.0)
        out = products.attention(query, key, value, attention_mask, causal, scale, dropout)
        return out.transpose(1, 2).contiguous(), None
    dtype = query.dtype
    if dtype is torch.bfloat16 and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out.to(dtype), None


def _short(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> float | None:
    """Return the scale of an attention that plain products compute faster, else None."""
    S, T, D = query.shape[2], key.shape[2], query.shape[3]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = (
        query.device.type == "cpu"
        and 1 < S <= T <= products.LONGEST
        and query.dtype == key.dtype == value.dtype
        and value.shape == key.shape
        and len(query) == len(key)
        and (mask is not None or (causal and S == T))
        and (mask is None or (mask.shape[1] == 1 and not mask.requires_grad))
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if not plain:
        return None
    scale = kwargs.get("scaling")
    return D**-0.5 if scale is None else float(scale)


def _fits_window(kwargs: dict[str, Any]) -> bool:
    """Return whether a sliding window, if the layer has one, holds the longest packed sequence."""
    window = kwargs.get("sliding_window")
    return window is None or kwargs["max_length_q"] <= window


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> Tensor:
    """Return the attention (1, N, H, D) of sequences packed into one row, none across another.

    They are unpacked for the attention alone: nothing else is computed on padding.
    """
    starts, ends = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    column = torch.arange(max_length_q, device=query.device)
    real = column < ends - starts
    rows = torch.where(real, starts + column, starts)

    def unpack(t: Tensor) -> Tensor:
        return t[0].transpose(0, 1)[rows].transpose(1, 2)  # (B, H, S, D)

    given = {k: v for k, v in kwargs.items() if k not in _PACKING}
    out, _ = attention(module, unpack(query), unpack(key), unpack(value), None, **given)
    return out.flatten(0, 1).index_select(0, _flat(starts, column, real)[: query.shape[2]])[None]


def _flat(starts: Tensor, column: Tensor, real: Tensor) -> Tensor:
    """Return where each packed token is in the flattened (B*S) unpacked ones, without a sync."""
    B, S = real.shape
    flat = torch.arange(B * S, device=real.device)
    packed = torch.where(real.flatten(), (starts + column).flatten(), B * S)
    return flat.new_zeros(B * S + 1).scatter(0, packed, flat)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def in_training(model: PreTrainedModel) -> Iterator[None]:
    """Use `attention` in a block where the model uses transformers' SDPA."""
    before = _implementations(model)
    can_set = model._can_set_attn_implementation() and not _asks_for_sdpa(model)
    if before[""] != "sdpa" or not can_set:
        yield
        return
    try:
        model.set_attn_implementation({k: NAME if v == "sdpa" else v for k, v in before.items()})
        yield
    finally:
        model.set_attn_implementation(before)


def _asks_for_sdpa(model: PreTrainedModel) -> bool:
    """Return whether a model masks keys by itself, say, for attention that is named "sdpa"."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    files = [sys.modules[name] for name in {type(part).__module__ for part in parts}]
    try:
        return any(_ASKS.search(inspect.getsource(file)) for file in files)
    except (OSError, TypeError):  # without a source it is not known
        return True


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Return the attention of a model, "", and of each of its parts, as transformers takes them."""
    parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
    given = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **given}

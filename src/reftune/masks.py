"""What models are called with: by name, and masks, shapes and cache lengths from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import PositionError

_CACHES = ("past_key_values", "cache_params", "state")  # transformers', Mamba's, RWKV's names


@dataclass(eq=False)
class Entry:
    """A module that may be called from outside, on the way to the edited layers of a model.

    Attributes:
        model: identifies the model; calls of its other entries within a call are not outermost.
        causal_lm: whether `labels` are those of a causal language model.
        argument_names: of `forward`, to tell positional arguments.
        generated: whether all its tokens are: it is the decoder of an encoder-decoder.
        pads_right: whether the model itself may pad what it is given, on the right.
    """

    model: object
    causal_lm: bool
    argument_names: list[str]
    generated: bool = False
    pads_right: bool = False

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name."""
        return {**dict(zip(self.argument_names, args, strict=False)), **kwargs} if args else kwargs


def entry_of(
    module: nn.Module,
    model: object,
    causal_lm: bool,
    generated: bool = False,
    pads_right: bool = False,
) -> Entry:
    """Describe `module` as an entry of `model`."""
    names = list(inspect.signature(module.forward).parameters)
    return Entry(model, causal_lm, names, generated, pads_right)


def as_token_mask(mask: Any, ids: Any) -> Tensor | None:
    if isinstance(mask, dict):  # one mask per kind of attention: all agree on what is padding
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 3 and isinstance(ids, Tensor) and ids.dim() == 3:
        return mask.flatten(0, 1)
    return mask if mask.dim() in (2, 4) else None


def diagonal(mask: Tensor, past: int, S: int) -> Tensor:
    """Return which tokens of a forward a (B, 1, S, T) mask does not pad: they see themselves."""
    if mask.shape[2] != S or mask.shape[3] < past + S:
        return torch.ones(mask.shape[0], past + S, dtype=torch.bool, device=mask.device)
    own = mask[:, 0, :, past : past + S].diagonal(dim1=-2, dim2=-1)
    seen = own if own.dtype == torch.bool else own > -1
    return torch.nn.functional.pad(seen, (past, 0), value=True)


def match_batch(t: Tensor, B: int) -> Tensor | None:
    """Repeat the rows of `t` for beams and sampled sequences; None where it cannot fit B."""
    if t.shape[0] == B:
        return t
    return (
        t.repeat_interleave(B // t.shape[0], dim=0) if t.shape[0] and B % t.shape[0] == 0 else None
    )


def require_batch(name: str, t: Tensor, B: int) -> Tensor:
    fitted = match_batch(t, B)
    if fitted is None:
        raise PositionError(f"{name} has {t.shape[0]} rows, the batch has {B} examples.")
    return fitted


def fit(mask: Tensor, T: int, name: str, value: bool = False) -> Tensor:
    if mask.shape[1] > T:
        raise PositionError(f"{name} has {mask.shape[1]} columns, the sequence has {T} tokens.")
    return torch.nn.functional.pad(mask, (0, T - mask.shape[1]), value=value)


def tokens_shape(ids: Any, embeddings: Any) -> tuple[int, int] | None:
    """Return (B, S) of a call with token ids or embeddings."""
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.shape[0], ids.shape[1]
    if isinstance(embeddings, Tensor) and embeddings.dim() == 3:
        return embeddings.shape[0], embeddings.shape[1]
    return None


def packed_ends(given: Any, shape: tuple[int, int] | None) -> Tensor | None:
    """Return where the sequences packed into one row end, as attention kernels are told it."""
    is_told = isinstance(given, Tensor) and given.dim() == 1 and len(given) > 1
    return given if is_told and shape is not None and shape[0] == 1 else None


def past_length(call: dict[str, Any], ids: Any, unknown: int) -> int | Tensor:
    """Return how many tokens the cache holds; `unknown` where it holds some and does not count."""
    cache = next((call[name] for name in _CACHES if call.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            length: int | Tensor = cache.get_seq_length()
            # A static cache gives the tensor that its layers increment during this very forward.
            return length.clone() if isinstance(length, Tensor) else length
        except ValueError:  # a cache of linear attention alone does not count its tokens
            if not cache.has_previous_state():
                return 0
    mask, present = call.get("attention_mask"), call.get("inputs_embeds") if ids is None else ids
    if isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(present, Tensor):
        past = mask.shape[1] - present.shape[1]
        if past > 0:
            return past
    return unknown

"""`generate` of a causal language model with a ReFT: it says where its prompt ends.

Only there is that known, whatever cache the call goes on with.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from reftune.context import CURRENT_OPTIONS
from reftune.errors import PositionError
from reftune.masks import past_length
from reftune.positions import SlotKey
from reftune.spans import PAGED, generation
from reftune.trainers import active_keys

ROOT = "_reft_root"  # the attribute of a model that holds its edited layers
GUIDED = (
    "guidance_scale={scale} has `generate` call the model on another prompt between the steps "
    "(classifier-free guidance), of which ReFT is not told where it ends. Leave guidance_scale "
    "out, or compute both in forwards of your own, with prompt_lengths."
)


# With the name of what it wraps it would be pickled as that, and a copy would lose the wrapper.
@functools.wraps(GenerationMixin.generate, assigned=("__doc__",), updated=())
def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("cache_implementation") == "paged":
        raise PositionError(PAGED)
    keys = active_keys(list(vars(self)[ROOT].layers.values()))
    scale = _guidance(self, args, kwargs)
    if scale not in (None, 1) and keys:
        raise PositionError(GUIDED.format(scale=scale))
    given = [inputs, kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs")]
    prompt = next((t for t in given if isinstance(t, Tensor)), None)
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    columns = 1 if prompt is None else prompt.shape[1]  # 1: generate starts from a BOS
    past = int(past_length(kwargs, prompt, 0))
    if mask is not None:
        columns = max(columns, mask.shape[1])  # the ids may be those after a cache alone
    if past and not CURRENT_OPTIONS.get().tell_prompt:
        _warn_of_earlier_edits(keys, past)
    with generation(columns, mask):
        return type(self).generate(self, inputs, *args, **kwargs)


def _guidance(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    config = kwargs.get("generation_config") or (args[0] if args else None)
    own = getattr(model, "generation_config", None)
    said = (kwargs, getattr(config, "__dict__", {}), getattr(own, "__dict__", {}))
    return next((s["guidance_scale"] for s in said if s.get("guidance_scale") is not None), None)


def _warn_of_earlier_edits(keys: list[SlotKey], past: int) -> None:
    suffixes = any(key.positions.suffix or key.positions.everything for key in keys)
    if suffixes or any(_was_shortened(key, past) for key in keys):
        which = "last tokens of an earlier prompt (positions 'l...' or 'all') stay edited"
        if not suffixes:
            which = f"first tokens are edited as those of a prompt of {past}, so fewer of them"
        warnings.warn(
            f"generate goes on with a cache. In it the {which}, as in one longer prompt they are "
            "not: the result is another than without the cache. Give all tokens without it for "
            "that.",
            UserWarning,
            stacklevel=4,
        )


def _was_shortened(key: SlotKey, n: int) -> bool:
    """Return whether a prompt of n tokens has a shorter prefix than a long one."""
    prefix = key.positions.prefix
    return n < (2 * prefix if key.short_prompts == "pyreft" else prefix)

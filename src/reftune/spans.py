"""What one forward is about: where the prompt is, which adapters and which rows are on.

A `Span` is opened by a hook when a model's outermost module is called and closed when it returns;
the hooks of the layers read it. It lives in a context variable, so threads do not mix, and it is
made from the arguments of that one call, so two forwards before one backward do not either.

Who says where the prompt is, in this order: an explicit `prompt_mask` or `prompt_lengths` (an
argument of the forward, or `options(...)` around it); the labels of a causal language model; what
`generate` was given; the attention mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reftune.context import CURRENT_OPTIONS, FORWARD_OPTIONS, Current, Options
from reftune.errors import PositionError, ReftuneError
from reftune.masks import (
    Entry,
    as_token_mask,
    diagonal,
    fit,
    match_batch,
    packed_ends,
    past_length,
    require_batch,
    tokens_shape,
)
from reftune.positions import (
    Rows,
    SlotKey,
    assign_slots,
    before_first_label,
    on_device,
    segment_ids,
    slots_to_rows,
    take_columns,
)

T = TypeVar("T")

PAGED = (
    "transformers' continuous batching (generate_batch, cache_implementation='paged') does not say "
    "where prompts end, so ReFT cannot tell what to edit. Use generate with padded batches."
)


@dataclass
class _Generation:
    """What `generate` was given: how many columns the prompt has, and its mask if there was one.

    `seen` columns went through the model at least: where a static cache keeps its length on the
    device, this tells on the host when the prompt is over.
    """

    columns: int
    mask: Tensor | None
    seen: int = 0


_generation: Current[_Generation | None] = Current("reftune_generation", None)
_span: Current[Span | None] = Current("reftune_span", None)


@dataclass(eq=False)
class Span:
    """One call of a model: the facts from which each adapter's rows follow.

    Shapes: B examples, T columns of the whole sequence, S columns of this forward.
    """

    owner: nn.Module | None = None
    model: object | None = None
    outer: Span | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    packed_ends: Tensor | None = None  # (N + 1,) from 0: of N sequences packed into one row
    past: int | Tensor = 0
    generated: bool = False
    pads_right: bool = False
    shape: tuple[int, int] | None = None  # (B, S) of this call, where it has ids or embeddings
    seen: int = 0
    options: Options = field(default_factory=Options)
    generation: _Generation | None = None
    idle: bool = False  # known to edit nothing, as at decode
    cache: dict[Any, Any] = field(default_factory=dict)

    def tells_no_prompt(self, entry: Entry) -> bool:
        """Return whether only the attention mask says what the prompt of a language model is."""
        told = self.labels is not None or self.generation is not None or self.options.tell_prompt
        return entry.causal_lm and not told

    def is_past_prompt(self, S: int) -> bool:
        """Return whether this forward of S tokens is known to hold no prompt (reads no tensor)."""
        o = self.options
        if self.generated:
            return True
        if self.labels is not None:
            return False
        if not isinstance(self.past, int):
            seen_all = self.generation is not None and self.seen >= self.generation.columns
            return seen_all and not o.tell_prompt
        if self.past == 0:
            return False
        if o.prompt_lengths is not None:
            return self.generation is not None and self.past >= self.generation.columns
        if o.prompt_mask is not None:
            return self.past >= o.prompt_mask.shape[1]
        if self.generation is not None:
            return self.past >= self.generation.columns
        return self.mask is None or self.mask.dim() != 2 or self.mask.shape[1] <= self.past + S

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what `make` returns, made once in this forward."""
        if key not in self.cache:
            self.cache[key] = make()
        found: T = self.cache[key]
        return found

    def prompt(self, B: int, S: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the prompt's mask (B, T), the attended tokens' (B, T), and segment ids or None."""
        return self.once(("prompt", B, S, device), lambda: self._prompt(B, S, device))

    def slots(
        self, key: Any, p: int | Tensor, s: int | Tensor, B: int, S: int, device: torch.device
    ) -> Tensor:
        """Return the slot of each of the S columns, K = `key.num_slots` where it is not edited."""
        cached = ("slots", key, B, S, device)
        return self.once(cached, lambda: self._slots(key, p, s, B, S, device))

    def rows(self, key: SlotKey, B: int, S: int, device: torch.device) -> Rows:
        """Return the rows of each slot; the examples of a packed row are those packed into it."""
        return self.once(("rows", key, B, S, device), lambda: self._rows(key, B, S, device))

    @property
    def is_packed(self) -> bool:
        """Return whether several sequences may share a row (position ids say where they start)."""
        return (
            self.position_ids is not None
            and self.position_ids.dim() == 2
            and (self.mask is None or self.mask.dim() != 2)
            and self.generation is None
            and isinstance(self.past, int)
            and self.past == 0
        )

    def is_dense(self, key: SlotKey, S: int) -> bool:
        """Return whether so many tokens may be edited that all are computed, and masked."""
        uncounted = self.is_packed and self.packed_ends is None and S > 1
        return key.positions.everything or key.edit_generated or uncounted

    def _prompt(self, B: int, S: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        attended = self._attended(B, S, device)
        segments = None
        if self.is_packed and self.position_ids is not None:
            ids = match_batch(self.position_ids.to(device), B)
            if ids is not None and ids.shape[1] == S:
                segments = segment_ids(ids, self.packed_ends)
        o, T = self.options, attended.shape[1]
        if o.prompt_mask is not None:
            explicit = require_batch("prompt_mask", on_device(o.prompt_mask, device), B).bool()
            return fit(explicit, T, "prompt_mask") & attended, attended, segments
        if o.prompt_lengths is not None:
            lengths = self._lengths(o.prompt_lengths, B, device)[:, None]
            return attended & (attended.cumsum(-1) <= lengths), attended, segments
        if self.labels is not None:
            labels = match_batch(self.labels.to(device), B)
            past = self.past if isinstance(self.past, int) else -1
            if labels is not None and labels.shape[1] == S == T - past:
                labels = torch.nn.functional.pad(labels, (past, 0), value=-100)  # of the cache
                return before_first_label(labels, segments) & attended, attended, segments
        return self._without_labels(attended, S), attended, segments

    def _lengths(self, given: Tensor, B: int, device: torch.device) -> Tensor:
        lengths = on_device(torch.as_tensor(given), device).view(-1)
        return require_batch("prompt_lengths", lengths, B)

    def _without_labels(self, attended: Tensor, S: int) -> Tensor:
        T = attended.shape[1]
        if self.generation is not None:
            column = torch.arange(T, device=attended.device)
            return attended & (column < self.generation.columns)
        if isinstance(self.past, int):
            # A mask that reaches beyond this forward belongs to a prompt that comes in chunks.
            in_prompt = self.past == 0 or self.past + S < T
            return attended if in_prompt else torch.zeros_like(attended)
        return attended & (self.past == 0).to(attended.device)

    def _attended(self, B: int, S: int, device: torch.device) -> Tensor:
        """Return which of the T columns hold a token, T >= past + S where `past` is a number."""
        past = self.past if isinstance(self.past, int) else 0
        T = past + S
        if self.generation is not None:
            T = max(T, self.generation.columns)
        if self.options.prompt_mask is not None:
            T = max(T, self.options.prompt_mask.shape[1])
        mask = self._token_mask(past, S)
        if mask is not None:
            mask = match_batch(mask.to(device).ne(0), B)
        if self.pads_right and self.shape is not None and past == 0 and self.shape[1] < S:
            told = torch.ones(B, self.shape[1], dtype=torch.bool, device=device)
            mask = fit(told if mask is None else mask, S, "attention_mask")
        if mask is None or mask.shape[1] < past + S:
            # None was given, or it is another tower's: every token counts.
            return torch.ones(B, T, dtype=torch.bool, device=device)
        return fit(mask, max(T, mask.shape[1]), "attention_mask", value=True)

    def _token_mask(self, past: int, S: int) -> Tensor | None:
        mask, generation = self.mask, self.generation
        covers = mask is not None and mask.dim() == 2
        if generation is not None and generation.mask is not None:
            covers = covers and mask is not None and mask.shape[1] >= generation.columns
            if not covers:
                missing = max(0, past + S - generation.mask.shape[1])
                return torch.nn.functional.pad(generation.mask, (0, missing), value=1)
        if mask is not None and mask.dim() == 4:
            return diagonal(mask, past, S) if isinstance(self.past, int) else None
        return mask

    def _rows(self, key: SlotKey, B: int, S: int, device: torch.device) -> Rows:
        slot = self.slots(key, *key.counts, B, S, device)
        if self.is_packed and self.packed_ends is not None:
            segments = self.prompt(B, S, device)[2]
            if segments is not None:
                return slots_to_rows(slot, key.num_slots, segments, len(self.packed_ends) - 1)
        return slots_to_rows(slot, key.num_slots)

    def _slots(
        self, key: Any, p: int | Tensor, s: int | Tensor, B: int, S: int, device: torch.device
    ) -> Tensor:
        if self.generated:
            takes_part = on_device(p, device) + s > 0
            slot = key.num_slots - 1 if key.edit_generated else key.num_slots
            return torch.where(takes_part, slot, key.num_slots).expand(B, S)
        prompt, attended, segments = self.prompt(B, S, device)
        if key.positions.everything:  # p is 1, or tells for each example whether it takes part
            slot = torch.where(prompt & (on_device(p, device) > 0), 0, key.num_slots)
        else:
            o, lengths = self.options, None
            if o.prompt_lengths is not None and o.prompt_mask is None:
                # A prompt that comes in chunks is longer than what has been seen of it.
                lengths = self._lengths(o.prompt_lengths, B, device)
            slot = assign_slots(
                prompt,
                p,
                s,
                suffix_start=key.positions.prefix,
                empty=key.num_slots,
                rule=key.short_prompts,
                segments_BT=segments,
                lengths_B=lengths,
            )
        if key.edit_generated:
            takes_part = on_device(p, device) + s > 0
            slot = torch.where(attended & ~prompt & takes_part, key.num_slots - 1, slot)
            if isinstance(self.past, Tensor):  # how far the sequence goes is not known on the host
                generated = torch.where(takes_part, key.num_slots - 1, key.num_slots)
                slot = torch.cat([slot, generated.view(-1, 1).expand(B, S)], dim=1)
                past = self.past.clamp(max=slot.shape[1] - S)
                return take_columns(slot, past, S, key.num_slots)
        return take_columns(slot, self.past, S, key.num_slots)


def current_span() -> Span:
    """Return the span of the forward that is running.

    A layer that is called by itself, outside any model, has one where every token is prompt.
    """
    span = _span.get()
    compiling = torch.compiler.is_compiling()
    if span is None and not compiling and torch._C._current_graph_task_id() >= 0:
        raise ReftuneError(
            "An edited layer is recomputed during the backward, by a checkpointing wrapper that "
            "ReFT cannot see, where the prompt is not known. Use the model's own "
            "gradient_checkpointing_enable() (gradient_checkpointing=True of the Trainer)."
        )
    return span or Span(options=CURRENT_OPTIONS.get(), generation=_generation.get())


def is_idle() -> bool:
    """Return whether the forward that is running is known to edit nothing, as at decode."""
    span = _span.get()
    return span is not None and span.idle


def open_span(
    module: nn.Module, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Span | None]:
    """Open a span for the outermost call of a model; returns it, and the model's own arguments.

    Takes `prompt_mask`, `prompt_lengths` and `subspaces` out of the arguments. The span is None
    where the call is an inner one.
    """
    outer = _span.get()
    given = CURRENT_OPTIONS.get()
    if outer is not None and outer.model is entry.model and outer.owner is not module:
        if not entry.generated:
            _refine(outer, entry.bind(args, kwargs))
            return kwargs, None
        given = outer.options
    own = {k: kwargs[k] for k in FORWARD_OPTIONS if kwargs.get(k) is not None}
    if own:
        given = replace(given, **own)
    kwargs = {k: v for k, v in kwargs.items() if k not in FORWARD_OPTIONS}
    call = entry.bind(args, kwargs)
    if type(call.get("cache")).__name__ == "PagedAttentionCache":
        raise PositionError(PAGED)
    ids, position_ids, labels = (call.get(k) for k in ("input_ids", "position_ids", "labels"))
    shape = tokens_shape(ids, call.get("inputs_embeds"))
    is_token_labels = entry.causal_lm and isinstance(labels, Tensor) and labels.dim() == 2
    # Where a cache does not count, only that something is past is known; in `generate`, the prompt.
    generation = _generation.get()
    unknown = 1 if generation is None else generation.columns
    span = Span(
        owner=module,
        model=entry.model,
        outer=None if outer is not None and outer.owner is module else outer,
        mask=as_token_mask(call.get("attention_mask"), ids),
        labels=labels if is_token_labels else None,
        position_ids=position_ids if isinstance(position_ids, Tensor) else None,
        packed_ends=packed_ends(call.get("cu_seq_lens_q"), shape),
        past=past_length(call, ids, unknown),
        generated=entry.generated,
        pads_right=entry.pads_right,
        shape=shape,
        options=given,
        generation=generation,
    )
    if span.generation is not None and shape is not None and not torch.compiler.is_compiling():
        span.seen = span.generation.seen
        span.generation.seen += shape[1]
    _span.set(span)
    return kwargs, span


def close_span(module: nn.Module) -> None:
    """Close the span that this module opened; a forward hook that also runs after an exception."""
    span = _span.get()
    if span is not None and span.owner is module:
        _span.set(span.outer)


@dataclass(frozen=True)
class SpanCarrier:
    """A checkpointing function whose recomputation, in the backward, finds the span of its forward.

    By then the span is closed, and on an accelerator the backward runs in a thread of its own.
    """

    function: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        span = _span.get()

        def run_in_span(*args: Any, **kwargs: Any) -> Any:
            outer = _span.get()
            _span.set(span)
            try:
                return run(*args, **kwargs)
            finally:
                _span.set(outer)

        return self.function(run_in_span, *args, **kwargs)


@contextmanager
def generation(columns: int, mask: Tensor | None) -> Iterator[None]:
    """Say that the forwards in this block belong to a `generate` whose prompt has `columns`."""
    outer, span = _generation.get(), _span.get()
    _generation.set(_Generation(columns, mask))
    _span.set(None)
    try:
        yield
    finally:
        _generation.set(outer)
        _span.set(span)


def _refine(span: Span, call: dict[str, Any]) -> None:
    """Take a mask from an inner module where the outer one had none of tokens.

    A multiple-choice model is called with (B, C, S) and calls its backbone with (B*C, S).
    """
    mask = call.get("attention_mask")
    # Floats are added to attention's scores: 0 is a token there.
    tells = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
    span.mask = mask if span.mask is None and tells else span.mask

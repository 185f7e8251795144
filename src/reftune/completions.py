"""One batch: prompts -> completions, by transformers' `generate`.

Shapes: B = rows of a batch, L = padded prompt length, T = generated length.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, final

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from reftune.context import CURRENT_OPTIONS, options
from reftune.decoding import (
    RowsDone,
    StopOnEvent,
    StopOnText,
    WithoutEnds,
    has_plain_cache,
    require,
    settled_text,
    until_first_stop,
)
from reftune.errors import ReftConfigError

Model: TypeAlias = PreTrainedModel | PeftModel
FinishReason: TypeAlias = Literal["stop", "length", "decided"]
IsDecided: TypeAlias = Callable[[int, str], bool]
"""Tell, of a prompt's number and its completion so far, that more text would change nothing."""


@final
@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    `token_ids` ends before the end-of-sequence token, or that of `stop_token_ids`; after a stop
    string it includes the token that completed the string, while `text` ends before the string (as
    in vLLM). `finish_reason` is "stop" (any of the three), "length" (`max_new_tokens`) or "decided"
    (see `IsDecided`).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@final
@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    `temperature=0` is greedy; `top_p` and `top_k` (0: off) act only above it. With `num_beams > 1`
    the search ends as soon as that many candidates are complete (the paper's `early_stopping`).
    With a `seed`, the same call draws the same tokens; other random state is left as it was.
    A completion ends before a string of `stop`, and before a token of `stop_token_ids`: special
    tokens are not part of the text, so a string cannot stop at one.

    Raises:
        ReftConfigError: a value is outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("num_beams", self.num_beams >= 1, "1 (no beams) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1: off)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
        ):
            require(ok, name, getattr(self, name), accepted)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ReftConfigError(
                f"stop={self.stop!r} is not accepted: give a tuple of non-empty strings, "
                'for instance stop=("\\n",).'
            )
        ids = self.stop_token_ids
        if not isinstance(ids, tuple) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ReftConfigError(
                f"stop_token_ids={ids!r} is not accepted: give a tuple of the tokenizer's ids, "
                "for instance stop_token_ids=(2,)."
            )

    def recorded(self) -> dict[str, Any]:
        """Return the settings as files keep them: `stop_token_ids` only where there are some.

        Files from before there was that setting then say the same as new ones.
        """
        settings = dataclasses.asdict(self)
        if not self.stop_token_ids:
            del settings["stop_token_ids"]
        return settings


@final
@dataclass
class Rows:
    """Rows of a batch as the model sees them next; `index` of each among the prompts."""

    index: list[int]
    ids: torch.Tensor  # with what was generated so far
    mask: torch.Tensor  # of `ids`
    cache: Any = None  # of all of `ids` but the last

    def keep(self, kept: list[int], ids: torch.Tensor, cache: Any) -> "Rows":
        """Return the rows `kept`, going on after `ids`."""
        rows = torch.tensor(kept, device=ids.device)
        cache.batch_select_indices(rows)
        new = ids.shape[1] - self.mask.shape[1]
        mask = torch.nn.functional.pad(self.mask[rows], (0, new), value=1)
        return Rows([self.index[k] for k in kept], ids[rows], mask, cache)


def complete_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    adapter_names: Sequence[str] | None = None,
    is_decided: IsDecided | None = None,
) -> list[Completion]:
    """Return the completions of a batch of prompts.

    `is_decided` acts in greedy decoding only: in the others it would change what is drawn next.
    """
    rows = left_padded(prompts, model, tokenizer)
    if sampling.temperature > 0 or sampling.num_beams > 1:
        names = None if adapter_names is None else list(adapter_names)
        ids_BT, _ = call_generate(model, tokenizer, rows, sampling, adapter_names=names)
        found = dict(enumerate(ids_BT[:, rows.ids.shape[1] :].tolist()))
        decided: set[int] = set()
    else:
        found, decided = _complete_greedily(
            model, tokenizer, rows, sampling, adapter_names, is_decided
        )
    ends = end_ids(model, tokenizer, sampling)
    return [
        _completion(prompt, found[i], tokenizer, ends, sampling, i in decided)
        for i, prompt in enumerate(prompts)
    ]


def _complete_greedily(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    sampling: Sampling,
    adapter_names: Sequence[str] | None,
    is_decided: IsDecided | None,
) -> tuple[dict[int, list[int]], set[int]]:
    """Return what is generated for each row, and which rows were decided.

    On a CPU time grows with the number of rows, so those that are done leave the batch once they
    are a quarter of it: that pays for copying the cache of the others. (A GPU takes as long for
    fewer rows, and would wait for the host to count them.)
    """
    prompt_BL, length = rows.mask, rows.mask.shape[1]
    ends = _Ends(tokenizer, sampling, end_ids(model, tokenizer, sampling), is_decided)
    shrinks = len(rows.index) > 1 and _can_shrink(model)
    found: dict[int, list[int]] = {}
    while True:
        names = None if adapter_names is None else [adapter_names[i] for i in rows.index]
        done = None
        if shrinks or sampling.stop or is_decided is not None:
            enough = max(1, len(rows.index) // 4) if shrinks else len(rows.index)
            done = RowsDone(functools.partial(ends.at, rows.index), length, enough)
        # In a later part the prompt is not all that `generate` is given.
        with nullcontext() if rows.cache is None else options(prompt_mask=prompt_BL[rows.index]):
            ids, cache = call_generate(
                model, tokenizer, rows, sampling, length, adapter_names=names, done=done
            )
        kept = []
        for k, generated in enumerate(ids[:, length:].tolist()):
            end = None if done is None else done.ends[k]
            if end is None and done is not None and len(generated) < sampling.max_new_tokens:
                kept.append(k)
            else:
                found[rows.index[k]] = generated[:end]
        if not kept:
            return found, ends.decided
        rows = rows.keep(kept, ids, cache)


@final
@dataclass
class _Ends:
    """Where the completions of a batch end."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    tokens: set[int]
    is_decided: IsDecided | None
    decided: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        stop = self.sampling.stop
        self.stop = StopOnText(self.tokenizer, stop, 0) if stop else None

    def at(self, index: Sequence[int], k: int, ids: list[int]) -> bool:
        """Return whether row `k`, prompt `index[k]`, ends with the last of `ids`."""
        if ids[-1] in self.tokens or (self.stop is not None and self.stop.stopped(ids)):
            return True
        if self.is_decided is None:
            return False
        text = settled_text(self.tokenizer, ids, self.sampling.stop)
        if not self.is_decided(index[k], text):
            return False
        self.decided.add(index[k])
        return True


def _can_shrink(model: Model) -> bool:
    """Return whether rows may leave a batch: they do where that is faster and exact."""
    if model.device.type != "cpu" or not has_plain_cache(model):
        return False
    given, own = CURRENT_OPTIONS.get(), model.generation_config
    # What is told for the batch as it was does not fit what is left of it.
    by_row = (given.prompt_mask, given.prompt_lengths, given.subspaces, given.adapter_names)
    if any(told is not None for told in by_row):
        return False
    return own is None or own.cache_implementation is None


def _completion(
    prompt: list[int],
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    sampling: Sampling,
    decided: bool,
) -> Completion:
    end = next((k for k, token in enumerate(ids) if token in ends), None)
    reason: FinishReason = "decided" if decided else "length" if end is None else "stop"
    ids = ids[:end]
    kept, text = until_first_stop(tokenizer, ids, sampling.stop)
    if kept is not ids:
        reason = "stop"
    return Completion(tuple(prompt), tuple(kept), text, reason)


def left_padded(
    prompts: Sequence[list[int]], model: Model, tokenizer: PreTrainedTokenizerBase
) -> Rows:
    """Return prompts as rows of a batch."""
    length, pad = max(map(len, prompts)), pad_id(tokenizer, eos_ids(model, tokenizer))
    ids = [[pad] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    tensors = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
    return Rows(list(range(len(prompts))), *tensors)


def call_generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    sampling: Sampling,
    length: int | None = None,
    *,
    adapter_names: list[str] | None = None,
    done: RowsDone | None = None,
    streamer: TextIteratorStreamer | None = None,
    cancel: threading.Event | None = None,
) -> tuple[torch.Tensor, Any]:
    """Return the ids [B, L + T], padded on the right, and the cache if `done` lets rows go on.

    `length` is that of the prompt, L, where `rows` go on.
    """
    length = rows.ids.shape[1] if length is None else length
    criteria = StoppingCriteriaList()
    if done is not None:
        criteria.append(done)
    elif sampling.stop:
        criteria.append(StopOnText(tokenizer, sampling.stop, length))
    if cancel is not None:
        criteria.append(StopOnEvent(cancel))
    config = _generation_config(model, tokenizer, sampling, length, rows.ids.shape[1])
    arguments: dict[str, Any] = {}
    if adapter_names is not None:
        # PEFT repeats names for beams only when it sees num_beams as an argument of generate,
        # where transformers no longer wants it beside a generation_config.
        arguments["adapter_names"] = [n for n in adapter_names for _ in range(sampling.num_beams)]
    if streamer is not None:
        arguments["streamer"] = WithoutEnds(streamer, end_ids(model, tokenizer, sampling))
    if rows.cache is not None:
        arguments["past_key_values"] = rows.cache
    goes_on = done is not None and done.enough < len(rows.index)
    config.return_dict_in_generate = goes_on
    with torch.inference_mode():
        # transformers types `generate` on a mixin that PreTrainedModel does not show.
        out: Any = cast(Callable[..., object], model.generate)(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            generation_config=config,
            stopping_criteria=criteria,
            **arguments,
        )
    return (out.sequences, out.past_key_values) if goes_on else (out, None)


def _generation_config(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    length: int,
    present: int,
) -> GenerationConfig:
    """Build a config in which every knob is set.

    transformers fills what is None from `model.generation_config`, so an instruct model's own
    temperature or repetition penalty would act unasked. `present` of the ids are there already.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=sampling.temperature > 0,
        # In greedy mode these defaults mean "unset"; anything else is warned about.
        temperature=sampling.temperature or 1.0,
        top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
        top_k=sampling.top_k if sampling.temperature > 0 else 50,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        num_beams=sampling.num_beams,
        num_return_sequences=1,
        early_stopping=sampling.num_beams > 1,
        length_penalty=1.0,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        # max_length, not max_new_tokens: with both set (Llama-2's own config has max_length),
        # transformers logs a warning on every call.
        max_length=length + sampling.max_new_tokens,
        pad_token_id=pad_id(tokenizer, eos_ids(model, tokenizer)),
        eos_token_id=sorted(end_ids(model, tokenizer, sampling)) or None,
        use_cache=True,
    )
    own = model.generation_config
    if config.do_sample and own is not None and own.min_p is not None:
        config.min_p = 0.0
    if own is not None and own.max_new_tokens is not None:
        config.max_length = None
        config.max_new_tokens = length + sampling.max_new_tokens - present
    return config


def eos_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every id that ends a sequence: the model's list and the tokenizer's own."""
    config = model.generation_config
    own = None if config is None else config.eos_token_id
    ids = set(own) if isinstance(own, list) else {own}
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


def end_ids(model: Model, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> set[int]:
    """Return every id at which a completion ends, and that is not part of it."""
    return eos_ids(model, tokenizer) | set(sampling.stop_token_ids)


def pad_id(tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> int:
    """Return the id to pad with; it is masked, so any will do when the tokenizer has none."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None else min(eos, default=0)

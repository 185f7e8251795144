"""Log-likelihoods of continuations: what multiple-choice benchmarks compare.

A context is the prompt of its continuations, so the edited positions are the context's, wherever
padding and truncation put them. Continuations of one context share its forward, where the model's
cache allows that exactly; those that differ in their last token alone need one row.

Shapes: B contexts, R rows, L padded length, M tokens, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from reftune.config import ReftConfig
from reftune.context import options
from reftune.decoding import evaluating, has_plain_cache, longest_first, require
from reftune.errors import DataError
from reftune.positions import on_device


@final
@dataclass(frozen=True)
class Pair:
    """A context and one continuation of it, as token ids.

    Without `has_prompt` the context is no prompt: nothing is edited (but all tokens are by an
    adapter with `edit_generated`).

    Raises:
        DataError: one of them has no tokens.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    has_prompt: bool = True

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise DataError(
                f"a context of {len(self.context)} and a continuation of {len(self.continuation)} "
                "tokens cannot be scored: give at least one token each, for instance the "
                "beginning-of-sequence token as context."
            )

    def cut(self, max_length: int) -> Pair:
        """Return the pair without the left of its context, so that `max_length` tokens go in.

        The last token of the continuation does not go in: nothing is predicted from it.

        Raises:
            DataError: the continuation alone does not fit.
        """
        room = max_length + 1 - len(self.continuation)
        if room < 1:
            raise DataError(
                f"a continuation of {len(self.continuation)} tokens does not fit a model that "
                f"takes {max_length}: shorten it, or raise max_length."
            )
        return Pair(self.context[-room:], self.continuation, self.has_prompt)


@final
@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation, and whether greedy decoding would write it."""

    logprob: float
    is_greedy: bool


OnScored: TypeAlias = Callable[[int, Likelihood], None]


@dataclass
class _Context:
    """A context and the rows that follow it: continuations without their last token.

    `rows` says which pairs are read off each: those that differ in their last token alone.
    """

    ids: tuple[int, ...]
    has_prompt: bool
    rows: dict[tuple[int, ...], list[int]]

    @property
    def longest(self) -> int:
        return len(self.ids) + max(map(len, self.rows))


@final
class Scorer:
    """Score pairs in batches of at most `batch_size` rows and, if given, `batch_tokens` tokens.

    `dtype` is that of the softmax, by default the model's.

    Raises:
        ReftConfigError: a size is below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        batch_size: int = 16,
        batch_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        self.model, self.dtype = model, dtype
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._config = base.config
        self._keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._by_token = _edits_by_token(model)
        self._shares = has_plain_cache(model) and self._by_token

    def score(self, pairs: Sequence[Pair], on_scored: OnScored | None = None) -> list[Likelihood]:
        """Return the likelihood of every pair; `on_scored(index, likelihood)` as it is known."""
        found: dict[int, Likelihood] = {}
        shared: list[_Context] = []
        alone: list[_Context] = []
        for context in _gather(pairs):
            for part in _split(context, self.batch_size if self._shares else 1):
                (shared if len(part.rows) > 1 else alone).append(part)
        with evaluating(self.model), torch.inference_mode():
            for contexts, read in ((shared, self._read_shared), (alone, self._read_alone)):
                for batch in self._batches(contexts):
                    for i, likelihood in self._likelihoods(read(batch), pairs):
                        found[i] = likelihood
                        if on_scored is not None:
                            on_scored(i, likelihood)
        return [found[i] for i in range(len(pairs))]

    def _batches(self, contexts: list[_Context]) -> Iterator[list[_Context]]:
        lengths = [context.longest for context in contexts]
        rows = [len(context.rows) for context in contexts]
        for batch in longest_first(lengths, self.batch_size, self.batch_tokens, rows):
            yield [contexts[i] for i in batch]

    def _likelihoods(
        self, rows: Iterator[tuple[list[int], Tensor]], pairs: Sequence[Pair]
    ) -> list[tuple[int, Likelihood]]:
        indices: list[int] = []
        answers = []
        for wanted, logits_MV in rows:
            logprobs_MV = F.log_softmax(logits_MV, dim=-1, dtype=self.dtype)
            greedy_M = logits_MV.argmax(-1)
            for i in wanted:
                target_M = on_device(torch.tensor(pairs[i].continuation), logits_MV.device)
                logprob = logprobs_MV.gather(-1, target_M[:, None]).sum()
                answers.append(torch.stack([logprob.float(), (greedy_M == target_M).all().float()]))
                indices.append(i)
        values = torch.stack(answers).tolist()  # the one wait for the device in a batch
        return [(i, Likelihood(v[0], bool(v[1]))) for i, v in zip(indices, values, strict=True)]

    def _read_alone(self, batch: list[_Context]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the pairs and logits (M, V) of each row; a row is a context and what follows."""
        rows = [(c, head, wanted) for c in batch for head, wanted in c.rows.items()]
        ids_RL, real_RL = self._pad([c.ids + head for c, head, _ in rows], "right")
        _, prompt_RL = self._pad([c.ids if c.has_prompt else () for c, _, _ in rows], "right")
        keep = ids_RL.shape[1] + 1 - min(len(c.ids) for c, _, _ in rows)
        # As lm-eval does: what is padded on the right reaches no token before it.
        masked = {} if self._by_token else {"attention_mask": real_RL}
        with options(prompt_mask=prompt_RL):
            logits_RMV = self._call(keep, input_ids=ids_RL, **masked)
        for r, (context, head, wanted) in enumerate(rows):
            first = len(context.ids) - 1 - (ids_RL.shape[1] - keep)
            yield wanted, logits_RMV[r, first : first + len(head) + 1]

    def _read_shared(self, batch: list[_Context]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield as `_read_alone`: contexts go in once, and what follows with copies of their cache.

        Contexts are padded on the left, as generation does, so that windows of attention fit.
        """
        ids_BL, mask_BL = self._pad([c.ids for c in batch], "left")
        prompted_B = on_device(torch.tensor([c.has_prompt for c in batch]), mask_BL.device)
        prompt_BL = mask_BL & prompted_B[:, None]
        position_BL = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._config)
        common = {"past_key_values": cache, "use_cache": True}
        with options(prompt_mask=prompt_BL):
            first_B1V = self._call(
                1, input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL, **common
            )
        rows = [(b, head, want) for b, c in enumerate(batch) for head, want in c.rows.items()]
        of_R = on_device(torch.tensor([b for b, _, _ in rows]), ids_BL.device)
        ids_RM, real_RM = self._pad([head for _, head, _ in rows], "right")
        cache.batch_select_indices(of_R)
        position_RM = position_BL[of_R, -1:] + 1 + torch.arange(ids_RM.shape[1], device=of_R.device)
        mask_RT = torch.cat([mask_BL[of_R], real_RM], dim=-1)
        with options(prompt_mask=prompt_BL[of_R]):
            logits_RMV = self._call(
                ids_RM.shape[1],
                input_ids=ids_RM,
                attention_mask=mask_RT,
                position_ids=position_RM,
                **common,
            )
        for r, (b, head, wanted) in enumerate(rows):
            yield wanted, torch.cat([first_B1V[b], logits_RMV[r, : len(head)]])

    def _call(self, keep: int, **arguments: Any) -> Tensor:
        """Return the logits of the last `keep` columns."""
        if self._keeps:
            arguments["logits_to_keep"] = keep
        logits: Tensor = self.model(**arguments).logits
        return logits[:, -keep:]

    def _pad(self, rows: Sequence[tuple[int, ...]], side: str) -> tuple[Tensor, Tensor]:
        """Return ids (R, L), 0 where there is none, and which are tokens."""
        length = max(map(len, rows))
        ids, real = [], []
        for row in rows:
            pad = [0] * (length - len(row))
            ids.append([*pad, *row] if side == "left" else [*row, *pad])
            token = [1] * len(row)
            real.append([*pad, *token] if side == "left" else [*token, *pad])
        device = self.model.device
        # The type is told, as there may be no token at all.
        ids_RL = on_device(torch.tensor(ids, dtype=torch.long), device)
        return ids_RL, on_device(torch.tensor(real, dtype=torch.bool), device)


def _gather(pairs: Sequence[Pair]) -> list[_Context]:
    """Return the contexts, each with its continuations; a context that is no prompt is another."""
    contexts: dict[tuple[tuple[int, ...], bool], _Context] = {}
    for i, pair in enumerate(pairs):
        key = (pair.context, pair.has_prompt)
        context = contexts.setdefault(key, _Context(*key, rows={}))
        context.rows.setdefault(pair.continuation[:-1], []).append(i)
    return list(contexts.values())


def _split(context: _Context, size: int) -> list[_Context]:
    """Return the context with at most `size` rows at a time."""
    rows = list(context.rows.items())
    parts = [dict(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [_Context(context.ids, context.has_prompt, part) for part in parts]


def _edits_by_token(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether no adapter's edit depends on how many tokens a forward has."""
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    return not any(
        isinstance(c, ReftConfig) and c.edit_generated and c.intervention.pools_tokens
        for c in configs
    )

"""Batches for training: what the model computes, and which rows of it something reads.

    padded    on the right; a causal model then needs no mask
    headed    only the tails are in the batch, the heads (see `speed.frozen`) beside it
    packed    all examples in one row, position ids restart with each

Shapes: B examples, T columns, P columns of the heads (what they share, then
the rest, padded on the left), N rows that are read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reftune.data import TokenRow
from reftune.prompts import IGNORED_LABEL

WORTH = 0.1
"""The share of padding from which leaving it out gains more than picking rows costs."""


@dataclass(frozen=True)
class _Tail:
    """What is computed of an example: not its last token, which predicts nothing."""

    head: Tensor
    ids: Tensor
    following: Tensor  # the label of the token after each
    in_prompt: Tensor

    @classmethod
    def of(cls, ids: Tensor, labels: Tensor, prompt_length: int, start: int, whole: bool) -> _Tail:
        """Return the tail that begins at `start`, with the last token if `whole`."""
        end = len(ids) if whole else max(len(ids) - 1, start + 1)
        following = torch.nn.functional.pad(labels[1:], (0, 1), value=IGNORED_LABEL)
        in_prompt = torch.arange(start, end) < prompt_length
        return cls(ids[:start], ids[start:end], following[start:end], in_prompt)

    @property
    def digest(self) -> int:
        """Return a number that tells these tokens from others, in any process."""
        return zlib.crc32(torch.cat([self.head, self.ids]).numpy().tobytes())


@dataclass(frozen=True)
class CausalBatches:
    """Collate rows for a causal language model whose loss reads labelled rows only.

    Attributes:
        pad_token_id: fills columns; never attended.
        head: returns where the tails begin, of prompts of the lengths given (B,); None: no heads.
        numbered: whether the batch says which examples it holds (`index`, `lengths`, `digests`).
        packed: whether all examples share one row.
        alike: returns how many tokens of a prompt, of lengths (B,), are edited alike in examples
            that begin alike; None: beginnings are not shared.
        whole: whether the last token of an example, which predicts nothing, is an input, too.
    """

    pad_token_id: int
    head: Callable[[Tensor], Tensor] | None = None
    numbered: bool = False
    packed: bool = False
    alike: Callable[[Tensor], Tensor] | None = None
    whole: bool = False

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """Return the batch; see the module."""
        tails = self._tails(rows)
        batch = _packed(tails) if self.packed else self._padded(tails)
        if self.numbered:
            batch["index"] = [int(row["index"]) for row in rows]
            batch["lengths"] = [len(tail.ids) for tail in tails]
            batch["digests"] = [tail.digest for tail in tails]
        following = batch["shift_labels"].reshape(-1)
        reads = following.ne(IGNORED_LABEL).nonzero().squeeze(1)
        return batch | {"reads": reads, "targets": following[reads]}

    def _tails(self, rows: Sequence[TokenRow]) -> list[_Tail]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        prompts = [_prompt_length(one) for one in labels]
        starts = [0] * len(ids)
        if self.head is not None:
            starts = self.head(torch.tensor(prompts)).tolist()
        each = zip(ids, labels, prompts, starts, strict=True)
        return [_Tail.of(*one, self.whole) for one in each]

    def _padded(self, tails: Sequence[_Tail]) -> dict[str, Any]:
        ids = [tail.ids for tail in tails]
        following = [tail.following for tail in tails]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "prompt_mask": pad_sequence([tail.in_prompt for tail in tails], batch_first=True),
            "shift_labels": pad_sequence(following, batch_first=True, padding_value=IGNORED_LABEL),
        }
        batch["labels"] = batch["shift_labels"]  # asked for by the Trainer, which counts the other
        headed = any(len(tail.head) for tail in tails)
        first = None
        if self.alike is not None and not headed:
            limits = self.alike(batch["prompt_mask"].sum(-1)).tolist()
            first = first_alike(batch["input_ids"], limits)
        batch |= real_rows([len(one) for one in ids], first)
        if headed:
            batch |= self._heads([tail.head for tail in tails], _mask(ids), batch["prompt_mask"])
        return batch

    def _heads(
        self, heads: Sequence[Tensor], tail_mask: Tensor, in_prompt: Tensor
    ) -> dict[str, Any]:
        shared = _shared_beginning(heads)
        rests = [one[shared:] for one in heads]
        beginning = heads[0][:shared].expand(len(heads), -1)
        head_mask = torch.cat([torch.ones_like(beginning), _mask(rests, "left")], dim=1)
        rest_ids = pad_sequence(
            rests, batch_first=True, padding_value=self.pad_token_id, padding_side="left"
        )
        starts = torch.tensor([len(head) for head in heads])
        # Columns of padding repeat the last position: there may be no embedding beyond it.
        column = torch.arange(tail_mask.shape[1])
        column = torch.minimum(column, tail_mask.sum(-1, keepdim=True) - 1)
        return {
            "head_ids": torch.cat([beginning, rest_ids], dim=1),
            "shared": shared,
            "head_mask": head_mask,
            "attention_mask": torch.cat([head_mask, tail_mask], dim=1),
            "prompt_mask": torch.cat([head_mask.bool(), in_prompt], dim=1),
            "position_ids": starts[:, None] + column,
        }


def _packed(tails: Sequence[_Tail]) -> dict[str, Any]:
    lengths = torch.tensor([len(tail.ids) for tail in tails])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    following = torch.cat([tail.following for tail in tails])[None]
    return {
        "input_ids": torch.cat([tail.ids for tail in tails])[None],
        "labels": following,
        "shift_labels": following,
        "prompt_mask": torch.cat([tail.in_prompt for tail in tails])[None],
        "position_ids": torch.cat([torch.arange(len(tail.ids)) for tail in tails])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@dataclass(frozen=True)
class SequenceBatches:
    """Add to the batches of a sequence classifier's collator which rows something reads.

    That is the first token of each sequence, for a classifier that looks at it alone.
    """

    collator: Callable[[Sequence[Any]], Mapping[str, Any]]
    first_read: bool = True

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the batch."""
        batch = dict(self.collator(rows))
        mask = batch["attention_mask"]
        if self.first_read:
            first = mask.int().argmax(-1)
            batch["reads"] = first + torch.arange(len(mask)) * mask.shape[1]
        if float(mask.float().mean()) < 1 - WORTH:
            batch["real"] = mask.flatten().nonzero().squeeze(1)
        return batch


def real_rows(lengths: Sequence[int], first: Tensor | None = None) -> dict[str, Tensor]:
    """Return the flat rows that are computed, `real`, if leaving out the others is worth it.

    Those are the tokens of sequences of such lengths; with `first` (B, T), only the first of each
    that are alike, and `place` (B*T,) tells which of them every row is, padding any.
    """
    B, T = len(lengths), max(lengths)
    computed = torch.arange(T) < torch.tensor(lengths)[:, None]
    if first is not None:
        computed &= first == torch.arange(B * T).view(B, T)
    if int(computed.sum()) > (1 - WORTH) * B * T:
        return {}
    real = computed.flatten().nonzero().squeeze(1)
    if first is None or len(real) == sum(lengths):
        return {"real": real}
    number = torch.zeros(B * T, dtype=torch.long)
    number[real] = torch.arange(len(real))
    return {"real": real, "place": number[first.flatten()]}


def first_alike(ids: Tensor, limits: Sequence[int]) -> Tensor:
    """Return, of each token (B, T), the flat row of the first whose example begins alike.

    Sequences are alike up to a token as far as their tokens are the same; from `limits` (B,) on
    every token stands for itself.
    """
    B, T = ids.shape
    first = torch.arange(B * T).view(B, T).tolist()  # 30 times as fast to write to as a tensor
    tokens, leader, members = ids.tolist(), [0] * B, list(range(B))
    for column in range(T):
        members = [row for row in members if column < limits[row]]
        leaders: dict[tuple[int, int], int] = {}
        for row in members:
            leader[row] = leaders.setdefault((leader[row], tokens[row][column]), row)
            first[row][column] = leader[row] * T + column
        if len(leaders) == len(members):
            break
    return torch.tensor(first)


def _shared_beginning(heads: Sequence[Tensor]) -> int:
    """Return how many tokens all heads begin with: they are computed once for the batch."""
    length = min(len(head) for head in heads)
    if len(heads) == 1 or length == 0:
        return 0
    same = (torch.stack([head[:length] for head in heads]) == heads[0][:length]).all(0)
    return int(same.int().cumprod(0).sum())


def _prompt_length(labels: Tensor) -> int:
    labelled = labels.ne(IGNORED_LABEL)
    return int(labelled.int().argmax()) if bool(labelled.any()) else len(labels)


def _mask(sequences: Sequence[Tensor], side: str = "right") -> Tensor:
    return pad_sequence(
        [torch.ones(len(one), dtype=torch.long) for one in sequences],
        batch_first=True,
        padding_side=side,
    )

"""Which tokens are edited: `f7+l7` -> Positions; prompt masks -> rows of the hidden states.

Everything here is tensor arithmetic on the device of the mask, without a host sync: the number of
rows follows from shapes alone, slots that hold no token are masked.

Shape suffixes: B example, T token column of the whole sequence (cache included), S token column of
one forward, K slot: an edited position, 0..p-1 the prefix and p..p+s-1 the suffix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from reftune.errors import PositionError

_PART = re.compile(r"([fl])(\d+)")
TIED = ("all", "sides", "none")
SHORT_PROMPTS = ("paper", "pyreft", "overlap")


@dataclass(frozen=True)
class Positions:
    """The first `prefix` and the last `suffix` tokens of the prompt, or every one of them."""

    prefix: int = 0
    suffix: int = 0
    everything: bool = False

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read `f{p}`, `l{s}`, `f{p}+l{s}` or `all`.

        Raises PositionError for anything else, and for a count of 0.
        """
        if text == "all":
            return cls(everything=True)
        sides: dict[str, int] = {}
        for part in text.replace(" ", "").split("+"):
            match = _PART.fullmatch(part)
            if match is None or match[1] in sides or int(match[2]) == 0:
                raise PositionError(
                    f"positions is {text!r}; accepted are 'f7' (the first 7 tokens of the prompt), "
                    "'l7' (its last 7), 'f7+l7' (both) and 'all'."
                )
            sides[match[1]] = int(match[2])
        return cls(prefix=sides.get("f", 0), suffix=sides.get("l", 0))

    def __str__(self) -> str:
        parts = [f"{side}{n}" for side, n in (("f", self.prefix), ("l", self.suffix)) if n]
        return "all" if self.everything else "+".join(parts)

    @property
    def num_slots(self) -> int:
        """Return K, how many rows of an example are edited at most (1 for `all`)."""
        return 1 if self.everything else self.prefix + self.suffix

    def num_groups(self, tied: str) -> int:
        """Return how many Phi a layer has: 1, one per side, or one per position."""
        if tied == "none":
            return self.num_slots
        return 2 if tied == "sides" and self.prefix and self.suffix else 1


@dataclass(frozen=True)
class SlotKey:
    """What determines an adapter's slots in a forward; adapters that agree share them."""

    positions: Positions
    short_prompts: str = "paper"
    edit_generated: bool = False
    members: tuple[str, ...] = ()  # of a batch of mixed adapters: one for each example

    @property
    def num_slots(self) -> int:
        """Return K."""
        return self.positions.num_slots

    @property
    def counts(self) -> tuple[int, int]:
        """Return how many tokens the prefix and the suffix have; (1, 0) for `all`."""
        if self.positions.everything:
            return 1, 0
        return self.positions.prefix, self.positions.suffix

    def group_masks(self, slot_BS: Tensor, groups: int, *, per_slot: bool) -> list[Tensor]:
        """Return which tokens (B, S) each of the groups edits, as `apply_grouped` counts groups."""
        edited = slot_BS < self.num_slots
        if groups == 1:
            return [edited]
        if per_slot:
            return [slot_BS == slot for slot in range(groups)]
        in_prefix = slot_BS < self.positions.prefix
        return [edited & in_prefix, edited & ~in_prefix]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that are edited: `index` and `valid` (B, K), K slots of each example.

    `index` points into the flattened (B*S, d) hidden states; where `valid` is False the slot is
    empty and its index arbitrary.
    """

    index: Tensor
    valid: Tensor

    def gather(self, h_BSd: Tensor) -> Tensor:
        """Return the rows (B, K, d)."""
        d = h_BSd.shape[-1]
        # Not h[index]: its backward sorts the indices.
        rows = h_BSd.reshape(-1, d).index_select(0, self.index.reshape(-1))
        return rows.view(*self.index.shape, d)

    def add(self, h_BSd: Tensor, edit_BKd: Tensor) -> Tensor:
        """Return the hidden states with an edit added to their rows; empty slots must hold zero."""
        flat = h_BSd.reshape(-1, h_BSd.shape[-1])
        edit = edit_BKd.reshape(-1, h_BSd.shape[-1]).to(h_BSd.dtype)
        return flat.index_add(0, self.index.reshape(-1), edit).view_as(h_BSd)


def on_device(value: int | Tensor, device: torch.device) -> Tensor:
    """Return a count, or a tensor, on a device; on CUDA without waiting for it, as a copy would.

    Elsewhere such a copy may read memory that is another's by then (MPS: pytorch#189690).
    """
    if isinstance(value, Tensor):
        from_host = value.device.type == "cpu" and device.type == "cuda"
        return value.to(device, non_blocking=from_host)
    return torch.full((), value, dtype=torch.long, device=device)


def side_lengths(
    n: Tensor, prefix: int | Tensor, suffix: int | Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """Return how many tokens of its prefix and of its suffix a prompt of `n` tokens has.

    The paper's rule (section 4.1), where n < p + s: p <- min(p, floor(n/2)), s <- min(s,
    ceil(n/2)). pyreft's, always: p <- min(p, floor(n/2)), s <- min(s, floor(n/2)). Overlap, as in
    adapters: the suffix takes what it can get, and the prefix what is left of its p tokens.
    """
    p, s = on_device(prefix, n.device).expand_as(n), on_device(suffix, n.device).expand_as(n)
    if rule == "pyreft":
        return torch.minimum(p, n // 2), torch.minimum(s, n // 2)
    if rule == "overlap":
        s = torch.minimum(s, n)
        return torch.minimum(p, n - s), s
    short = n < p + s
    return (
        torch.where(short, torch.minimum(p, n // 2), p),
        torch.where(short, torch.minimum(s, (n + 1) // 2), s),
    )


def assign_slots(
    prompt_BT: Tensor,
    prefix: int | Tensor,
    suffix: int | Tensor,
    *,
    suffix_start: int,
    empty: int,
    rule: str,
    segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None,
) -> Tensor:
    """Return the slot of each token: a rank in the prefix, `suffix_start` + one in the suffix.

    Tokens that are not edited get `empty`. `prefix` and `suffix` are counts, or tensors (B, 1) of
    them. `segments_BT` numbers the sequences packed into a row; each has a prompt of its own.
    `lengths_B` tells how long prompts are that go on beyond the T columns.
    """
    rank_BT = prompt_BT.long().cumsum(-1) - 1
    if segments_BT is None:
        n = prompt_BT.sum(-1, keepdim=True) if lengths_B is None else lengths_B[:, None]
    else:
        counts = torch.zeros_like(rank_BT).scatter_add(-1, segments_BT, prompt_BT.long())
        n = counts.gather(-1, segments_BT)
        before = counts.cumsum(-1) - counts
        rank_BT = rank_BT - before.gather(-1, segments_BT)
    p, s = side_lengths(n, prefix, suffix, rule)
    from_end = rank_BT - (n - s)
    slot = torch.where(from_end >= 0, suffix_start + from_end, empty)
    slot = torch.where(rank_BT < p, rank_BT, slot)
    return torch.where(prompt_BT, slot, empty)


def segment_ids(position_ids_BS: Tensor, ends: Tensor | None = None) -> Tensor:
    """Number the sequences packed into each row: a new one starts where position ids restart.

    Of a single row it may be known where they end: `ends` (N + 1,), from 0.
    """
    if ends is not None:
        column = torch.arange(position_ids_BS.shape[1], device=ends.device, dtype=ends.dtype)
        return torch.bucketize(column, ends[1:-1], right=True)[None].to(position_ids_BS.device)
    restart = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return torch.nn.functional.pad(restart.long(), (1, 0)).cumsum(-1)


def before_first_label(labels_BS: Tensor, segments_BS: Tensor | None = None) -> Tensor:
    """Return a mask of the tokens before the first label that is not -100, of each sequence."""
    labelled = labels_BS.ne(-100).long()
    seen = labelled.cumsum(-1)
    if segments_BS is not None:
        counts = torch.zeros_like(seen).scatter_add(-1, segments_BS, labelled)
        seen = seen - (counts.cumsum(-1) - counts).gather(-1, segments_BS)
    return seen == 0


def take_columns(slot_BT: Tensor, past: int | Tensor, length: int, empty: int) -> Tensor:
    """Return the columns [past, past + length) of `slot_BT`, `empty` beyond its end."""
    T = slot_BT.shape[1]
    if isinstance(past, int):
        chunk = slot_BT[:, past : past + length]
        return torch.nn.functional.pad(chunk, (0, length - chunk.shape[1]), value=empty)
    column = (torch.arange(length, device=slot_BT.device) + past.to(slot_BT.device)).clamp(max=T)
    return torch.nn.functional.pad(slot_BT, (0, 1), value=empty)[:, column]


def slots_to_rows(
    slot_BS: Tensor, num_slots: int, example_BS: Tensor | None = None, num_examples: int = 0
) -> Rows:
    """Turn the slot of each token (`num_slots` = none) into the row of each slot.

    Each row of the batch is an example, unless `example_BS` numbers those packed into it.
    """
    B, S = slot_BS.shape
    flat = torch.arange(B * S, device=slot_BS.device)
    if example_BS is None:
        example_BS, num_examples = flat.view(B, S) // S, B
    at = (example_BS * (num_slots + 1) + slot_BS).view(-1)
    index = flat.new_zeros(num_examples * (num_slots + 1)).scatter(0, at, flat)
    valid = torch.zeros_like(index, dtype=torch.bool).scatter(0, at, True)
    index, valid = (t.view(num_examples, -1)[:, :num_slots] for t in (index, valid))
    return Rows(index.contiguous(), valid.contiguous())

"""A batch in which every example has an adapter of its own, as one batched product.

The parameters of the adapters in the batch are stacked, each example picks its own, and one matrix
product per layer edits all rows. The only loop is over kinds of adapters (method, activation, and
how their slots are counted), not over adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from reftune.errors import ReftConfigError
from reftune.interventions import SUBSPACE_MASK, apply_dense, apply_grouped, no_autocast
from reftune.positions import Positions, SlotKey
from reftune.spans import Span

if TYPE_CHECKING:
    from reftune.layer import ReftLayer

BASE = "__base__"
"""PEFT's name for no adapter."""


@dataclass(frozen=True)
class _Kind:
    """What adapters have in common that one batched product serves."""

    method: str
    act_fn: str | None
    topk: int
    dtype: str
    short_prompts: str
    edit_generated: bool
    everything: bool
    dense_positions: str | None  # with edit_generated, groups are told by slot
    pooled_groups: int | None  # where a Phi pools its tokens, no other may share its group


def edit_mixed(layer: ReftLayer, h_BSd: Tensor, span: Span, names: Sequence[str]) -> Tensor:
    """Return the hidden states (B, S, d), each example edited by the adapter that `names` gives it.

    Names are repeated for beams and sampled sequences. Raises ReftConfigError where they do not
    fit the batch.
    """
    B, S, _ = h_BSd.shape
    if len(names) == 0 or B % len(names):
        raise ReftConfigError(  # begins as PEFT's message does
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names for a batch of {B}."
        )
    per_example = [name for name in names for _ in range(B // len(names))]
    for kind, members in _kinds(layer, per_example, span).items():
        if kind.edit_generated or not span.is_past_prompt(S):
            h_BSd = _edit_kind(layer, h_BSd, span, kind, members, per_example)
    return h_BSd


def _kinds(layer: ReftLayer, per_example: list[str], span: Span) -> dict[_Kind, list[str]]:
    """Return the adapters of this layer that are in the batch and switched on, by kind."""
    kinds: dict[_Kind, list[str]] = {}
    for name in sorted(set(per_example)):
        if name not in layer.configs or layer.strength_of(name, span) == 0.0:
            continue
        c, key = layer.configs[name], layer.keys[name]
        kind = _Kind(
            c.method,
            c.act_fn,
            c.topk,
            c.dtype,
            c.short_prompts,
            c.edit_generated,
            key.positions.everything,
            f"{c.positions} {c.tied}" if c.edit_generated else None,
            key.positions.num_groups(c.tied) if c.intervention.pools_tokens else None,
        )
        kinds.setdefault(kind, []).append(name)
    return kinds


def _edit_kind(
    layer: ReftLayer,
    h_BSd: Tensor,
    span: Span,
    kind: _Kind,
    members: list[str],
    per_example: list[str],
) -> Tensor:
    """Edit the examples of one kind; the others take part with no slots, so shapes stay simple."""
    B, S, _ = h_BSd.shape
    device = h_BSd.device
    layer.check_packing(members[0], span)
    batch = _Batch(layer, kind, members, per_example)
    key = batch.key
    p_B, s_B, member_B = batch.counts(span, device)
    slot = span.slots(key, p_B[:, None], s_B[:, None], B, S, device)
    phi, dtype = layer.phi(members[0]), getattr(torch, kind.dtype)
    with no_autocast(device):
        tensors = batch.stack(span, member_B)
        strength = batch.strength(span, member_B, h_BSd)
        split, per_slot = key.positions.prefix, batch.level == "none"
        if span.is_dense(key, S):
            x = h_BSd.to(dtype)
            groups = next(iter(tensors.values())).shape[1]
            masks = key.group_masks(slot, groups, per_slot=per_slot)
            edit = apply_dense(phi, x, tensors, masks, per_example=True)
            edit = layer.finish(members[0], x, edit, slot < key.num_slots, strength)
            return h_BSd + edit.to(h_BSd.dtype)
        rows = span.rows(key, B, S, device)
        x = rows.gather(h_BSd).to(dtype)
        edit = apply_grouped(
            phi, x, tensors, rows.valid, split=split, per_slot=per_slot, per_example=True
        )
        return rows.add(h_BSd, layer.finish(members[0], x, edit, rows.valid, strength))


class _Batch:
    """The adapters of one kind in a batch, brought to one shape: ranks and groups are padded."""

    def __init__(
        self, layer: ReftLayer, kind: _Kind, members: list[str], per_example: list[str]
    ) -> None:
        self.layer, self.members, self.per_example = layer, members, per_example
        configs = [layer.configs[name] for name in members]
        every = [layer.keys[name].positions for name in members]
        groups = [p.num_groups(c.tied) for p, c in zip(every, configs, strict=True)]
        tied_none = any(c.tied == "none" for c in configs)
        self.level = "none" if tied_none else "sides" if max(groups) == 2 else "all"
        self.rank = max(c.r or 0 for c in configs)
        positions = Positions(
            max(p.prefix for p in every), max(p.suffix for p in every), kind.everything
        )
        self.key = SlotKey(positions, kind.short_prompts, kind.edit_generated, self._identity())

    def _identity(self) -> tuple[str, ...]:
        return tuple(name if name in self.members else BASE for name in self.per_example)

    def counts(self, span: Span, device: torch.device) -> list[Tensor]:
        """Return prefix, suffix and member number of each example, (B,) each."""
        cached = ("mixed", self.key, device)
        if cached not in span.cache:
            keys, number = self.layer.keys, {name: i for i, name in enumerate(self.members)}
            table = torch.tensor(
                [
                    [*(keys[n].counts if n in number else (0, 0)), number.get(n, 0)]
                    for n in self.per_example
                ]
            )
            span.cache[cached] = list(table.to(device, non_blocking=True).unbind(-1))
        found: list[Tensor] = span.cache[cached]
        return found

    def stack(self, span: Span, member_B: Tensor) -> dict[str, Tensor]:
        """Return each example's parameters, (B, G, ...)."""
        parts = [self._spread(name) for name in self.members]
        tensors = {k: torch.stack([part[k] for part in parts])[member_B] for k in parts[0]}
        key = ("subspaces", self.key, self.rank, member_B.device)
        if key not in span.cache:
            mask = self._subspace_mask(span)
            span.cache[key] = None if mask is None else mask.to(member_B.device)
        mask = span.cache[key]
        if mask is not None:
            R = tensors["R"]
            mask = mask.to(R.dtype)
            tensors[SUBSPACE_MASK] = mask[:, None, None, :].expand(-1, R.shape[1], 1, -1)
        return tensors

    def strength(self, span: Span, member_B: Tensor, like: Tensor) -> float | Tensor:
        """Return the factor on each example's edit, (B, 1, 1), or 1.0."""
        factors = [self.layer.strength_of(name, span) for name in self.members]
        if len(set(factors)) == 1:
            return factors[0]
        key = ("strength", self.key, tuple(factors), like.device)
        if key not in span.cache:
            span.cache[key] = torch.tensor(factors, device=like.device)[member_B][:, None, None]
        found: Tensor = span.cache[key]
        return found

    def _spread(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's parameters with the batch's rank and groups."""
        phi, positions = self.layer.phi(name), self.layer.keys[name].positions
        tensors = phi.tensors()
        missing = self.rank - phi.shape.rank
        if phi.has_rank and missing:
            pads = {"R": (0, 0, 0, missing), "W": (0, 0, 0, missing), "bias": (0, missing)}
            tensors = {k: F.pad(t, pads[k]) for k, t in tensors.items()}
        if self.level == "all":
            return tensors
        wanted = self.key.positions
        sizes = [1, 1] if self.level == "sides" else [wanted.prefix, wanted.suffix]
        tied_none = self.layer.configs[name].tied == "none"
        at = [positions.prefix, positions.suffix] if tied_none else [1, 1]
        return {k: _spread_groups(t, sizes, at) for k, t in tensors.items()}

    def _subspace_mask(self, span: Span) -> Tensor | None:
        """Return which rows of R are on, (B, r), or None where nothing was chosen."""
        chosen, layer = span.options.subspaces, self.layer
        if self.rank == 0 or (
            chosen is None and not any(n in layer.subspaces for n in self.members)
        ):
            return None
        B = len(self.per_example)
        mask = torch.zeros(B, self.rank)
        for i, name in enumerate(self.per_example):
            if name not in self.members:
                continue
            names = layer.subspaces.get(name)
            if chosen is not None:
                shared = not chosen or isinstance(chosen[0], str)
                names = [str(n) for n in (chosen if shared else chosen[i * len(chosen) // B])]
            config = layer.configs[name]
            rows = range(config.r or 0) if names is None else config.subspace_rows(names)
            mask[i, list(rows)] = 1.0
        return mask


def _spread_groups(t: Tensor, sizes: list[int], at: list[int]) -> Tensor:
    """Return `t` (G, ...) with `sizes` groups of prefix and suffix, from the `at` it has."""
    if t.shape[0] == 1:
        return t.expand(sum(sizes), *t.shape[1:])
    parts = []
    for part, size in zip(torch.split(t, at), sizes, strict=True):
        if part.shape[0] == 1:
            parts.append(part.expand(size, *part.shape[1:]))
        else:
            parts.append(torch.cat([part, part.new_zeros(size - part.shape[0], *part.shape[1:])]))
    return torch.cat(parts)

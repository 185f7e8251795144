"""A batch in which every example has an adapter of its own, as one batched product.

The parameters of the adapters in the batch are stacked, each example picks its own, and one matrix
product per layer edits all rows. The only loop is over kinds of adapters (method, activation, and
how their slots are counted), not over adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reftune.context import no_autocast
from reftune.errors import ReftConfigError, did_you_mean
from reftune.interventions import SUBSPACE_MASK, Intervention, apply_dense, apply_grouped
from reftune.positions import Positions, SlotKey, on_device
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
    for batch in _batches(layer, span, names, B):
        if batch.key.edit_generated or not span.is_past_prompt(S):
            h_BSd = batch.edit(layer, h_BSd, span)
    return h_BSd


def check_adapter_names(known: Set[str], names: Sequence[str], *, training: bool) -> None:
    """Raise where a batch of mixed adapters is not possible: ValueError, as PEFT's LoRA does."""
    if training:
        raise ReftConfigError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval()."
        )
    unknown = sorted({name for name in names if name != BASE} - known)
    if unknown:
        raise ReftConfigError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
            f"Loaded are {sorted(known)}, and {BASE!r} for none."
            + did_you_mean(unknown[0], sorted(known))
        )


def check_names_of_call(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise where the inputs of a call have examples without a name; some come once per beam."""
    inputs = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    rows = next((len(t) for t in inputs if isinstance(t, Tensor)), None)
    if rows is not None and (not names or len(names) % max(rows, 1)):
        raise ReftConfigError(unlike_the_batch(names, rows))


def check_names_of_span(span: Span) -> None:
    """Raise where a forward, not one of `generate`, has not a name for each of its examples."""
    names, shape = span.options.adapter_names, span.shape
    if names is None or shape is None or span.generation is not None:
        return
    if len(names) != shape[0]:
        raise ReftConfigError(unlike_the_batch(names, shape[0]))


def unlike_the_batch(names: Sequence[str], rows: int) -> str:
    """Return what is said of names that are not one for each example; it begins as PEFT's does."""
    return (
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} names for a batch of {rows}."
    )


def _batches(layer: ReftLayer, span: Span, names: Sequence[str], B: int) -> list[_Batch]:
    """Return the adapters that this layer has and that are on, by kind.

    Made once in a forward for all layers that have the same: an adapter's config is.
    """
    on = tuple(
        name
        for name in sorted(set(names))
        if name in layer.configs and layer.strength_of(name, span) != 0.0
    )
    return span.once(("batches", on, B), lambda: _group(layer, on, names, B))


def _group(layer: ReftLayer, on: Sequence[str], names: Sequence[str], B: int) -> list[_Batch]:
    if len(names) == 0 or B % len(names):
        raise ReftConfigError(unlike_the_batch(names, B))
    per_example = [name for name in names for _ in range(B // len(names))]
    kinds: dict[_Kind, list[str]] = {}
    for name in on:
        kinds.setdefault(_kind_of(layer, name), []).append(name)
    return [_Batch(layer, *kind, per_example) for kind in kinds.items()]


def _kind_of(layer: ReftLayer, name: str) -> _Kind:
    c, positions = layer.configs[name], layer.keys[name].positions
    return _Kind(
        c.method,
        c.act_fn,
        c.topk,
        c.dtype,
        c.short_prompts,
        c.edit_generated,
        positions.everything,
        f"{c.positions} {c.tied}" if c.edit_generated else None,
        positions.num_groups(c.tied) if c.intervention.pools_tokens else None,
    )


class _Batch:
    """The adapters of one kind in a batch, brought to one shape: ranks and groups are padded.

    The other examples take part with no slots, so shapes stay simple.
    """

    def __init__(
        self, layer: ReftLayer, kind: _Kind, members: list[str], per_example: list[str]
    ) -> None:
        self.members, self.per_example = members, per_example
        self.configs = {name: layer.configs[name] for name in members}
        self.keys = {name: layer.keys[name] for name in members}
        every = [key.positions for key in self.keys.values()]
        groups = [self.keys[n].positions.num_groups(c.tied) for n, c in self.configs.items()]
        tied_none = any(c.tied == "none" for c in self.configs.values())
        self.level = "none" if tied_none else "sides" if max(groups) == 2 else "all"
        self.rank = max(c.r or 0 for c in self.configs.values())
        positions = Positions(
            max(p.prefix for p in every), max(p.suffix for p in every), kind.everything
        )
        identity = tuple(name if name in self.keys else BASE for name in per_example)
        self.key = SlotKey(positions, kind.short_prompts, kind.edit_generated, identity)

    def edit(self, layer: ReftLayer, h_BSd: Tensor, span: Span) -> Tensor:
        """Return the hidden states with the edits of these adapters at a layer."""
        B, S, _ = h_BSd.shape
        key, first, device = self.key, self.members[0], h_BSd.device
        layer.check_packing(first, span, S)
        p_B, s_B, member_B = span.once(("mixed", key, device), lambda: self.counts(device))
        slot = span.slots(key, p_B[:, None], s_B[:, None], B, S, device)
        phi = layer.phi(first)
        with no_autocast(device):
            tensors = self.stack(layer, span, device)
            dtype = next(iter(tensors.values())).dtype  # the model may have been cast
            strength = self.strength(layer, span, member_B)
            split, per_slot = key.positions.prefix, self.level == "none"
            if span.is_dense(key, S):
                x = h_BSd.to(dtype)
                groups = next(iter(tensors.values())).shape[1]
                masks = key.group_masks(slot, groups, per_slot=per_slot)
                edit = apply_dense(phi, x, tensors, masks, per_example=True)
                edit = layer.finish(first, x, edit, slot < key.num_slots, strength)
                return h_BSd + edit.to(h_BSd.dtype)
            rows = span.rows(key, B, S, device)
            x = rows.gather(h_BSd).to(dtype)
            edit = apply_grouped(
                phi, x, tensors, rows.valid, split=split, per_slot=per_slot, per_example=True
            )
            return rows.add(h_BSd, layer.finish(first, x, edit, rows.valid, strength))

    def counts(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return prefix, suffix and member number of each example, (B,) each."""
        number = {name: i for i, name in enumerate(self.members)}
        table = torch.tensor(
            [
                [*(self.keys[n].counts if n in number else (0, 0)), number.get(n, 0)]
                for n in self.per_example
            ]
        )
        return on_device(table, device).unbind(-1)

    def stack(self, layer: ReftLayer, span: Span, device: torch.device) -> dict[str, Tensor]:
        """Return each example's parameters, (B, G, ...)."""
        parts = {name: self._spread(layer.phi(name), name) for name in self.members}
        first = parts[self.members[0]]
        each = [parts.get(name, first) for name in self.per_example]
        tensors = {k: torch.stack([part[k] for part in each]) for k in first}
        key = ("subspaces", self.key, self.rank, device)
        mask = span.once(key, lambda: self._subspace_mask(layer, span, device))
        if mask is not None:
            R = tensors["R"]
            mask = mask.to(R.dtype)
            tensors[SUBSPACE_MASK] = mask[:, None, None, :].expand(-1, R.shape[1], 1, -1)
        return tensors

    def strength(self, layer: ReftLayer, span: Span, member_B: Tensor) -> float | Tensor:
        """Return the factor on each example's edit, (B, 1, 1), or 1.0."""
        factors = tuple(layer.strength_of(name, span) for name in self.members)
        if len(set(factors)) == 1:
            return factors[0]
        device = member_B.device
        key = ("strength", self.key, factors, device)
        return span.once(
            key, lambda: on_device(torch.tensor(factors), device)[member_B][:, None, None]
        )

    def _spread(self, phi: Intervention, name: str) -> dict[str, Tensor]:
        """Return an adapter's parameters at a layer with the batch's rank and groups."""
        tensors = phi.tensors()
        missing = self.rank - phi.shape.rank
        if phi.has_rank and missing:
            pads = {"R": (0, 0, 0, missing), "W": (0, 0, 0, missing), "bias": (0, missing)}
            tensors = {k: F.pad(t, pads[k]) for k, t in tensors.items()}
        if self.level == "all":
            return tensors
        wanted, positions = self.key.positions, self.keys[name].positions
        sizes = [1, 1] if self.level == "sides" else [wanted.prefix, wanted.suffix]
        tied_none = self.configs[name].tied == "none"
        at = [positions.prefix, positions.suffix] if tied_none else [1, 1]
        return {k: _spread_groups(t, sizes, at) for k, t in tensors.items()}

    def _subspace_mask(self, layer: ReftLayer, span: Span, device: torch.device) -> Tensor | None:
        """Return which rows of R are on, (B, r), or None where nothing was chosen."""
        chosen = span.options.subspaces
        if self.rank == 0 or (
            chosen is None and not any(n in layer.subspaces for n in self.members)
        ):
            return None
        B = len(self.per_example)
        mask = torch.zeros(B, self.rank)
        for i, name in enumerate(self.per_example):
            if name not in self.configs:
                continue
            names = layer.subspaces.get(name)
            if chosen is not None:
                shared = not chosen or isinstance(chosen[0], str)
                names = [str(n) for n in (chosen if shared else chosen[i * len(chosen) // B])]
            config = self.configs[name]
            rows = range(config.r or 0) if names is None else config.subspace_rows(names)
            mask[i, list(rows)] = 1.0
        return on_device(mask, device)


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

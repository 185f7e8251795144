"""The edits of one step of the engine: rows grouped by adapter, one batched product per layer.

A step holds chunks of many requests in one (T, d) hidden state. Rows of one Phi make an entry;
entries are cut to N rows, so that a batch of them is an (E, N, d) product with (E, r, d)
parameters, whatever the number of adapters. The only loop at a layer is over kinds of adapters.

Shape suffixes: T token of the step, E entry, N row of an entry, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from reftune.interventions import SUBSPACE_MASK
from reftune.serve.bank import Bank, Loaded
from reftune.serve.edits import Edits

_MOST_ROWS = 64
_FEWEST_ROWS = 8


class Chunk(NamedTuple):
    """What a step computes of one request: `length` tokens from `computed`, at row `row`."""

    edits: Edits
    prompt_length: int
    computed: int
    row: int
    length: int


@dataclass(frozen=True, eq=False)
class _Entry:
    adapter: Loaded
    group: int
    strength: float
    subspace: tuple[int, ...] | None
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]


@final
class Plan:
    """What is edited in one step, for every layer; empty where nothing is."""

    def __init__(self, chunks: Iterable[Chunk], bank: Bank) -> None:
        self.entries = _entries(chunks, bank)
        self.layers: dict[int, tuple[_Product, ...]] = {}
        products: dict[tuple[_Entry, ...], tuple[_Product, ...]] = {}
        for layer in sorted({i for e in self.entries for i in e.adapter.layers}):
            members = tuple(e for e in self.entries if layer in e.adapter.layers)
            if members not in products:
                products[members] = _products(members, bank.device)
            self.layers[layer] = products[members]

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def num_rows(self) -> int:
        """Return how many rows are edited, in however many layers."""
        return sum(len(e.rows) for e in self.entries)

    def apply(self, layer: int, hidden_Td: Tensor, residual_Td: Tensor | None) -> int:
        """Add the edits of a layer to `hidden_Td` in place; the stream is hidden + residual.

        Returns the number of batched products.
        """
        products = self.layers.get(layer, ())
        for product in products:
            product.apply(layer, hidden_Td, residual_Td)
        return len(products)


@dataclass(frozen=True, eq=False)
class _Product:
    """The entries of one kind, as one batched product."""

    entries: tuple[_Entry, ...]
    index: Tensor  # (E * N,), rows of the hidden states
    valid: Tensor  # (E, N)
    taken: Tensor | None  # which of the E * N slots hold a row, None for all
    strength: Tensor | None  # (E, 1, 1)
    subspaces: Tensor | None  # (E, 1, r)

    def apply(self, layer: int, hidden_Td: Tensor, residual_Td: Tensor | None) -> None:
        first = self.entries[0].adapter
        x = hidden_Td.index_select(0, self.index)
        if residual_Td is not None:
            x = x + residual_Td.index_select(0, self.index)
        h_ENd = x.view(*self.valid.shape, -1).to(first.dtype)
        parts = [(e.adapter.layers[layer], e.group) for e in self.entries]
        tensors = {k: torch.stack([p[k][g] for p, g in parts]) for k in parts[0][0]}
        if self.subspaces is not None:
            tensors[SUBSPACE_MASK] = self.subspaces
        edit_ENd: Tensor = first.phi(h_ENd, tensors, self.valid)
        if self.strength is not None:
            edit_ENd = edit_ENd * self.strength
        edit, index = edit_ENd.reshape(-1, x.shape[-1]), self.index
        if self.taken is not None:
            edit, index = edit[self.taken], index[self.taken]
        hidden_Td.index_add_(0, index, _finite(edit, hidden_Td.dtype))


def _finite(edit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an edit in the stream's dtype, without what a sum over layers makes infinite of it.

    An adapter that overflows must not leave NaN in the KV cache: vLLM's attention multiplies unused
    slots of a block by zero, so NaN of a request that is gone spoils the next owner of the block.
    """
    largest = torch.finfo(dtype).max / (4 if dtype == torch.float16 else 1024)
    edit = torch.nan_to_num(edit, nan=0.0, posinf=largest, neginf=-largest)
    return edit.clamp_(-largest, largest).to(dtype)


def _entries(chunks: Iterable[Chunk], bank: Bank) -> list[_Entry]:
    rows: dict[tuple[object, ...], list[range]] = {}
    what: dict[tuple[object, ...], tuple[Loaded, Edits, int]] = {}
    for number, chunk in enumerate(chunks):
        edits, end = chunk.edits, chunk.computed + chunk.length
        if not edits.runs(chunk.prompt_length, chunk.computed, end):
            continue
        adapter = bank.get(edits)
        offset, n = chunk.row - chunk.computed, chunk.prompt_length
        for start, stop, group in edits.groups(n, chunk.computed, end):
            parts = [(start, stop)]
            alone: list[object] = [None]
            if adapter.pools_tokens:  # over one forward's rows: a prompt's, or a generated token
                prompt = [(start, min(stop, n))] if start < n else []
                parts = prompt + [(t, t + 1) for t in range(max(start, n), stop)]
                alone = [(number, max(a - n, -1)) for a, _ in parts]
            for (a, b), one in zip(parts, alone, strict=True):
                key = (edits.fingerprint, group, one)
                rows.setdefault(key, []).append(range(a + offset, b + offset))
                what[key] = (adapter, edits, group)
    entries = []
    for entry, ranges in rows.items():
        adapter, edits, group = what[entry]
        flat = np.concatenate([np.arange(r.start, r.stop, dtype=np.int64) for r in ranges])
        entries.append(_Entry(adapter, group, edits.strength, edits.rows, flat))
    return entries


def _products(members: Sequence[_Entry], device: torch.device) -> tuple[_Product, ...]:
    kinds: dict[object, list[_Entry]] = {}
    for entry in members:
        kinds.setdefault(entry.adapter.kind, []).append(entry)
    return tuple(_product(entries, device) for entries in kinds.values())


def _product(entries: list[_Entry], device: torch.device) -> _Product:
    lengths = [len(e.rows) for e in entries]
    if entries[0].adapter.pools_tokens or len(entries) == 1:
        N = max(lengths)
    else:  # not the longest: one long entry would pad all others to its length
        N = min(max(lengths), max(_FEWEST_ROWS, min(_MOST_ROWS, int(np.median(lengths)))))
    cut = [(e, e.rows[i : i + N]) for e in entries for i in range(0, len(e.rows), N)]
    index = np.zeros((len(cut), N), dtype=np.int64)
    valid = np.zeros((len(cut), N), dtype=bool)
    for i, (_, rows) in enumerate(cut):
        index[i, : len(rows)], valid[i, : len(rows)] = rows, True
    owners = tuple(e for e, _ in cut)
    taken = None if valid.all() else _on(np.flatnonzero(valid), device)
    return _Product(
        owners,
        _on(index.reshape(-1), device),
        _on(valid, device),
        taken,
        _strength(owners, device),
        _mask(owners, device),
    )


def _strength(entries: Sequence[_Entry], device: torch.device) -> Tensor | None:
    if all(e.strength == 1.0 for e in entries):
        return None
    factors = np.array([e.strength for e in entries], dtype=np.float64)
    return _on(factors, device).to(entries[0].adapter.dtype)[:, None, None]


def _mask(entries: Sequence[_Entry], device: torch.device) -> Tensor | None:
    if all(e.subspace is None for e in entries):
        return None
    mask = np.ones((len(entries), 1, entries[0].adapter.rank), dtype=np.float32)
    for i, entry in enumerate(entries):
        if entry.subspace is not None:
            mask[i] = 0.0
            mask[i, 0, list(entry.subspace)] = 1.0
    return _on(mask, device).to(entries[0].adapter.dtype)


def _on(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)

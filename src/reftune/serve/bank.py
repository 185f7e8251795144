"""A worker's adapters: on its device up to a limit, in host memory up to another, else on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from reftune.config import ReftConfig
from reftune.interventions import Intervention
from reftune.serve.edits import Edits
from reftune.serve.parameters import padded_rank, read_parameters

Kind = tuple[str, str | None, int, str, int]


@final
@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter's parameters by name, (L, G, ...), ranks padded to a power of two.

    `numbers` are those of the L layers. Adapters of one `kind` fit into one batched product: same
    formula, same padded rank.
    """

    digest: str
    kind: Kind
    phi: Intervention
    rank: int
    dtype: torch.dtype
    numbers: tuple[int, ...]
    parameters: Mapping[str, Tensor]
    pools_tokens: bool

    @property
    def nbytes(self) -> int:
        """Return the size of the parameters."""
        return sum(t.nbytes for t in self.parameters.values())

    @cached_property
    def layers(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Return the parameters (G, ...) of each layer by its number."""
        unbound = {name: t.unbind() for name, t in self.parameters.items()}
        return {
            number: {name: parts[i] for name, parts in unbound.items()}
            for i, number in enumerate(self.numbers)
        }

    def to(self, device: torch.device) -> Loaded:
        """Return a copy on a device."""
        there = {k: t.to(device, non_blocking=True) for k, t in self.parameters.items()}
        return replace(self, parameters=there)


@dataclass(eq=False)
class _Shelf:
    """Adapters in the order of their last use, up to `limit` bytes."""

    limit: float
    items: OrderedDict[str, Loaded] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def get(self, digest: str) -> Loaded | None:
        found = self.items.get(digest)
        if found is not None:
            self.items.move_to_end(digest)
        return found

    def put(self, loaded: Loaded) -> None:
        self.items[loaded.digest] = loaded
        self.nbytes += loaded.nbytes

    def trim(self, keep: frozenset[str]) -> int:
        """Drop the least recently used until the limit holds; returns how many were."""
        if self.nbytes <= self.limit:
            return 0
        dropped = 0
        for digest in [d for d in self.items if d not in keep]:
            self.nbytes -= self.items.pop(digest).nbytes
            dropped += 1
            if self.nbytes <= self.limit:
                break
        return dropped


@final
class Bank:
    """The adapters of one worker.

    Args:
        hidden_size: width of the model's hidden states.
        device: where they are used.
        limit, host_limit: bytes on the device and, where that is no CPU, in host memory beside it.
    """

    def __init__(
        self, hidden_size: int, device: torch.device, limit: float, host_limit: float
    ) -> None:
        self.hidden_size = hidden_size
        self.device = device
        self.loads = self.evictions = 0
        self._device = _Shelf(limit)
        self._host = _Shelf(host_limit) if device.type != "cpu" else None
        self._pinned: dict[str, str] = {}  # the version of each pinned name

    def __len__(self) -> int:
        return len(self._device.items)

    @property
    def nbytes(self) -> int:
        """Return how many bytes of adapters are on the device."""
        return self._device.nbytes

    def get(self, edits: Edits) -> Loaded:
        """Return the adapter of a request, loading it if it is not here."""
        if edits.pinned:
            self._pinned[edits.name] = edits.digest
        found = self._device.get(edits.digest)
        if found is None:
            found = self._from_host(edits).to(self.device)
            self._device.put(found)
        return found

    def trim(self) -> None:
        """Drop what exceeds the limits; called after the step whose adapters were got."""
        keep = frozenset(self._pinned.values())
        self.evictions += self._device.trim(keep)
        if self._host is not None:
            self._host.trim(frozenset())

    def _from_host(self, edits: Edits) -> Loaded:
        found = None if self._host is None else self._host.get(edits.digest)
        if found is None:
            found = load(edits.digest, Path(edits.directory), self.hidden_size)
            self.loads += 1
            if self._host is not None:
                self._host.put(found)
        return found


def load(digest: str, directory: Path, hidden_size: int) -> Loaded:
    """Return a version of an adapter; its parameters are mapped from the version's directory."""
    config = ReftConfig.from_pretrained(str(directory))
    rank = padded_rank(config)
    numbers, parameters = read_parameters(directory)
    return Loaded(
        digest=digest,
        kind=(config.method, config.act_fn, config.topk, config.dtype, rank),
        phi=config.formula(hidden_size),
        rank=rank,
        dtype=getattr(torch, config.dtype),
        numbers=numbers,
        parameters=parameters,
        pools_tokens=config.intervention.pools_tokens,
    )

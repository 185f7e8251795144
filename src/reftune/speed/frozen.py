"""What the parameters cannot change, computed once and kept: frozen hidden states and keys.

Below the first edited layer nothing depends on the adapter, and in a causal model no token before
the first edited one does. An example's *head* are the tokens before its first edited one, its
*tail* the rest. Kept of the head are its keys and values above the first edited layer, of the tail
the hidden states that the first edited layer returns before they are edited.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from reftune.config import ReftConfig
from reftune.context import options
from reftune.positions import side_lengths
from reftune.speed.patch import forward_replaced


def first_edited(prompt_lengths: Tensor, config: ReftConfig) -> Tensor:
    """Return which token of each example is the first that an adapter edits, from 0; (N,)."""
    positions = config.parsed_positions
    if positions.everything:
        return torch.zeros_like(prompt_lengths)
    prefix, suffix = side_lengths(
        prompt_lengths, positions.prefix, positions.suffix, config.short_prompts
    )
    return torch.where(prefix > 0, 0, prompt_lengths - suffix)


@dataclass(frozen=True)
class States:
    """The frozen states of one example: its tail's `hidden` (T, d), its head's `keys`.

    `keys` (2L, H, P, D) are keys and values by turns, of the L layers above the first edited one.
    """

    hidden: Tensor
    keys: Tensor | None

    @property
    def nbytes(self) -> int:
        """Return how much memory they take."""
        return self.hidden.nbytes + (0 if self.keys is None else self.keys.nbytes)


class Store:
    """States by the number of the example: in memory up to a limit, then in a file up to another.

    What fits in neither is computed again each time. `close` removes the file.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, folder: Path | None = None) -> None:
        self._memory: dict[int, States] = {}
        self._on_disk: dict[int, list[tuple[int, tuple[int, ...], torch.dtype] | None]] = {}
        self._memory_left, self._disk_left = memory_bytes, disk_bytes
        self._folder = folder
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._memory) + len(self._on_disk)

    def __contains__(self, number: int) -> bool:
        return number in self._memory or number in self._on_disk

    def __getitem__(self, number: int) -> States:
        if number in self._memory:
            return self._memory[number]
        hidden, keys = (self._read(place) for place in self._on_disk[number])
        assert hidden is not None
        return States(hidden, keys)

    def put(self, number: int, states: States) -> None:
        """Keep the states of an example, if there is room and it has none yet."""
        if number in self:
            return
        size = states.nbytes
        if size <= self._memory_left:
            self._memory_left -= size
            self._memory[number] = states
        elif size <= self._disk_left:
            self._disk_left -= size
            self._on_disk[number] = [self._write(states.hidden), self._write(states.keys)]

    def clear(self) -> None:
        """Forget everything."""
        for states in self._memory.values():
            self._memory_left += states.nbytes
        self._memory.clear()
        self._on_disk.clear()

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, t: Tensor | None) -> tuple[int, tuple[int, ...], torch.dtype] | None:
        if t is None:
            return None
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - kept open
        at = self._file.seek(0, os.SEEK_END)
        self._file.write(t.contiguous().view(torch.uint8).numpy().tobytes())
        return at, tuple(t.shape), t.dtype

    def _read(self, place: tuple[int, tuple[int, ...], torch.dtype] | None) -> Tensor | None:
        if place is None:
            return None
        at, shape, dtype = place
        size = int(np.prod(shape)) * dtype.itemsize
        self._file.seek(at)
        data = torch.frombuffer(bytearray(self._file.read(size)), dtype=torch.uint8)
        return data.view(dtype).view(shape)


def free_memory(share: float = 0.25) -> int:
    """Return a share of the memory that is free, in bytes."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(share * free)


def free_disk(folder: Path, share: float = 0.25) -> int:
    """Return a share of the free space where a folder is, in bytes."""
    return int(share * shutil.disk_usage(folder).free)


class Frozen:
    """Runs a model's forward with the frozen states of its examples in place of computing them.

    Args:
        decoder: the stack of layers, called for the heads.
        layers: its decoder layers, in order.
        first: the number of the first edited one.
        store: keeps the states; None keeps nothing, and only the heads' gradient is saved.
    """

    def __init__(
        self, decoder: nn.Module, layers: Sequence[nn.Module], first: int, store: Store | None
    ) -> None:
        self.decoder, self.layers, self.first, self.store = decoder, list(layers), first, store
        self.hits = 0
        self._given: Tensor | None = None
        self._returned: Tensor | None = None
        self._is_tuple = False
        self._stamp = self._versions()

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model's forward, from a batch of `speed.batches`."""
        index: list[int] = batch.pop("index")
        head_ids, head_mask = batch.pop("head_ids", None), batch.pop("head_mask", None)
        shared = batch.pop("shared", 0)
        if self.store is not None and self._stamp != self._versions():
            self.store.clear()
            self._stamp = self._versions()
        self._given = None
        known = self.store is not None and all(number in self.store for number in index)
        device = batch["input_ids"].device
        states = [self.store[number] for number in index] if known and self.store else None
        if states is not None:
            self.hits += 1
            hidden = pad_sequence([s.hidden for s in states], batch_first=True)
            self._given = hidden.to(device, non_blocking=True)
        if head_ids is not None:
            cache = (
                self._run_heads(head_ids, head_mask, shared)
                if states is None
                else self._cache(states, head_mask)
            )
            batch["past_key_values"], batch["use_cache"] = cache, True
        return batch

    def keep(self, batch: dict[str, Any], index: Sequence[int], lengths: Sequence[int]) -> None:
        """Store what the forward of a batch gave, for the examples that are not stored yet."""
        returned, self._returned, self._given = self._returned, None, None
        if self.store is None or returned is None:
            return
        cache = batch.get("past_key_values")
        for row, number in enumerate(index):
            hidden = returned[row, : lengths[row]].to("cpu", copy=True)
            keys = None
            if cache is not None:
                P = batch["prompt_mask"].shape[1] - returned.shape[1]
                keys = self._keys_of(cache, row, batch["attention_mask"][row, :P].bool())
            self.store.put(number, States(hidden, keys))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the layers up to the first edited one use what is given, in a block."""
        covered = self.layers[: self.first + 1]
        with forward_replaced(covered, lambda m: self._layer(m.forward, covered.index(m))):
            try:
                yield
            finally:
                if self.store is not None:
                    self.store.close()

    def _layer(self, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        """Return the forward of a covered layer: skipped where its result is given."""

        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                output = forward(hidden_states, *args, **kwargs)
                if number == self.first:
                    self._is_tuple = isinstance(output, tuple)
                    hidden = output[0] if self._is_tuple else output
                    self._returned = hidden.detach().clone()  # an edit may be in place
                return output
            given = self._given if number == self.first else hidden_states
            return (given,) if self._is_tuple else given

        return run

    def _run_heads(self, ids: Tensor, mask: Tensor, shared: int) -> DynamicCache:
        """Return keys and values of the heads (B, P), the first `shared` computed once."""
        cache = DynamicCache()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        columns = [slice(0, shared), slice(shared, None)] if shared else [slice(0, None)]
        with torch.no_grad(), options(strength=0.0):
            for part in columns:
                rows = slice(0, 1) if part.stop else slice(None)
                if ids[:, part].shape[1]:
                    self.decoder(
                        input_ids=ids[rows, part],
                        attention_mask=mask[rows, : part.stop],
                        position_ids=position_ids[rows, part],
                        past_key_values=cache,
                        use_cache=True,
                    )
                if part.stop:
                    cache.batch_repeat_interleave(len(ids))
        return cache

    def _keys_of(self, cache: DynamicCache, row: int, real: Tensor) -> Tensor:
        """Return an example's keys and values above the first edited layer, (2L, H, P, D)."""
        above: list[Any] = cache.layers[self.first + 1 :]
        P = len(real)
        parts = [t[row, :, :P][:, real] for layer in above for t in (layer.keys, layer.values)]
        return torch.stack(parts).detach().to("cpu", copy=True)

    def _cache(self, states: Sequence[States], mask: Tensor) -> DynamicCache:
        """Return a cache that holds the heads' stored keys and values in the columns of a mask."""
        B, P = mask.shape
        shape = next(s.keys for s in states if s.keys is not None).shape
        batch = states[0].hidden.new_zeros(B, shape[0], shape[1], P, shape[3])
        for row, (s, real) in enumerate(zip(states, mask.bool().cpu(), strict=True)):
            if s.keys is not None:
                batch[row, :, :, real] = s.keys
        batch = batch.to(mask.device, non_blocking=True)
        cache = DynamicCache()
        # The layers below are skipped; the first one is asked how long the sequence is.
        length_only = batch.new_zeros(1, 1, 1, 1).expand(B, 1, P, 1)
        for number in range(self.first + 1):
            cache.update(length_only, length_only, number)
        for number in range(self.first + 1, len(self.layers)):
            at = 2 * (number - self.first - 1)
            cache.update(batch[:, at], batch[:, at + 1], number)
        return cache

    def _versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.decoder.parameters() if not p.requires_grad)

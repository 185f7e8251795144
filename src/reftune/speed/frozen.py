"""What the parameters cannot change, computed once and kept: frozen hidden states and keys.

Below the first edited layer nothing depends on the adapter, and in a causal model no token before
the first edited one does. An example's *head* are the tokens before its first edited one, its
*tail* the rest. Kept of the head are its keys and values above the first edited layer, of the tail
the hidden states that the first edited layer returns before they are edited.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from reftune.config import ReftConfig
from reftune.context import options
from reftune.positions import on_device, side_lengths
from reftune.spans import current_span
from reftune.speed.patch import forward_replaced

log = logging.getLogger("reftune")


def first_edited(prompt_lengths: Tensor, config: ReftConfig) -> Tensor:
    """Return which token of each example is the first that an adapter edits, from 0; (N,).

    Where it edits none, that is the prompt's last: the first that something reads.
    """
    positions = config.parsed_positions
    if positions.everything:
        return torch.zeros_like(prompt_lengths)
    prefix, suffix = side_lengths(
        prompt_lengths, positions.prefix, positions.suffix, config.short_prompts
    )
    return torch.where(prefix > 0, 0, prompt_lengths - suffix.clamp(min=1)).clamp(min=0)


def edited_alike(prompt_lengths: Tensor, config: ReftConfig) -> Tensor:
    """Return how many of a prompt's first tokens have the same slots whatever its length; (B,)."""
    positions = config.parsed_positions
    if positions.everything:
        return prompt_lengths
    p, s = positions.prefix, positions.suffix
    whole = (prompt_lengths >= p + s) & (prompt_lengths // 2 >= max(p, s))
    return torch.where(whole, prompt_lengths - s, 0)


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
        self._memory_left, self._disk_bytes = memory_bytes, disk_bytes
        self._folder = folder
        self._file_size = 0
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
        elif self._file_size + size <= self._disk_bytes:
            try:
                places = [self._write(states.hidden), self._write(states.keys)]
            except OSError as error:
                self._disk_bytes = 0
                log.warning("No more frozen states are kept on disk: %s", error)
            else:
                self._on_disk[number] = places

    def clear(self) -> None:
        """Forget everything."""
        for states in self._memory.values():
            self._memory_left += states.nbytes
        self._memory.clear()
        self._on_disk.clear()
        self._file_size = 0  # it is written over

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
            # Without a buffer, so that a full disk is told here.
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
        at = self._file.seek(self._file_size)
        data = t.contiguous().view(torch.uint8).numpy().tobytes()
        if self._file.write(data) != len(data):
            raise OSError("there is no room for all of an example's")
        self._file_size += len(data)
        return at, tuple(t.shape), t.dtype

    def _read(self, place: tuple[int, tuple[int, ...], torch.dtype] | None) -> Tensor | None:
        if place is None:
            return None
        at, shape, dtype = place
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        self._file.seek(at)
        data = bytearray(self._file.read(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape)


def free_memory(share: float = 0.25) -> int:
    """Return a share of the memory that is free, for this process, in bytes."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(share * min(free, _free_in_group(Path("/sys/fs/cgroup"))))


def _free_in_group(root: Path) -> float:
    """Return what the process's control groups, a container's, leave of their limits, in bytes."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    names = [line.partition("::")[2] for line in lines if line.startswith("0::")]
    v2 = ("memory.max", "memory.current", "inactive_file ")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    own = [root / name.lstrip("/") for name in names]
    groups = [(folder, v2) for leaf in own for folder in (leaf, *leaf.parents)]
    return min(_free_below(folder, *files) for folder, files in [*groups, (root / "memory", v1)])


def _free_below(group: Path, limit: str, usage: str, cache: str) -> float:
    """Return a limit less what is used, but for files that are cached; without a limit, inf."""
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        cached = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # "max"
        return math.inf
    return max(0, most - used + sum(int(c.split()[1]) for c in cached if c.startswith(cache)))


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
        self._others: tuple[None, ...] | None = None  # of what a layer returns, if it is a tuple
        self._is_open = False
        self._stamp = self._versions()
        self._digests: dict[int, int] = {}  # of the tokens that an example had

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model's forward, from a batch of `speed.batches`."""
        index, lengths = batch.pop("index"), batch.pop("lengths")
        tokens = list(zip(index, batch.pop("digests"), strict=True))
        head_ids, head_mask = batch.pop("head_ids", None), batch.pop("head_mask", None)
        shared = batch.pop("shared", 0)
        stamp = self._versions()
        # An example of that number may be another one: of a second data set, or drawn anew.
        others = any(self._digests.get(number, one) != one for number, one in tokens)
        if self._stamp != stamp or others:
            self._forget()
            self._stamp = stamp
        self._given = None
        device = batch["input_ids"].device
        states = self._known(index, lengths)
        self._digests |= dict(reversed(tokens))  # what is kept is the first of a number
        if states is not None:
            self.hits += 1
            hidden = pad_sequence([s.hidden for s in states], batch_first=True)
            self._given = on_device(hidden, device)
        if head_ids is not None:
            cache = (
                self._run_heads(head_ids, head_mask, shared)
                if states is None
                else self._cache(states, head_mask)
            )
            batch["past_key_values"], batch["use_cache"] = cache, True
        self._is_open = True
        return batch

    def _known(self, index: Sequence[int], lengths: Sequence[int]) -> list[States] | None:
        """Return the stored states of a batch, if all are there, and are of tails as long."""
        store = self.store
        if store is None or not all(number in store for number in index):
            return None
        states = [store[number] for number in index]
        if all(len(s.hidden) == length for s, length in zip(states, lengths, strict=True)):
            return states
        self._forget()  # the adapter's positions have changed
        return None

    def _forget(self) -> None:
        self._digests.clear()
        if self.store is not None:
            self.store.clear()

    def keep(self, batch: dict[str, Any], index: Sequence[int], lengths: Sequence[int]) -> None:
        """Store what the forward of a batch gave, for the examples that are not stored yet."""
        returned, self._returned, self._given = self._returned, None, None
        self._is_open = False
        if self.store is None or returned is None:
            return
        cache = batch.get("past_key_values")
        returned = returned.cpu()  # an accelerator's at once
        for row, number in enumerate(index):
            hidden = returned[row, : lengths[row]].clone()
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
            given = self._given
            if number == self.first:  # and in a backward, where a checkpoint calls it once more
                given = current_span().once("frozen", lambda: self._given)
            if given is None and number < self.first:
                return _without_gradient(forward, hidden_states, *args, **kwargs)
            if given is None:
                output = forward(hidden_states, *args, **kwargs)
                if number == self.first and self._is_open:
                    is_tuple = isinstance(output, tuple)
                    self._others = (None,) * (len(output) - 1) if is_tuple else None
                    hidden = output[0] if is_tuple else output
                    self._returned = hidden.detach().clone()  # an edit may be in place
                return output
            output = given if number == self.first else hidden_states
            return output if self._others is None else (output, *self._others)

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
        columns = real.nonzero().flatten()  # of the first P
        parts = [t[row].index_select(1, columns) for a in above for t in (a.keys, a.values)]
        if not parts:  # the first edited layer is the last
            return torch.empty(0, 1, len(columns), 1)
        return torch.stack(parts).detach().to("cpu", copy=True)

    def _cache(self, states: Sequence[States], mask: Tensor) -> DynamicCache:
        """Return a cache that holds the heads' stored keys and values in the columns of a mask."""
        B, P = mask.shape
        some = next(s.keys for s in states if s.keys is not None)
        batch = some.new_zeros(B, some.shape[0], some.shape[1], P, some.shape[3])
        for row, (s, real) in enumerate(zip(states, mask.bool().cpu(), strict=True)):
            if s.keys is not None:
                batch[row, :, :, real] = s.keys
        batch = on_device(batch, mask.device)
        cache = DynamicCache()
        # The layers below are skipped; the first one is asked how long the sequence is.
        length_only = batch.new_zeros(1, 1, 1, 1).expand(B, 1, P, 1)
        for number in range(self.first + 1):
            cache.update(length_only, length_only, number)
        for number in range(self.first + 1, len(self.layers)):
            at = 2 * (number - self.first - 1)
            cache.update(batch[:, at], batch[:, at + 1], number)
        return cache

    def _versions(self) -> list[tuple[int, int]]:
        """Return what is another where a frozen weight was changed in place, or replaced."""
        frozen = [p for p in self.decoder.parameters() if not p.requires_grad]
        # A quantised weight has no one place in memory.
        return [(p.data_ptr() if type(p) is nn.Parameter else id(p), p._version) for p in frozen]


def _without_gradient(
    forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Return what a frozen layer returns, with nothing kept for a backward through it.

    With gradient checkpointing PEFT lets the embeddings require a gradient, so that the layers do.
    """
    with torch.no_grad():
        output = forward(hidden, *args, **kwargs)
    returned = output[0] if isinstance(output, tuple) else output
    returned.requires_grad_(hidden.requires_grad)
    return output

"""Tokens of examples as a torch data set, and the one collator.

TokenDataset.from_examples(examples, tokenizer, ...) -> rows -> Collator -> a batch of tensors
"""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from reftune.errors import ReftConfigError
from reftune.prompts import IGNORED_LABEL, Encoded, LongPrompts, TemplateName
from reftune.token_store import Columns, Encoder, flatten, open_columns, stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.prompts import Example


class TokenRow(TypedDict):
    """The tokens of an example, their labels (-100 on the prompt), and its number."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    index: NotRequired[int]


@final
class TokenDataset(Dataset[TokenRow]):
    """Encoded examples as a torch data set.

    `lengths` and `prompt_lengths` (a number for each example) serve samplers that group by length.
    """

    lengths: Sequence[int]
    prompt_lengths: Sequence[int]

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        ids, lengths, prompts = flatten(encoded)
        self._set(Columns(ids, np.append([0], np.cumsum(lengths)), prompts))

    @classmethod
    def from_examples(
        cls,
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "auto",
        max_length: int = 512,
        long_prompts: LongPrompts = "error",
        *,
        cache_dir: str | Path | None = "auto",
        num_proc: int | None = None,
    ) -> TokenDataset:
        """Encode examples as `encode_examples` does, or find their tokens in `cache_dir`.

        "auto" is `$REFTUNE_CACHE/tokens` (`~/.cache/reftune/tokens`), for what is not encoded in a
        second or two; None keeps nothing, and what is large is then in a temporary file. An
        iterator, which can be read only once, is always encoded. `num_proc` processes do it; by
        default this one, and from about the 20,000th example on others.

        Raises:
            DataError: a prompt is empty, or too long under "error"; names the row.
            ReftConfigError: a setting is not accepted, or `cache_dir` cannot be written.
        """
        encoder = Encoder(tokenizer, template, max_length, long_prompts)
        data = cls.__new__(cls)
        data._set(stored(examples, encoder, cache_dir, num_proc))
        return data

    def _set(self, columns: Columns) -> None:
        self._ids, self._path = columns.ids, columns.path
        self._starts = columns.offsets[:-1]
        # arrays, for their size, and not NumPy's, for the integers that they hold
        self.lengths = array("i", np.diff(columns.offsets).astype(np.intc).tobytes())
        self.prompt_lengths = array("i", columns.prompts.astype(np.intc).tobytes())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenRow:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no example {index}, there are {len(self)}.")
        index %= len(self)
        start = int(self._starts[index])
        ids = self._ids[start : start + self.lengths[index]].astype(np.int64)
        labels = ids.copy()
        labels[: self.prompt_lengths[index]] = IGNORED_LABEL
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "index": index,
        }

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenDataset:
        """Return a data set of some of the examples, numbered anew; the tokens are shared."""
        rows = np.asarray(indices, dtype=np.int64)
        chosen = self.__class__.__new__(self.__class__)
        chosen._ids, chosen._path = self._ids, self._path
        chosen._starts = self._starts[rows]
        chosen.lengths = array("i", np.asarray(self.lengths)[rows].tobytes())
        chosen.prompt_lengths = array("i", np.asarray(self.prompt_lengths)[rows].tobytes())
        return chosen

    def split(self, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """Set the share `fraction` of the examples apart; return (the others, those), in order.

        Raises:
            ReftConfigError: `fraction` is not between 0 and 1, or one of the two would be empty.
        """
        count = round(len(self) * fraction)
        if not 0 < fraction < 1 or not 0 < count < len(self):
            raise ReftConfigError(
                f"{fraction} of {len(self)} examples cannot be set apart: give a fraction between "
                "0 and 1 that leaves at least one example on either side."
            )
        apart = np.zeros(len(self), dtype=bool)
        apart[random.Random(seed).sample(range(len(self)), count)] = True
        return self.select(np.flatnonzero(~apart)), self.select(np.flatnonzero(apart))

    def __getstate__(self) -> dict[str, Any]:
        """Send a file's name to a worker process, and not what is in the file."""
        return vars(self) | ({} if self._path is None else {"_ids": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._path is not None:
            columns = open_columns(self._path, self._path.stem)
            assert columns is not None, f"{self._path} is gone"
            self._ids = columns.ids


@final
@dataclass(frozen=True, slots=True)
class Collator:
    """Pad rows on the right into a batch of (B, L) tensors: input_ids, attention_mask, labels.

    The attention mask comes from the lengths: a pad token is often eos, too, which a completion
    has to be able to contain. `with_index` adds the examples' numbers as "index", (B,).
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    with_index: bool = False

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """Return the batch; `labels` is -100 on padding."""
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        # NumPy's slices take half the time of torch's on rows so short (100 and 230 us for 16)
        ids_BL = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        mask_BL = np.zeros((len(rows), length), dtype=np.int64)
        labels_BL = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int64)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            assert len(row["labels"]) == size, "labels and input_ids differ in length"
            ids_BL[index, :size] = row["input_ids"]
            mask_BL[index, :size] = 1
            labels_BL[index, :size] = row["labels"]
        arrays = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
        if self.with_index:
            arrays["index"] = np.array([row["index"] for row in rows], dtype=np.int64)
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

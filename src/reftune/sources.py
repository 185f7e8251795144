"""What a run's config says about its data: as examples, and as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from reftune import demo
from reftune.data import iter_examples, iter_rows
from reftune.errors import ReftConfigError
from reftune.prompts import Example
from reftune.settings import RunConfig
from reftune.tasks.commonsense import NAMES as COMMONSENSE
from reftune.tasks.commonsense import training_examples
from reftune.token_store import Examples
from reftune.tokens import TokenDataset

DEMO_SPLITS = {"train": demo.TRAIN, "heldout": demo.HELDOUT}


def read_examples(config: RunConfig) -> tuple[Examples, Examples | None]:
    """Return the training examples and those of `data.heldout`. Raises DataError, ReftConfigError.

    Each row is looked at here (unless `data.streaming`) and read again to be encoded. All but
    tasks' mixtures and .json files are read row by row.
    """
    data = config.data
    train = _examples(config, data.train, "train", data.limit)
    if next(iter(train), None) is None:
        raise ReftConfigError(f"data.train={data.train!r} holds no examples.")
    heldout = _examples(config, data.heldout, "heldout") if data.heldout is not None else None
    if not data.streaming:
        for part in filter(None, (train, heldout)):
            _ = part.digest  # a wrong row is named before a model is loaded
    return train, heldout


def tokenise(
    config: RunConfig, examples: tuple[Examples, Examples | None], tokenizer: Any
) -> tuple[TokenDataset, TokenDataset | None]:
    """Return training and held-out examples as tokens. Raises DataError for a long prompt."""
    data = config.data

    def encode(part: Examples) -> TokenDataset:
        return TokenDataset.from_examples(
            iter(part) if data.streaming else part,
            tokenizer,
            data.template,
            data.max_length,
            data.long_prompts,
            cache_dir=data.cache_dir,
            num_proc=data.num_proc,
        )

    train = encode(examples[0])
    if not len(train):
        raise ReftConfigError(
            f"All prompts of data.train={data.train!r} are too long for data.max_length="
            f"{data.max_length}, so that none is left: data.long_prompts is 'skip'."
        )
    if examples[1] is not None:
        heldout = encode(examples[1])
        return train, heldout if len(heldout) else None
    if data.heldout_fraction:
        return train.split(data.heldout_fraction, config.seed)
    return train, None


def _examples(
    config: RunConfig, sources: str | Sequence[str], split: str, limit: int | None = None
) -> Examples:
    data = config.data
    names = [sources] if isinstance(sources, str) else list(sources)
    tasks = [name for name in names if name in COMMONSENSE and not Path(name).exists()]
    mixture: list[Example] = []
    if tasks:
        if data.data_dir is None:
            raise ReftConfigError(f"data.train names tasks ({tasks}); give their data.data_dir.")
        mixture = training_examples(data.data_dir, tasks, seed=config.seed)

    def read() -> Iterator[Example]:
        yield from mixture
        for name in names:
            if name not in tasks:
                source = DEMO_SPLITS[split] if name == "demo" else name
                rows = iter_rows(source, streaming=data.streaming)
                yield from iter_examples(rows, data.columns, data.system)

    return Examples(lambda: islice(read(), limit))

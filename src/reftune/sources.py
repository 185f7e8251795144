"""What a run's config says about its data: as examples, and as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from reftune import demo
from reftune.data import iter_examples, iter_rows
from reftune.errors import DataError, ReftConfigError
from reftune.prompts import Example
from reftune.settings import RunConfig
from reftune.tasks import TASKS, Split, Task, get_task, template_of, training_examples
from reftune.tasks.leaks import look_for_leaks
from reftune.token_store import Examples
from reftune.tokens import TokenDataset

DEMO_SPLITS = {"train": demo.TRAIN, "heldout": demo.HELDOUT}


def read_examples(config: RunConfig) -> tuple[Examples, Examples | None]:
    """Return the training examples and those of `data.heldout`. Raises DataError, ReftConfigError.

    Each row is looked at here (unless `data.streaming`) and read again to be encoded. All but
    tasks' mixtures and .json files are read row by row.
    """
    data = config.data
    _check_template(config)
    train = _examples(config, data.train, "train", data.limit)
    if next(iter(train), None) is None:
        raise ReftConfigError(f"data.train={data.train!r} holds no examples.")
    heldout = _examples(config, data.heldout, "heldout") if data.heldout is not None else None
    if not data.streaming:
        for part in filter(None, (train, heldout)):
            _ = part.digest  # a wrong row is named before a model is loaded
    return train, heldout


def check_data(config: RunConfig) -> None:
    """Raise DataError or ReftConfigError for what is wrong with the data of a run of prompts."""
    if config.task_type == "causal_lm":
        tasks_of(config)
        without_leaks(config, read_examples(config)[0])


def tasks_of(config: RunConfig) -> list[Task]:
    """Return the tasks that are evaluated. Raises ReftConfigError, DataError."""
    wanted, data_dir = config.evaluate, config.data.data_dir
    how = (wanted.split, wanted.limit, wanted.decoding, wanted.max_new_tokens)
    return [get_task(name, data_dir, *how) for name in wanted.tasks]


def without_leaks(config: RunConfig, train: Examples) -> tuple[Examples, list[str]]:
    """Return the examples to train on, and notes on questions that will be evaluated among them.

    The whole of each task is looked at, whatever `evaluate.limit`; streamed data is not looked at.

    Raises:
        DataError: too many are shared, and `data.leaks` is "refuse".
        ReftConfigError: a task does not exist.
    """
    data, wanted = config.data, config.evaluate
    if not wanted.tasks:
        return train, []
    if data.streaming:
        return train, ["Note: streamed training data is not searched for the tasks' questions."]
    tasks = [get_task(name, data.data_dir, wanted.split) for name in wanted.tasks]
    tests = {task.name: [task.example(i) for i in range(task.num_examples)] for task in tasks}
    left_out, notes = look_for_leaks(train, tests, data.leaks)
    if not left_out:
        return train, notes
    return Examples(lambda: (e for i, e in enumerate(train) if i not in left_out)), notes


def trained_on(config: RunConfig) -> Examples:
    """Return what a run of this config was trained on, as far as it is there to be read again.

    Rows that `data.heldout_fraction` set apart, or whose prompts were too long, are among them.
    Raises DataError, ReftConfigError.
    """
    data = config.data
    if data.streaming:
        raise DataError("it was streamed.")
    train = _examples(config, data.train, "train", data.limit)
    return without_leaks(config, train)[0] if data.leaks == "drop" else train


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


def choosing_data(config: RunConfig) -> tuple[str, ...]:
    """Return which keys of `evaluate` decide which rows are trained on."""
    if config.data.leaks == "drop":
        return ("split", "tasks")
    return ("split",) if _tasks(config.data.train) else ()


def _examples(
    config: RunConfig, sources: str | Sequence[str], split: str, limit: int | None = None
) -> Examples:
    data = config.data
    names = [sources] if isinstance(sources, str) else list(sources)
    tasks = _tasks(names)
    mixture: list[Example] = []
    if tasks:
        mixture = training_examples(
            tasks, data.data_dir, seed=config.seed, split=_split(config, split)
        )

    def read() -> Iterator[Example]:
        yield from mixture
        for name in names:
            if name not in tasks:
                source = DEMO_SPLITS[split] if name == "demo" else name
                rows = iter_rows(source, streaming=data.streaming)
                yield from iter_examples(rows, data.columns, data.system)

    return Examples(lambda: islice(read(), limit))


def _tasks(names: str | Sequence[str] | None) -> list[str]:
    """Return which of the names are tasks, and not files or data sets."""
    listed = [names] if isinstance(names, str) else list(names or ())
    return [n for n in listed if n in TASKS and n != "demo" and not Path(n).exists()]


def _split(config: RunConfig, part: str) -> Split:
    """Return what of a task's rows is trained on, or held out.

    Training has them all, as the paper's; without the validation rows where these are looked at.
    """
    if part == "heldout":
        return "validation"
    tuning = config.evaluate.split == "validation" or _tasks(config.data.heldout)
    return "fit" if tuning else "train"


def _check_template(config: RunConfig) -> None:
    """Raise ReftConfigError if tasks would be trained on with other prompts than they have."""
    tasks = _tasks(config.data.train)
    if tasks and (own := template_of(tasks)) != config.data.template:
        raise ReftConfigError(
            f"data.template is {config.data.template!r}, and {', '.join(tasks)} have prompts of "
            f"the template {own!r}: evaluated with it, an adapter must be trained with it. Set "
            f"data.template: {own}"
        )

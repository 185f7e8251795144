"""reftune as its users have it: `fit` with `TrainSettings`, its own batches and data loading.

`overrides` of a job are keys of a run's config, "train.KEY" or "adapter.KEY", so that each
optimisation can be measured alone; and "without.PART" for those that have no setting, of which
PART says one: what transformers does is done in its place.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import LOGGING_STEPS, Arm, Clock, collate, main
from job import Job, Row
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import set_seed

from reftune import ReftConfig
from reftune.callbacks import Progress
from reftune.data import Collator, TokenDataset
from reftune.models import load_model
from reftune.prompts import Encoded
from reftune.speed import attention, dropout, norms, products
from reftune.speed.loss import cross_entropy
from reftune.speed.training import LabelledLoss
from reftune.train import LOG, EpochSampler, TrainSettings, fit

NEVER = 10**9


def _logits_everywhere(
    self: LabelledLoss, args: Any, kwargs: Any, reads: Tensor, targets: Tensor, count: Any
) -> Tensor:
    """Return the loss from logits of all rows, with their gradient, as models compute it."""
    assert self.model.head is not None
    logits = self.model.head(self.model.decoder(*args, **kwargs).last_hidden_state)
    labels = targets.new_full((logits[..., 0].numel(),), -100).index_copy(0, reads, targets)
    return cross_entropy(logits.flatten(0, -2), labels, len(targets) if count is None else count)


def _nothing(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


WITHOUT = {
    "norms": lambda: patch.object(norms, "faster", _nothing),
    "dropout": lambda: patch.object(dropout, "faster", _nothing),
    "attention": lambda: patch.object(attention, "in_training", _nothing),
    "products": lambda: patch.object(products, "LONGEST", 0),
    "labels": lambda: patch.object(LabelledLoss, "_loss", _logits_everywhere),
}
"""Norms in closed form, cheap dropout, attention of ours, its plain products on CPUs, and logits
for labels alone."""


@contextmanager
def drawn() -> Iterator[list[int]]:
    """Record the numbers of the examples in the order in which `fit` takes them."""
    indices: list[int] = []
    yielded = EpochSampler.__iter__

    def recording(sampler: EpochSampler) -> Iterator[int]:
        for index in yielded(sampler):
            indices.append(index)
            yield index

    EpochSampler.__iter__ = recording  # type: ignore[method-assign]
    try:
        yield indices
    finally:
        EpochSampler.__iter__ = yielded  # type: ignore[method-assign]


class Sequences(Dataset[Row]):
    """Examples of a classifier, as `fit` takes them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lengths = [len(row.input_ids) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class Reftune(Arm):
    """This library."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.indices: list[int] = []

    def load(self) -> Any:
        if self.job.task != "causal":
            return super().load()
        model, _ = load_model(self.job.model, self.job.dtype, self.job.device)  # type: ignore[arg-type]
        return model

    def attach(self, model: Any) -> Any:
        setting, causal = self.job.setting, self.job.task == "causal"
        values: dict[str, Any] = {
            "r": setting.rank,
            "layers": setting.layers,
            "positions": setting.positions,
            "tied": "all" if setting.tied else "sides",
            "task_type": "CAUSAL_LM" if causal else "SEQ_CLS",
            "modules_to_save": None if causal else ["classifier"],
        }
        set_seed(self.job.seed)
        return get_peft_model(model, ReftConfig(**(values | self._overrides("adapter"))))

    def train(self, model: Any, clock: Clock, directory: Path) -> list[dict[str, float]]:
        def on_progress(progress: Progress) -> None:
            if progress.step > len(clock.times):  # it is told again when a step is logged
                clock.tick()

        directory.mkdir()
        with ExitStack() as stack:
            for part, left_out in self._overrides("without").items():
                if left_out:
                    stack.enter_context(WITHOUT[part]())
            self.indices = stack.enter_context(drawn())
            fit(
                model,
                self._data(),
                None,
                self._collator(),
                self.settings(),
                directory,
                seed=self.job.seed,
                on_progress=on_progress,
            )
        return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]

    def settings(self) -> TrainSettings:
        """Return the defaults, but for the job's own and without checkpoints."""
        job = self.job
        values: dict[str, Any] = {
            "epochs": job.epochs,
            "batch_size": job.batch_size,
            "gradient_accumulation_steps": 1,
            "learning_rate": job.learning_rate["reft"],
            "warmup_ratio": job.warmup_ratio,
            "logging_steps": LOGGING_STEPS,
            "save_steps": NEVER,
            "device": "cpu" if job.device == "cpu" else "auto",
        }
        return TrainSettings(**(values | self._overrides("train")))

    def _data(self) -> Any:
        if self.job.task == "causal":
            return TokenDataset([Encoded(r.input_ids, r.prompt_length) for r in self.job.examples])
        return Sequences(self.job.examples)

    def _collator(self) -> Any:
        if self.job.task == "causal":
            return Collator(self.job.pad_token_id)
        return functools.partial(collate, pad_token_id=self.job.pad_token_id)

    def contents(self) -> list[tuple[int, int]] | None:
        size = self.settings().batch_size
        lengths = [len(self.job.examples[i].input_ids) for i in self.indices]
        batches = [lengths[at : at + size] for at in range(0, len(lengths), size)]
        if len(batches) < self.job.steps:
            return None
        return [(len(batch), sum(batch)) for batch in batches[: self.job.steps]]

    def save(self, model: Any, directory: Path) -> None:
        model.save_pretrained(str(directory), save_embedding_layers=False)

    def _overrides(self, section: str) -> dict[str, Any]:
        prefix = f"{section}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.job.overrides.items()
            if key.startswith(prefix)
        }


def arm(job: Job) -> Arm:
    return Reftune(job)


if __name__ == "__main__":
    main(arm)

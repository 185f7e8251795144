"""Training: transformers' Trainer, with what a ReFT run adds to it.

    fit(model, train, heldout, collator, settings, directory) -> Trained

The log is written line by line, Ctrl-C ends with a checkpoint, a loss that is no number ends the
run at once, and a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reftune.data import Collator, TokenDataset
from reftune.errors import RunError

LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"


class TrainSettings(BaseModel):
    """How to train; the defaults are the paper's for commonsense reasoning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(6, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="examples per forward, on each device")
    gradient_accumulation_steps: int = Field(2, ge=1, description="forwards per optimizer step")
    learning_rate: float = Field(9e-4, gt=0, description="peak learning rate")
    schedule: str = Field("linear", description="learning-rate schedule, as transformers names it")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay (not on biases)")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 is none")
    optimizer: str = Field("adamw_torch", description="optimizer, as transformers names it")
    group_by_length: bool = Field(True, description="batch examples of similar length")
    gradient_checkpointing: bool = Field(False, description="recompute activations, less memory")
    logging_steps: int = Field(10, ge=1, description="optimizer steps between two log lines")
    save_steps: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints; default: each epoch"
    )
    save_total_limit: int = Field(2, ge=1, description="how many checkpoints are kept")
    num_workers: int = Field(0, ge=0, description="processes that load data")
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers that transformers knows: wandb, tensorboard, ...",
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU where there is one")

    def arguments(self, directory: Path, seed: int, num_examples: int) -> TrainingArguments:
        """Return the arguments of transformers' Trainer for a run in `directory`."""
        return TrainingArguments(
            output_dir=str(directory / CHECKPOINTS),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup_steps(num_examples),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            optim=self.optimizer,
            train_sampling_strategy="group_by_length" if self.group_by_length else "random",
            activation_checkpointing=self.gradient_checkpointing,
            logging_steps=self.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would log the last number in place of a NaN
            save_strategy="steps" if self.save_steps else "epoch",
            save_steps=self.save_steps or 500,
            save_total_limit=self.save_total_limit,
            dataloader_num_workers=self.num_workers,
            dataloader_pin_memory=self.device != "cpu" and _has_accelerator(),
            report_to=list(self.report_to) or "none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=self.device == "cpu",
            seed=seed,
        )

    def total_steps(self, num_examples: int) -> int:
        """Return how many optimizer steps a run on one device has."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(num_examples / self.batch_size)
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation_steps))

    def warmup_steps(self, num_examples: int) -> int:
        """Return how many steps the learning rate rises."""
        return math.ceil(self.warmup_ratio * self.total_steps(num_examples))


@dataclass(frozen=True)
class Progress:
    """Where training is, for a progress bar; `tokens_per_second` counts real tokens."""

    step: int
    total_steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Trained:
    """What a run of `fit` came to; `interrupted` runs can be resumed."""

    loss: float
    steps: int
    seconds: float
    tokens: int
    interrupted: bool
    heldout_loss: float | None


def fit(
    model: Any,
    train: TokenDataset,
    heldout: TokenDataset | None,
    collator: Collator,
    settings: TrainSettings,
    directory: Path,
    *,
    seed: int,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train the adapters of a `PeftModel` (or any model's trainable parameters) in place.

    Checkpoints go to `directory/checkpoints`, the log to `directory/log.jsonl`. Raises RunError
    where there is nothing to resume, or the loss is no longer a number.
    """
    checkpoint = last_checkpoint(directory) if resume else None
    if resume and checkpoint is None:
        raise RunError(
            f"There is no whole checkpoint in {directory / CHECKPOINTS} to resume from. Start "
            "again without --resume (with --overwrite, if the directory holds a run)."
        )
    log = _Log(directory / LOG, after_step=_step_of(checkpoint))
    watch = _Watch(train, settings, on_progress)
    interrupt = _Interrupt()
    trainer = Trainer(
        model=model,
        args=settings.arguments(directory, seed, len(train)),
        train_dataset=train,
        data_collator=collator,
        callbacks=[log, watch, interrupt, _StopAtNaN(directory)],
    )
    _silence_printing(trainer)
    start = time.perf_counter()
    with interrupt.handling():
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    heldout_loss = None
    if heldout is not None and len(heldout) and not interrupt.asked:
        heldout_loss = heldout_cross_entropy(model, heldout, collator, settings.batch_size)
    return Trained(
        loss=output.training_loss,
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=watch.tokens,
        interrupted=interrupt.asked,
        heldout_loss=heldout_loss,
    )


def heldout_cross_entropy(
    model: Any, data: TokenDataset, collator: Collator, batch_size: int
) -> float:
    """Return the mean cross-entropy (nats per completion token) of a model on a data set."""
    import torch

    was_training, total, count = model.training, 0.0, 0
    model.eval()
    order = sorted(range(len(data)), key=lambda i: -data.lengths[i])
    try:
        with torch.inference_mode():
            for at in range(0, len(order), batch_size):
                rows = [data[i] for i in order[at : at + batch_size]]
                batch = {k: t.to(model.device) for k, t in collator(rows).items()}
                n = int((batch["labels"][:, 1:] != -100).sum())
                total += float(model(**batch).loss) * n
                count += n
    finally:
        model.train(was_training)
    return total / max(count, 1)


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end."""
    found = [path for path in (directory / CHECKPOINTS).glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=_step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all its files: transformers writes the state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all((checkpoint / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def _silence_printing(trainer: Trainer) -> None:
    """Take away the callback that prints each log line as a dictionary: there is a bar."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _Log(TrainerCallback):
    """Append what the Trainer logs to a JSONL file, a line at a time."""

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() and after_step else []
        kept = [line for line in lines if _logged_step(line) <= after_step]
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        row = {"step": state.global_step, "time": round(time.time(), 3), **(logs or {})}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a torn last line of a killed run
        return 1 << 62


class _Watch(TrainerCallback):
    """Count tokens and tell a progress bar where training is."""

    def __init__(
        self,
        data: TokenDataset,
        settings: TrainSettings,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._tokens_per_epoch = sum(data.lengths)
        self._start_epoch = 0.0
        self.tokens = 0
        self._on_progress = on_progress
        self._total = settings.total_steps(len(data))
        self._start = time.perf_counter()
        self._loss: float | None = None
        self._learning_rate: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._start_epoch = time.perf_counter(), state.epoch or 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self._loss = logs.get("loss", self._loss)
        self._learning_rate = logs.get("learning_rate", self._learning_rate)
        self._tell(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        self.tokens = round(((state.epoch or 0.0) - self._start_epoch) * self._tokens_per_epoch)
        if self._on_progress is not None:
            rate = self.tokens / max(time.perf_counter() - self._start, 1e-9)
            total = state.max_steps or self._total
            self._on_progress(
                Progress(state.global_step, total, self._loss, self._learning_rate, rate)
            )


class _StopAtNaN(TrainerCallback):
    """End the run when the loss is no number: what comes after would only cost time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if math.isfinite(loss):
            return
        good = last_checkpoint(self._directory)
        rest = f"The last whole checkpoint is {good}." if good else "No checkpoint was written yet."
        raise RunError(
            f"The loss is {loss} at step {state.global_step} (learning rate "
            f"{args.learning_rate:g}). Try a lower train.learning_rate, some train.warmup_ratio, "
            f"or dtype float32. {rest} No adapter was saved."
        )


class _Interrupt(TrainerCallback):
    """Turn the first Ctrl-C into: finish the step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle SIGINT in a block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control

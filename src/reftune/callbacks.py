"""What a run adds to transformers' Trainer by callbacks: log, progress, Ctrl-C, a stop at NaN."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reftune.controls import reft_layers
from reftune.distributed import any_of
from reftune.errors import RunError

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Progress:
    """Where training is, for a progress bar.

    Attributes:
        tokens_per_second: real tokens, without padding.
        logged: whether loss and learning rate are this step's, not those logged before.
    """

    step: int
    total_steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_second: float
    logged: bool = True


class Reporter(Protocol):
    """Who is told what a run does; the command line prints it."""

    def say(self, text: str) -> None:
        """Tell one fact."""

    def training(self, progress: Progress) -> None:
        """Tell how far training is."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Tell how far an evaluation is."""


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end."""
    found = [path for path in (directory / CHECKPOINTS).glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all its files: transformers writes the state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(weights_in(checkpoint), framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all((checkpoint / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))


def weights_in(checkpoint: Path) -> Path:
    """Return the file of a checkpoint's weights: a model's where its own are trained."""
    whole = checkpoint / "model.safetensors"
    return whole if whole.is_file() else checkpoint / "adapter_model.safetensors"


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


class Spent(NamedTuple):
    """Time by the clock, and of all threads of this process: that hardly depends on others."""

    seconds: float
    cpu_seconds: float

    def on(self, model: nn.Module) -> dict[str, Any]:
        """Return the times that say something where a model is: on an accelerator, the clock's."""
        on_cpu = next(model.parameters()).device.type == "cpu"
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds if on_cpu else None}


class LogFile(TrainerCallback):
    """Append what the Trainer logs to a JSONL file, a line at a time; one process `writes`."""

    def __init__(self, path: Path, after_step: int, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        lines = path.read_text().splitlines() if path.is_file() and after_step else []
        kept = [line for line in lines if _logged_step(line) <= after_step]
        self._start, self._before = _now(), _logged_spent(kept)
        if not writes:
            return
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, path)

    @property
    def spent(self) -> Spent:
        """Return how long the run has trained, before a resume, too."""
        return Spent(
            *(b + n - s for b, n, s in zip(self._before, _now(), self._start, strict=True))
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:  # the last step, whatever logging_steps is
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._writes:
            return
        row = {
            "step": state.global_step,
            "time": round(time.time(), 3),
            **{key: round(value, 3) for key, value in self.spent._asdict().items()},
            **(logs or {}),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def trained_before(log: Path) -> Spent:
    """Return how long the run of a log has trained, over all its resumes."""
    return _logged_spent(log.read_text().splitlines() if log.is_file() else [])


def _logged_spent(lines: Sequence[str]) -> Spent:
    for line in reversed(lines):
        try:
            row = json.loads(line)
            return Spent(float(row["seconds"]), float(row.get("cpu_seconds", 0.0)))
        except (ValueError, KeyError, TypeError, AttributeError):  # torn
            continue
    return Spent(0.0, 0.0)


def _now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a torn last line of a killed run
        return 1 << 62


class DropoutEnds(TrainerCallback):
    """Have the dropout of a model's edits act in the first `epochs` only; None: in all of them.

    So did pyreft's where it evaluates after each epoch: that put the interventions in evaluation
    mode for good (pyreft/reft_trainer.py, `evaluate`; the published GLUE results).
    """

    def __init__(self, model: nn.Module, epochs: int | None) -> None:
        self._layers = list(reft_layers(model).values())
        self._epochs = math.inf if epochs is None else epochs

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self._layers:
            layer.drops_out = (state.epoch or 0.0) < self._epochs

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self._layers:
            layer.drops_out = True


class Memory(TrainerCallback):
    """Note how much memory of the GPU is reserved after each step; asking does not wait for it."""

    def __init__(self) -> None:
        self._reserved: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            self._reserved.append(torch.cuda.memory_reserved(args.device))
            self._peak = torch.cuda.max_memory_reserved(args.device)

    @property
    def numbers(self) -> dict[str, int] | None:
        """Return bytes: reserved_avg and reserved_99th over the steps, max; None without a GPU."""
        if not self._reserved:
            return None
        ordered = sorted(self._reserved)
        return {
            "reserved_avg": round(sum(ordered) / len(ordered)),
            "reserved_99th": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "max": self._peak,
        }


class Watch(TrainerCallback):
    """Count tokens and tell a progress bar where training is."""

    def __init__(
        self,
        lengths: Iterable[int],
        total_steps: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._tokens_per_epoch = sum(lengths)
        self._start_epoch = 0.0
        self.tokens = 0
        self._on_progress = on_progress
        self._total = total_steps
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
        self._tell(state, logged=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(state)

    def _tell(self, state: TrainerState, logged: bool = False) -> None:
        self.tokens = round(((state.epoch or 0.0) - self._start_epoch) * self._tokens_per_epoch)
        if self._on_progress is not None:
            rate = self.tokens / max(time.perf_counter() - self._start, 1e-9)
            total = state.max_steps or self._total
            self._on_progress(
                Progress(state.global_step, total, self._loss, self._learning_rate, rate, logged)
            )


class StopAtNaN(TrainerCallback):
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


class Interrupt(TrainerCallback):
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
        self.asked = any_of(self.asked, args.device)  # all stop at the same step
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.asked and (state.epoch or 0.0) % 1:  # an epoch cut short is none to choose
            control.should_evaluate = False
        return control


def mean_loss(log: Sequence[Mapping[str, float]], after: float = 0) -> float:
    """Return the mean over all steps, also those before a resume, of a Trainer's log history.

    With `after`, over those of the entries that came after that step.
    """
    rows = [row for row in log if "loss" in row]
    steps = [0.0, *(row["step"] for row in rows)]
    weights = [now - before if now > after else 0 for before, now in pairwise(steps)]
    total = sum(row["loss"] * weight for row, weight in zip(rows, weights, strict=True))
    return total / max(sum(weights), 1)

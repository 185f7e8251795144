"""What the workers of `benchmarks/training.py` share: a job in, one line of JSON out.

    python X_worker.py JOB.json

Imported in three environments: standard library, torch and (any) transformers, nothing else.
A worker is an `Arm`: how its library attaches an adapter, trains and saves it. When and what is
measured is written here, once for all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from job import Job, Row
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments

IGNORED = -100
HELDOUT_BATCH = 8
LOGGING_STEPS = 10
STARTED = "BENCHMARK_STARTED"  # time.time() when the process was started


class Clock(TrainerCallback):
    """Take the time at the end of each optimizer step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.begun = 0.0
        self.times: list[float] = []

    def begin(self) -> None:
        """Training begins: building the trainer and its optimizer counts."""
        self.begun = time.perf_counter()

    def tick(self) -> None:
        """A step has ended. A GPU is waited for only where a measured span begins or ends."""
        if torch.cuda.is_available() and len(self.times) + 1 in (
            1,
            self._job.first_steps,
            self._job.steps,
        ):
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Serve transformers' Trainer, and end it where the job says so."""
        self.tick()
        if len(self.times) >= self._job.steps:
            control.should_training_stop = True
            control.should_log = True
        return control

    def seconds(self) -> list[float]:
        """Return how long each step took."""
        starts = [self.begun, *self.times]
        return [end - start for start, end in zip(starts, self.times, strict=False)]


class Arm(ABC):
    """One library's way to train an adapter."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.notes: list[str] = []

    def load(self) -> Any:
        """Return the bare model."""
        name = (
            f"AutoModelFor{'CausalLM' if self.job.task == 'causal' else 'SequenceClassification'}"
        )
        config = transformers.AutoConfig.from_pretrained(self.job.model)
        rope = getattr(config, "rope_parameters", None)
        if rope and hasattr(config, "rope_theta"):  # transformers 4 reads its own key only
            config.rope_theta = rope["rope_theta"]
        if self.job.task == "classification":
            config.num_labels = self.job.num_labels
        torch.manual_seed(self.job.seed)  # a classifier's head is new
        model = getattr(transformers, name).from_pretrained(
            self.job.model, config=config, dtype=getattr(torch, self.job.dtype)
        )
        return model.to(self.job.device)

    @abstractmethod
    def attach(self, model: Any) -> Any:
        """Return the model with its adapter, ready to be trained."""

    @abstractmethod
    def train(self, model: Any, clock: Clock, directory: Path) -> list[dict[str, float]]:
        """Train on `job.rows()`, one step after the other; return the log."""

    @abstractmethod
    def save(self, model: Any, directory: Path) -> None:
        """Save the adapter as the library does it."""

    def contents(self) -> list[tuple[int, int]] | None:
        """Return the examples and the real tokens of each step, None where that is unknown."""
        rows, size = self.job.rows(), self.job.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return [(len(batch), tokens_of(batch)) for batch in batches][: self.job.steps]

    def loss(self, model: Any, rows: Sequence[Row]) -> torch.Tensor:
        """Return the mean cross-entropy of a batch, per completion token or per example."""
        batch = collate(rows, self.job.pad_token_id)
        loss: torch.Tensor = model(**to_device(batch, self.job.device)).loss
        return loss


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right; labels are the completion's tokens, or the class."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n] = torch.tensor(row.input_ids)
        mask[i, :n] = 1
        labels[i, row.prompt_length : n] = ids[i, row.prompt_length : n]
    if rows[0].label is not None:
        labels = torch.tensor([row.label for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Move a batch's tensors."""
    return {k: t.to(device) for k, t in batch.items()}


def tokens_of(rows: Iterable[Row]) -> int:
    """Return the real tokens of some rows."""
    return sum(len(row.input_ids) for row in rows)


def training_arguments(
    job: Job, learning_rate: float, directory: Path, bf16: bool = False
) -> TrainingArguments:
    """Return arguments without anything that costs time; all else as transformers has it."""
    return TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=1,  # the rows hold all epochs in turn
        per_device_train_batch_size=job.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=job.warmup_steps,
        weight_decay=0.0,
        logging_steps=LOGGING_STEPS,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=job.device != "cpu",
        use_cpu=job.device == "cpu",
        bf16=bf16,
        seed=job.seed,
    )


def in_order(trainer: type[Any]) -> type[Any]:
    """Return a Trainer that takes its rows in their order."""

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    return InOrder


def train_in_order(
    trainer: type[Any],
    model: Any,
    job: Job,
    learning_rate: float,
    clock: Clock,
    directory: Path,
    bf16: bool = False,
) -> list[dict[str, float]]:
    """Train with a Trainer's own loop and loss; return its log."""
    run = in_order(trainer)(
        model=model,
        args=training_arguments(job, learning_rate, directory, bf16),
        train_dataset=job.rows(),
        data_collator=lambda rows: collate(rows, job.pad_token_id),
        callbacks=[clock],
    )
    silence(run)
    run.train()
    log: list[dict[str, float]] = run.state.log_history
    return log


def silence(trainer: Any) -> None:
    """Take away the callback that prints each log line."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def main(arm: Callable[[Job], Arm]) -> None:
    """Run the job named on the command line and print what was measured, or what went wrong."""
    result: dict[str, Any]
    try:
        job = Job.read(Path(sys.argv[1]))
        torch.set_num_threads(job.threads)
        result = measure(arm(job))
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(result), flush=True)


def measure(arm: Arm) -> dict[str, Any]:
    """Load, attach, train, save and evaluate; the last two are not timed."""
    job = arm.job
    started = float(os.environ.get(STARTED, time.time()))
    before = time.perf_counter()
    model = arm.load()
    touch(model)
    loading = time.perf_counter() - before
    memory = Memory(job.device)
    model = arm.attach(model)
    clock = Clock(job)
    with tempfile.TemporaryDirectory() as folder:
        clock.begin()
        age = time.time() - started
        log = arm.train(model, clock, Path(folder, "trainer"))
        peak = memory.peak()
        result = {
            "seconds": [round(s, 5) for s in clock.seconds()],
            "contents": arm.contents(),
            "load_seconds": loading,
            "first_step_seconds": age + clock.times[0] - clock.begun,
            "peak_bytes": peak,
            "adapter_bytes": saved_bytes(arm, model, Path(folder, "saved")),
        }
    losses = [row["loss"] for row in log if "loss" in row]
    heldout = heldout_loss(arm, model) if job.steps == job.total_steps else None
    return result | {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "heldout_loss": heldout,
        "notes": arm.notes,
        "versions": versions(),
    }


def heldout_loss(arm: Arm, model: Any) -> float:
    """Return the mean cross-entropy over the held-out rows, per completion token or example."""
    model.eval()
    rows = sorted(arm.job.heldout, key=lambda row: len(row.input_ids))
    total = count = 0.0
    with torch.no_grad():
        for at in range(0, len(rows), HELDOUT_BATCH):
            batch = rows[at : at + HELDOUT_BATCH]
            n = sum(
                len(row.input_ids) - row.prompt_length if row.label is None else 1 for row in batch
            )
            total += float(arm.loss(model, batch)) * n
            count += n
    mean = total / count
    if not math.isfinite(mean):
        raise ValueError(f"the held-out loss is {mean}")
    return mean


def saved_bytes(arm: Arm, model: Any, directory: Path) -> int | None:
    """Save the adapter and return the size of its files, a written model card left out."""
    try:
        arm.save(model, directory)
    except Exception as error:
        arm.notes.append(f"not saved: {type(error).__name__}: {error}"[:500])
        return None
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "README.md"]
    return sum(path.stat().st_size for path in files)


def touch(model: Any) -> None:
    """Read every weight once: those of a mapped file are in memory only then."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()


class Memory:
    """Peak memory from now on, over what is held now: of the GPU, or of the whole process."""

    def __init__(self, device: str) -> None:
        self._gpu = device != "cpu"
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        self._resettable = _reset_peak()
        self._base = _status("VmRSS")

    def peak(self) -> int:
        """Return the peak in bytes."""
        if self._gpu:
            return int(torch.cuda.max_memory_allocated() - self._base)
        if self._resettable:
            return _status("VmHWM") - self._base
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._base


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    known = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "adapters", "accelerate"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known

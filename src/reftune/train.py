"""Training: transformers' Trainer, with what a ReFT run adds to it.

    fit(model, train, heldout, collator, settings, directory) -> Trained

The log is written line by line, Ctrl-C ends with a checkpoint, a loss that is no number ends the
run at once, and a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_model
from transformers import TrainerCallback, TrainingArguments

from reftune.callbacks import (
    CHECKPOINTS,
    DropoutEnds,
    Interrupt,
    LogFile,
    Memory,
    Progress,
    StopAtNaN,
    Watch,
    last_checkpoint,
    mean_loss,
    step_of,
    trained_before,
    weights_in,
)
from reftune.data import Collator, TokenDataset
from reftune.distributed import Processes, processes
from reftune.errors import RunError
from reftune.heldout import heldout_cross_entropy
from reftune.methods import weights_of
from reftune.speed.offload import placed, reunite
from reftune.speed.plan import (
    Shortcuts,
    SpeedSettings,
    choose,
    describe,
    examples_to_try,
    padding_share,
)
from reftune.speed.training import Step, settle, taking
from reftune.trainer import EpochSampler as EpochSampler
from reftune.trainer import ReftTrainer

LOG = "log.jsonl"


class TrainingData(Protocol):
    """Examples to train on, with the number of tokens of each."""

    lengths: Sequence[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class TrainSettings(SpeedSettings):
    """How to train; the defaults are the paper's for commonsense reasoning."""

    epochs: float = Field(6, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="examples per forward")
    gradient_accumulation_steps: int = Field(
        2, ge=1, description="forwards per optimizer step; several processes share them"
    )
    learning_rate: float = Field(9e-4, gt=0, description="peak learning rate")
    schedule: str = Field("linear", description="learning-rate schedule, as transformers names it")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay (not on biases)")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 is none")
    optimizer: str = Field("adamw_torch", description="optimizer, as transformers names it")
    group_by_length: bool = Field(True, description="batch examples of similar length")
    dropout_epochs: int | None = Field(
        None, ge=1, description="epochs, the first, in which the adapter's dropout acts; null: all"
    )
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
    fsdp: bool = Field(
        False, description="spread the base over the processes (FSDP2), for models that barely fit"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU where there is one")

    @model_validator(mode="after")
    def _offloading_recomputes(self) -> TrainSettings:
        if self.offload_base and not self.gradient_checkpointing:
            raise ValueError("offload_base is true; it needs gradient_checkpointing: true")
        return self

    @property
    def on_accelerator(self) -> bool:
        """Return whether training runs on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    def arguments(
        self,
        directory: Path,
        seed: int,
        num_examples: int,
        best: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TrainingArguments:
        """Return the arguments of transformers' Trainer for a run in `directory`.

        With `best`, a metric, the epoch at whose end it is the highest is the result. Of several
        processes each does its share of a step. `dtype` is the base's: in float16 small gradients
        are zero unless the loss is scaled, which on a GPU it is. Raises RunError where the
        processes cannot share a step.
        """
        world = processes()
        batch_size, accumulation = world.share(self.batch_size, self.gradient_accumulation_steps)
        sharding = self.is_sharded(world)
        arguments = TrainingArguments(
            output_dir=str(directory / CHECKPOINTS),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup_steps(num_examples),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            optim=self.optimizer,
            train_sampling_strategy="group_by_length" if self.group_by_length else "random",
            activation_checkpointing=self.gradient_checkpointing and not sharding,
            logging_steps=self.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would log the last number in place of a NaN
            save_strategy="steps" if self.save_steps else "epoch",
            save_steps=self.save_steps or 500,
            save_total_limit=self.save_total_limit,
            dataloader_num_workers=self.num_workers,
            dataloader_pin_memory=self.on_accelerator,
            accelerator_config={"non_blocking": self.on_accelerator},
            report_to=list(self.report_to) or "none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=self.device == "cpu",
            fp16=dtype == torch.float16 and self.on_accelerator and not sharding,
            seed=seed,
            eval_strategy="epoch" if best else "no",
            label_names=["labels"],
            load_best_model_at_end=best is not None,
            metric_for_best_model=best,
            ddp_find_unused_parameters=False,  # every edit takes part in every forward
            ddp_broadcast_buffers=False,  # nothing of the base changes
            fsdp=sharding or None,  # type: ignore[arg-type]  # True is what a string becomes
            fsdp_config={"activation_checkpointing": self.gradient_checkpointing}
            if sharding
            else None,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: no DataParallel
        return arguments

    def is_sharded(self, world: Processes) -> bool:
        """Return whether the model is spread over the processes."""
        return self.fsdp and world.count > 1

    def total_steps(self, num_examples: int) -> int:
        """Return how many optimizer steps a run has."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(num_examples / self.batch_size)
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation_steps))

    def passes(self, num_examples: int) -> float:
        """Return how often a run sees an example."""
        if self.max_steps is None:
            return self.epochs
        return self.max_steps * self.batch_size * self.gradient_accumulation_steps / num_examples

    def warmup_steps(self, num_examples: int) -> int:
        """Return how many steps the learning rate rises."""
        return math.ceil(self.warmup_ratio * self.total_steps(num_examples))


@dataclass(frozen=True)
class Trained:
    """What a run of `fit` came to; `interrupted` runs can be resumed.

    `seconds` by the clock, `cpu_seconds` of all threads (None on accelerators) and `tokens` are of
    all of its training, before a resume, too; `shortcuts` are the keys of `SpeedSettings` that it
    was found to be exact and worth it for; `memory` is an accelerator's, see `Memory`.
    """

    loss: float
    steps: int
    seconds: float
    tokens: int
    interrupted: bool
    heldout_loss: float | None
    best_step: int | None = None
    best_value: float | None = None
    shortcuts: tuple[str, ...] = ()
    cpu_seconds: float | None = None
    memory: dict[str, int] | None = None


@dataclass(frozen=True)
class Selection:
    """Which epoch's end is kept: the first where `metric`, of what `compute` returns, is highest.

    `compute` is given a transformers.EvalPrediction of the model's outputs and labels on `data`.
    """

    data: TrainingData
    metric: str
    compute: Callable[[Any], dict[str, float]]


def fit(
    model: Any,
    train: TrainingData,
    heldout: TokenDataset | None,
    collator: Any,
    settings: TrainSettings,
    directory: Path,
    *,
    seed: int,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_trained: Callable[[], None] = lambda: None,
    selection: Selection | None = None,
) -> Trained:
    """Train the adapters of a `PeftModel` (or any model's trainable parameters) in place.

    Checkpoints go to `directory/checkpoints`, the log to `directory/log.jsonl`. `on_trained` is
    called when training has ended, before the held-out loss. Raises RunError where there is nothing
    to resume, or the loss is no longer a number.
    """
    checkpoint = _checkpoint_of(directory) if resume else None
    total = settings.total_steps(len(train))
    best = selection.metric if selection else None
    arguments = settings.arguments(directory, seed, len(train), best, model.dtype)
    world = processes()
    sharding = settings.is_sharded(world)
    if checkpoint is not None and step_of(checkpoint) >= total:
        reunite(model, arguments.device)
        before = _trained_before(model, heldout, collator, settings, checkpoint, on_trained)
        tokens = settings.passes(len(train)) * sum(train.lengths)
        spent = trained_before(directory / LOG).on(model)
        return replace(before, tokens=round(tokens), **spent)
    log_file = LogFile(directory / LOG, after_step=step_of(checkpoint), writes=world.is_main)
    interrupt = Interrupt()
    if sharding and checkpoint is not None:  # now, while the model is whole
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
    watch = Watch(train.lengths, total, on_progress)
    ends = DropoutEnds(model, settings.dropout_epochs)
    memory = Memory()
    callbacks = [log_file, watch, interrupt, ends, memory, StopAtNaN(directory)]
    with shortcuts(model, train, collator, settings, directory, arguments.device) as step:
        trainer = _trainer(step, model, arguments, train, selection, callbacks, sharding)
        with interrupt.handling():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    spent = log_file.spent.on(model)
    asked = (world.is_main or sharding) and not interrupt.asked
    if not interrupt.asked:
        on_trained()
    return Trained(
        loss=mean_loss(trainer.state.log_history),
        steps=trainer.state.global_step,
        **spent,
        tokens=round((trainer.state.epoch or 0.0) * sum(train.lengths)),
        interrupted=interrupt.asked,
        heldout_loss=_loss_on(heldout, model, collator, settings) if asked else None,
        best_step=trainer.state.best_global_step if selection else None,
        best_value=trainer.state.best_metric if selection else None,
        shortcuts=tuple(step.taken),
        memory=memory.numbers,
    )


def _trainer(
    step: Step,
    model: Any,
    arguments: TrainingArguments,
    train: TrainingData,
    selection: Selection | None,
    callbacks: list[TrainerCallback],
    sharding: bool,
) -> ReftTrainer:
    return ReftTrainer(
        step,
        sharding=sharding,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=selection.data if selection else None,
        compute_metrics=selection.compute if selection else None,
        callbacks=callbacks,
    )


@contextmanager
def shortcuts(
    model: Any,
    train: TrainingData,
    collator: Any,
    settings: TrainSettings,
    directory: Path,
    device: torch.device | None = None,
) -> Iterator[Step]:
    """Let a model take, in a block, the shortcuts that give the loss and gradients it gives.

    Whether they do is tried on a few short examples, on the `device` of the training (by default
    where the model is), where the model then is; where not, it takes fewer, and says why.
    """
    device = device or next(model.parameters()).device
    world = processes()
    # What is spread over processes is there only within its own forward.
    seen = None if settings.is_sharded(world) else describe(model)
    chosen = Shortcuts()
    with ExitStack() as whole_again:
        if seen is not None and len(train):
            lengths = torch.as_tensor(np.asarray(train.lengths))
            prompts = torch.as_tensor(np.asarray(getattr(train, "prompt_lengths", train.lengths)))
            chosen = choose(
                seen,
                model,
                settings,
                lengths=lengths,
                prompt_lengths=prompts,
                # of several processes, an epoch later another one has an example
                epochs=settings.passes(len(train)) if world.count == 1 else 1,
                gradient_checkpointing=settings.gradient_checkpointing,
                device=device,
                folder=directory,
                padding=padding_share(lengths, settings.batch_size, settings.group_by_length),
            )
            on_host = seen.layers if chosen.offload is not None else ()
            whole_again.enter_context(placed(model, device, on_host))
            rows = [train[i] for i in examples_to_try(seen, lengths, prompts)]
            chosen = settle(seen, chosen, model, collator, rows)
        with taking(seen, chosen, collator) as step:
            yield step


def _checkpoint_of(directory: Path) -> Path:
    found = last_checkpoint(directory)
    if found is None:
        raise RunError(
            f"There is no whole checkpoint in {directory / CHECKPOINTS} to resume from. Start "
            "again without --resume (with --overwrite, if the directory holds a run)."
        )
    return found


def _trained_before(
    model: Any,
    heldout: TokenDataset | None,
    collator: Collator,
    settings: TrainSettings,
    checkpoint: Path,
    on_trained: Callable[[], None],
) -> Trained:
    """Take the result of a run whose training had ended, and whose evaluation had not."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    best = state.get("best_global_step")
    where = checkpoint if best is None else checkpoint.with_name(f"checkpoint-{best}")
    if weights_of(model) is None:
        model.load_adapter(str(where), model.active_adapter, is_trainable=True)
    else:
        load_model(model, weights_in(where))
    on_trained()
    loss = _loss_on(heldout, model, collator, settings)
    steps, value = step_of(checkpoint), state.get("best_metric")
    return Trained(mean_loss(state["log_history"]), steps, 0.0, 0, False, loss, best, value)


def _loss_on(
    heldout: TokenDataset | None, model: Any, collator: Any, settings: TrainSettings
) -> float | None:
    if heldout is None or not len(heldout):
        return None
    return heldout_cross_entropy(model, heldout, collator, settings.batch_size)

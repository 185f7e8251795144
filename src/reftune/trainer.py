"""transformers' Trainer as `fit` uses it: shortcuts, an order that survives a resume, shards.

A checkpoint has the same files however many processes wrote it, and however the model was spread
over them: the adapter, and the state of an optimizer that knows of nothing else. So a run goes on
with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from reftune.distributed import (
    EvenRows,
    evenly,
    load_optimizer_state,
    trained_state,
    whole_optimizer_state,
)
from reftune.speed.offload import left_where_they_are
from reftune.speed.training import Step

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names


@final
class EpochSampler(Sampler[int]):
    """An order of the examples that depends on seed and epoch alone.

    transformers' own samplers draw from the global random state, so that a run resumed within an
    epoch would see other batches than the run it continues.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None,
        seed: int,
        multiple: int = 1,
        now: Callable[[], int] | None = None,
    ) -> None:
        """Group by length in batches of `batch_size`, or not at all (None).

        The order is filled up to a `multiple` (see `distributed.evenly`). `now` tells the epoch, if
        `set_epoch` is not to be believed.
        """
        self._lengths, self._batch_size, self._seed = list(lengths), batch_size, seed
        self._epoch, self._multiple, self._now = 0, multiple, now

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + -len(self._lengths) % self._multiple

    def __iter__(self) -> Iterator[int]:
        epoch = self._epoch if self._now is None else self._now()
        generator = torch.Generator().manual_seed(self._seed * 100_003 + epoch)
        order: list[int]
        if self._batch_size is None:
            order = torch.randperm(len(self._lengths), generator=generator).tolist()
        else:
            size = self._batch_size
            order = get_length_grouped_indices(self._lengths, size, None, generator)  # type: ignore[no-untyped-call]
        yield from evenly(order, self._multiple)


class ReftTrainer(Trainer):
    """transformers' Trainer with shortcuts, and an order of examples that survives a resume.

    Args:
        step: what a training step does beside calling the model.
        sharding: spread the model over the processes (FSDP2).
    """

    def __init__(self, step: Step, *, sharding: bool = False, **kwargs: Any) -> None:
        self.step, self.sharding = step, sharding
        if kwargs["args"].world_size > 1:
            kwargs["train_dataset"] = EvenRows(kwargs["train_dataset"])
        super().__init__(data_collator=step.collate, **kwargs)
        self.remove_callback(PrinterCallback)  # which prints each log line: there is a bar

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            with left_where_they_are(self.step.offloaded):  # it moves the model, too
                prepared: nn.Module = prepare(model, *args, **kwargs)
            return prepared

        self.accelerator.prepare_model = prepare_model
        state = self.accelerator.state
        if self.sharding and not self.is_fsdp_enabled:
            # accelerate shards on accelerators alone; `fully_shard` does on CPUs, too.
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        loss = super().compute_loss(model, self.step.before(inputs), *args, **kwargs)
        self.step.after()
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharding:
            super().save_model(output_dir, _internal_call)
            return
        assert self.model is not None
        self._save(output_dir, state_dict=trained_state(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharding:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharding:  # else `fit` has loaded it, when the model was whole
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharding or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        load_optimizer_state(self.optimizer, state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER, map_location="cpu", weights_only=True)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(schedule)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        with left_where_they_are(self.step.offloaded):
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        lengths = data.data.lengths if isinstance(data, EvenRows) else data.lengths
        grouped = self.args.train_sampling_strategy == "group_by_length"
        count = self.args.world_size
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * count
        multiple = self.args.train_batch_size * count if count > 1 else 1
        # Of a run that goes on within an epoch, accelerate's shards begin to count epochs anew.
        now = (lambda: int((self.state.epoch or 0.0) + 1e-6)) if count > 1 else None
        return EpochSampler(lengths, size if grouped else None, self.args.seed, multiple, now)

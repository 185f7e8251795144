"""Training on several processes: how a step is divided, and a model's shards put together.

Every process runs the same program on its share of a step's examples. The first one (the main
process) writes files and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from reftune.errors import RunError
from reftune.prompts import IGNORED_LABEL
from reftune.recompute import plain_name


@dataclass(frozen=True)
class Processes:
    """The processes of a run: how many they are, and which of them this is, from 0."""

    count: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Return whether this one writes and prints."""
        return self.rank == 0

    def share(self, batch_size: int, accumulation: int) -> tuple[int, int]:
        """Return a process's (batch size, forwards per step): a step has the same examples.

        Raises RunError where they cannot be divided.
        """
        examples = batch_size * accumulation
        if examples % self.count:
            raise RunError(
                f"A step has {batch_size} x {accumulation} = {examples} examples (train.batch_size "
                f"x train.gradient_accumulation_steps), which {self.count} processes cannot share "
                "equally. Change one of the two, or --nproc."
            )
        own = examples // self.count
        size = next(size for size in range(min(batch_size, own), 0, -1) if own % size == 0)
        return size, own // size


def processes() -> Processes:
    """Return the processes of this run, as their launcher (torchrun's variables) says."""
    if "LOCAL_RANK" not in os.environ:
        return Processes()
    return Processes(int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")))


def connect(cpu: bool) -> Processes:
    """Return the processes of this run, connected with each other."""
    found = processes()
    if found.count > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)
    return found


def wait_for_all() -> None:
    """Return when every process has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def any_of(said: bool, device: torch.device) -> bool:
    """Return whether one of the processes says so; all have to ask."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return said
    flag = torch.tensor(int(said), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


class EvenRows:
    """A data set with a row without labels for each of its own, at -1 - number.

    Such rows fill the last step of an epoch, where processes have no example left: they take part
    and add nothing, neither to the loss nor to the count of labels.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if index >= 0:
            return self.data[index]
        row = self.data[-1 - index]
        labels = torch.full_like(torch.as_tensor(row["labels"]), IGNORED_LABEL)
        return {**row, "labels": labels, "index": len(self.data) - 1 - index}


def evenly(order: Sequence[int], multiple: int) -> Iterator[int]:
    """Yield an order of examples, and rows without labels up to a multiple of their number."""
    yield from order
    for at in range(-len(order) % multiple):
        yield -1 - order[at % len(order)]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, put together from its shards; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters, whole and on the CPU, by name; of the frozen base nothing."""
    return {
        plain_name(name): whole(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` has spread a model's parameters over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state as one process has it; every process has to ask for it."""
    return _mapped(optimizer.state_dict(), lambda number, tensor: whole(tensor).cpu())


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` returned, spread as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def spread(number: int, tensor: Tensor) -> Tensor:
        like = parameters[number]
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    optimizer.load_state_dict(_mapped(state, spread))


def _mapped(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    return {
        **state,
        "state": {
            number: {k: change(number, t) if isinstance(t, Tensor) else t for k, t in own.items()}
            for number, own in state["state"].items()
        },
    }

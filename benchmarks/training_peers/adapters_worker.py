"""AdapterHub's adapters: LoReFT by `LoReftConfig` and `AdapterTrainer`, length-grouped batches.

It edits the first and last tokens of what it is given, in training prompt *and* completion, so its
suffix is not the prompt's: its time can be compared, its loss with a suffix cannot.

In a bf16 model it fails ("mat1 and mat2 must have the same dtype, but got BFloat16 and Float"), so
that it is trained under autocast there, its maintainers' workaround (adapters#772).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapters
import torch
from common import Arm, Clock, main, train_in_order
from job import Job, Row

NAME = "loreft"


class Adapters(Arm):
    """LoReFT of the adapters library."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.autocast = job.dtype == "bfloat16"
        if self.autocast:
            self.notes.append("under autocast: without it LoReFT fails in a bf16 model")

    def attach(self, model: Any) -> Any:
        setting, job = self.job.setting, self.job
        if setting.suffix:
            self.notes.append("edits the last tokens of prompt and completion, not of the prompt")
        adapters.init(model)
        config = adapters.LoReftConfig(
            layers=setting.layers,
            prefix_positions=setting.prefix,
            suffix_positions=setting.suffix,
            r=setting.rank,
            tied_weights=setting.tied,
            dropout=0.0,
        )
        torch.manual_seed(job.seed)
        model.add_adapter(NAME, config=config)
        model.train_adapter(NAME)
        return model.to(job.device)

    def train(self, model: Any, clock: Clock, directory: Path) -> list[dict[str, float]]:
        rate = self.job.learning_rate["reft"]
        return train_in_order(
            adapters.AdapterTrainer, model, self.job, rate, clock, directory, self.autocast
        )

    def loss(self, model: Any, rows: Sequence[Row]) -> torch.Tensor:
        with torch.autocast(self.job.device, torch.bfloat16, enabled=self.autocast):
            return super().loss(model, rows)

    def save(self, model: Any, directory: Path) -> None:
        # By default the untrained output matrix would be saved, too.
        model.save_adapter(str(directory), NAME, with_head=self.job.task == "classification")


def arm(job: Job) -> Arm:
    return Adapters(job)


if __name__ == "__main__":
    main(arm)

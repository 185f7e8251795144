"""pyreft (git head, with pyvene's) as it ships: its interventions, collator and trainers.

What its users have to know is done for it: `weight_decay` is 0, `low_rank_dimension` is given
twice, interventions have the model's dtype (float32 where that is float32), and prompts are longer
than the positions, so that no sink token is needed. Its trainer has an order of its own (random,
whatever `group_by_length` says); here it takes the job's order, so that all arms see the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyreft
import torch
from common import IGNORED, Arm, Clock, main, silence, to_device, training_arguments
from job import Job, Row
from pyreft.reft_trainer import make_data_collator, make_dataloader
from transformers import AutoTokenizer, DataCollatorWithPadding


class InOrder:
    """A mix-in: pyreft's data loader without its shuffling."""

    def get_train_dataloader(self: Any) -> Any:
        return make_dataloader(
            self.train_dataset, self._train_batch_size, self.data_collator, shuffle=False
        )


class CausalTrainer(InOrder, pyreft.ReftTrainerForCausalLM):
    """pyreft's trainer of language models."""


class ClassificationTrainer(InOrder, pyreft.ReftTrainerForSequenceClassification):
    """pyreft's trainer of classifiers, which does not take what transformers >= 4.46 passes on."""

    def compute_loss(
        self, intervenable: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        return super().compute_loss(intervenable, inputs, return_outputs)


class Pyreft(Arm):
    """pyreft LoReFT."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.causal = job.task == "causal"
        tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="right")
        tokenizer.pad_token_id = job.pad_token_id
        self.collator = make_data_collator(tokenizer, None)
        if not self.causal:
            padding = DataCollatorWithPadding(tokenizer=tokenizer, padding="longest")
            self.collator = pyreft.ReftDataCollator(data_collator=padding)
            self.notes.append(
                "ReftTrainerForSequenceClassification.compute_loss fails on transformers >= 4.46 "
                "(num_items_in_batch); it was given **kwargs"
            )

    def attach(self, model: Any) -> Any:
        setting, width = self.job.setting, model.config.hidden_size
        groups = 1 if setting.tied or not (setting.prefix and setting.suffix) else 2
        torch.manual_seed(self.job.seed)
        # pyreft's locations have all prefixes first, then all suffixes.
        representations = [
            {
                **self._component(layer),
                "low_rank_dimension": setting.rank,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=width,
                    low_rank_dimension=setting.rank,
                    dtype=getattr(torch, self.job.dtype),
                ),
            }
            for _ in range(groups)
            for layer in setting.layers
        ]
        self.interventions = len(representations)
        reft_model = pyreft.get_reft_model(
            model, pyreft.ReftConfig(representations=representations)
        )
        if not self.causal:
            reft_model.model.classifier.requires_grad_(True)
        return reft_model

    def _component(self, layer: int) -> dict[str, Any]:
        if self.causal:
            return {"layer": layer, "component": "block_output"}
        return {"component": f"bert.encoder.layer[{layer}].output"}  # BERT is not in its table

    def train(self, model: Any, clock: Clock, directory: Path) -> list[dict[str, float]]:
        trainer = (CausalTrainer if self.causal else ClassificationTrainer)(
            model=model,
            args=training_arguments(self.job, self.job.learning_rate["reft"], directory),
            train_dataset=[self._row(row) for row in self.job.rows()],
            data_collator=self.collator,
            callbacks=[clock],
        )
        silence(trainer)
        trainer.train()
        log: list[dict[str, float]] = trainer.state.log_history
        return log

    def _row(self, row: Row) -> dict[str, Any]:
        """Return an example as pyreft's data sets have it."""
        setting, ids = self.job.setting, row.input_ids
        shared = setting.tied or not (setting.prefix and setting.suffix)
        if self.causal and row.prompt_length // 2 < max(setting.prefix, setting.suffix):
            raise ValueError("a prompt is shorter than its positions")
        locations = pyreft.get_intervention_locations(
            last_position=row.prompt_length,
            first_n=setting.prefix,
            last_n=setting.suffix,
            num_interventions=self.interventions,
            share_weights=shared,
            pad_mode="first" if self.causal else "last",
        )
        if not self.causal:  # as its GLUE data set does: one pad token for missing positions
            return {
                "input_ids": [*ids, self.job.pad_token_id],
                "attention_mask": [1] * len(ids) + [0],
                "labels": row.label,
                "intervention_locations": locations,
            }
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * row.prompt_length + ids[row.prompt_length :],
            "intervention_locations": locations,
        }

    def loss(self, model: Any, rows: Sequence[Row]) -> torch.Tensor:
        batch = to_device(dict(self.collator([self._row(row) for row in rows])), self.job.device)
        locations = batch["intervention_locations"].permute(1, 0, 2).tolist()
        _, output = model(
            {key: batch[key] for key in ("input_ids", "attention_mask")},
            unit_locations={"sources->base": (None, locations)},
            labels=batch["labels"],
        )
        loss: torch.Tensor = output.loss
        return loss

    def save(self, model: Any, directory: Path) -> None:
        model.save(str(directory), include_model=not self.causal)


def arm(job: Job) -> Arm:
    return Pyreft(job)


if __name__ == "__main__":
    main(arm)

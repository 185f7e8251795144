"""PEFT's LoRA in LLM-Adapters' setting: rank 32 on q, k, v, up and down, dropout 0.05.

transformers' Trainer with its own loss, on the length-grouped batches that reftune has.
An encoder's analogue: query, key, value and the two matrices of the MLP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Arm, Clock, main, train_in_order
from job import Job
from peft import LoraConfig, get_peft_model
from transformers import Trainer

CAUSAL = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ENCODER = r".*\.(query|key|value|intermediate\.dense|layer\.\d+\.output\.dense)"


class Lora(Arm):
    """PEFT LoRA."""

    def attach(self, model: Any) -> Any:
        causal = self.job.task == "causal"
        config = LoraConfig(
            r=32,
            lora_alpha=64,
            lora_dropout=0.05,
            target_modules=CAUSAL if causal else ENCODER,
            modules_to_save=None if causal else ["classifier"],
            task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        )
        return get_peft_model(model, config)

    def train(self, model: Any, clock: Clock, directory: Path) -> list[dict[str, float]]:
        rate = self.job.learning_rate["lora"]
        return train_in_order(Trainer, model, self.job, rate, clock, directory)

    def save(self, model: Any, directory: Path) -> None:
        model.save_pretrained(str(directory))


def arm(job: Job) -> Arm:
    return Lora(job)


if __name__ == "__main__":
    main(arm)

"""A ReFT trained by transformers' Trainer on several processes: nothing in the script says so.

    python examples/distributed.py
    torchrun --nproc_per_node 2 examples/distributed.py
    accelerate launch --config_file fsdp2.yaml examples/distributed.py    # docs/distributed.md

With the same `--step`, the examples of an optimizer step, each learns the same.
"""

import argparse
import os
from pathlib import Path

from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import tiny
from reftune import ReftConfig
from reftune.data import Collator, TokenDataset, load_rows, to_examples
from reftune.demo import TRAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--step", type=int, default=16, help="examples per optimizer step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", default="runs/distributed")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=args.out,
        per_device_train_batch_size=args.step // processes,
        num_train_epochs=args.epochs,
        max_steps=2 if args.tiny else -1,
        learning_rate=4e-3,
        logging_steps=1,
        save_strategy="epoch",
        ddp_find_unused_parameters=False,  # every edit takes part in every forward
        train_sampling_strategy="sequential",  # random orders are each process's own
        remove_unused_columns=False,
        report_to="none",
        use_cpu=args.cpu,
    )
    model, tokenizer = tiny.load(args.model, args.tiny)
    model = get_peft_model(model, ReftConfig(task_type="CAUSAL_LM", r=4, positions="f7+l7"))
    data = TokenDataset.from_examples(to_examples(load_rows(TRAIN)), tokenizer, cache_dir=None)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(str(Path(args.out) / "adapter"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"{processes} process(es), losses {[round(loss, 4) for loss in losses]}")


if __name__ == "__main__":
    main()

"""Supervised finetuning of a ReFT with TRL's SFTTrainer: TRL's example, and `peft_config`.

    python examples/trl_sft.py --steps 30
    python examples/trl_sft.py --form messages    # loss on the assistant's tokens alone
    python examples/trl_sft.py --packing          # several texts in a row, or --padding-free

Where prompts end is told by the labels that the trainer makes. The rows are the demo's.
"""

import argparse
import json
from importlib.resources import files

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import tiny
from reftune import ReftConfig


def rows(form: str) -> Dataset:
    """Return the demo's rows as prompts and completions, or as conversations."""
    lines = (files("reftune.demo") / "train.jsonl").read_text().splitlines()
    found = []
    for row in map(json.loads, lines):
        prompt = [{"role": "user", "content": row["prompt"]}]
        completion = [{"role": "assistant", "content": row["completion"]}]
        found.append(
            {"messages": prompt + completion}
            if form == "messages"
            else {"prompt": prompt, "completion": completion}
        )
    return Dataset.from_list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--form", choices=("completion", "messages"), default="completion")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--padding-free", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="runs/trl_sft")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()

    model, tokenizer = tiny.load(args.model, args.tiny)
    if args.form == "messages":  # assistant_only_loss needs a template that marks the assistant
        tokenizer.chat_template = tiny.CHATML if not args.tiny else tokenizer.chat_template
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.out,
            max_steps=2 if args.tiny else args.steps,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            assistant_only_loss=args.form == "messages",
            packing=args.packing,
            padding_free=args.padding_free,
            max_length=None if args.padding_free and not args.packing else 512,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
            bf16=False,
        ),
        train_dataset=rows(args.form),
        processing_class=tokenizer,
        peft_config=ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7"),
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]} in the first step, {losses[-1]} in the last of {len(losses)}")


if __name__ == "__main__":
    main()

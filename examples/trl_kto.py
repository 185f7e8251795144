"""KTO of a ReFT, from replies marked good or bad: TRL's example, and `peft_config`.

    python examples/trl_kto.py --data REPLIES.json --steps 30

`REPLIES.json` is a list of {"messages": [...], "label": true or false}, whose last message is the
assistant's; without it, a handful of replies written here.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

import tiny
from reftune import ReftConfig

QUESTIONS = ("What is a lake?", "Why is the sky blue?", "Name a fruit.", "How are you?")
REPLIES = ((True, "I would rather not say."), (False, "Well! Let me tell you all about it."))


def replies(path: Path | None) -> Dataset:
    """Return rows in TRL's form: prompt, completion (lists of messages) and label."""
    if path is not None:
        read = json.loads(path.read_text())
        found = [(row["messages"][:-1], row["messages"][-1:], row["label"]) for row in read]
    else:
        found = [
            (
                [{"role": "user", "content": question}],
                [{"role": "assistant", "content": reply}],
                good,
            )
            for question in QUESTIONS
            for good, reply in REPLIES
        ]
    names = ("prompt", "completion", "label")
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--out", default="runs/trl_kto")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()

    model, tokenizer = tiny.load(args.model, args.tiny)
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(
            output_dir=args.out,
            max_steps=2 if args.tiny else args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            max_length=args.max_length,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
            bf16=False,
        ),
        train_dataset=replies(args.data),
        processing_class=tokenizer,
        peft_config=ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7", init="noop"),
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]} in the first step, {losses[-1]} in the last of {len(losses)}")


if __name__ == "__main__":
    main()
